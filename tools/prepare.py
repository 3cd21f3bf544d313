"""Prepares a dataset from videos, prompts and reference images, by the frozen encoders.

    python tools/prepare.py RECORDS.jsonl DATASET --vae dct --text-encoder words --vfm daisy
    python tools/prepare.py opens2v JSONS DATASET --videos DIR --vae DIR --text-encoder DIR --vfm DIR
    python tools/prepare.py phantom ANNOTATIONS.parquet DATASET --metadata FILE --videos DIR --vae …

The kind of the records, one of the subcommands, need not be named where the file's ending shows it. Encoders must be
named; dct, words and daisy are stand-ins without weights, for trying things out. With --show 6, the first six records
are drawn as they would be encoded, and nothing is prepared.
"""

from refalign_jax.command import require, run

# isort: split
import hashlib
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional, arg

from refalign_jax.config import OpenS2VConfig, PhantomConfig, PrepareConfig

if TYPE_CHECKING:
    from refalign_jax.data.records import Records

Flat = arg(name="")
SHEET = Path("show.png")


def jsonl(
    records: Positional[Path],
    dataset: Positional[str],
    /,
    *,
    config: Annotated[PrepareConfig, Flat],
    show: int = 0,
    sheet: Path = SHEET,
) -> None:
    """Prepares a JSONL file of your own; started again, it continues where it stopped.

    Args:
      records: lines {"video", "prompt", "references": [{"image", "subject"?, "mask"?}]}, paths relative to the file.
      dataset: the folder to write, local or gs://.
      config: how.
      show: draw so many records as they would be encoded, and prepare nothing; 0 prepares.
      sheet: PNG file for `show`.
    """
    require(records, "a JSONL file")
    from refalign_jax.data.sources.jsonl import read_jsonl

    finish(read_jsonl(records), dataset, config, {"name": "jsonl", "records": str(records)}, (show, sheet))


def opens2v(
    records: Positional[str],
    dataset: Positional[str],
    /,
    *,
    source: Annotated[OpenS2VConfig, Flat],
    config: Annotated[PrepareConfig, Flat],
    show: int = 0,
    sheet: Path = SHEET,
) -> None:
    """Prepares OpenS2V-5M, as published; started again, it continues where it stopped.

    Args:
      records: a file of mask_and_bbox, zipped or not, or a folder of them.
      dataset: the folder to write, local or gs://.
      source: videos, pairs, and which references are used.
      config: how.
      show: draw so many records as they would be encoded, and prepare nothing; 0 prepares.
      sheet: PNG file for `show`.
    """
    require(records, "OpenS2V-5M's JSON, or a folder of it")
    from refalign_jax.data.sources.opens2v import open_opens2v

    found = open_opens2v(records, source, tables(dataset), config.seed)
    print(*found.notes, sep="\n", end="\n" if found.notes else "", file=sys.stderr)
    about = {"name": "opens2v", "records": records, "videos": source.videos, "settings": source.settings}
    finish(found, dataset, config, about, (show, sheet))


def phantom(
    records: Positional[str],
    dataset: Positional[str],
    /,
    *,
    source: Annotated[PhantomConfig, Flat],
    config: Annotated[PrepareConfig, Flat],
    show: int = 0,
    sheet: Path = SHEET,
) -> None:
    """Prepares Phantom-Data, as published; started again, it continues where it stopped.

    Args:
      records: the parquet file of annotations.
      dataset: the folder to write, local or gs://.
      source: clips and metadata.
      config: how.
      show: draw so many records as they would be encoded, and prepare nothing; 0 prepares.
      sheet: PNG file for `show`.
    """
    require(records, "Phantom-Data's annotations")
    from refalign_jax.data.sources.phantom import open_phantom

    found = open_phantom(records, source, tables(dataset))
    print(*found.notes, sep="\n", end="\n" if found.notes else "", file=sys.stderr)
    about = {"name": "phantom", "records": records, "videos": source.videos, "settings": source.settings}
    finish(found, dataset, config, about, (show, sheet))


def tables(dataset: str) -> Path:
    """Where the tables of a source are kept: in the dataset's folder or, where that is remote, in a temporary one."""
    if "://" not in dataset:
        return Path(dataset) / ".tables"
    return Path(tempfile.gettempdir()) / f"refalign-tables-{hashlib.sha256(dataset.encode()).hexdigest()[:16]}"


def finish(
    records: "Records", dataset: str, config: PrepareConfig, source: Mapping[str, Any], drawn: tuple[int, Path]
) -> None:
    """Prepares records, or draws some of them, and prints what became of them."""
    count, sheet = drawn
    if count:
        from refalign_jax.data.sheet import show

        print(show(records, config, count, sheet))
        return
    from refalign_jax.data.prepare import prepare
    from refalign_jax.data.skips import read_skipped, table

    said = prepare(records, dataset, config, source)
    left_out = table(read_skipped(dataset))
    if left_out:
        print(left_out)
    print(said)


KINDS = {"jsonl": jsonl, "opens2v": opens2v, "phantom": phantom}
ENDINGS = {".jsonl": "jsonl", ".parquet": "phantom"}
"""Endings of files that show the kind of the records."""


def main(arguments: list[str], prog: str) -> None:
    """Finds the kind of the records, parses and prepares.

    Raises:
      ValueError: the kind is neither named nor shown by the file's ending.
    """
    if arguments and arguments[0] not in KINDS and not arguments[0].startswith("-"):
        if Path(arguments[0]).is_dir():
            raise ValueError(f"{arguments[0]} is a folder; name the file that holds the records.")
        ending = Path(arguments[0]).suffix
        if ending not in ENDINGS:
            raise ValueError(
                f"The ending of {arguments[0]} does not show what kind of records it holds; name the kind first, one "
                f"of {', '.join(KINDS)}, as in: {prog} {next(iter(KINDS))} {arguments[0]} DATASET."
            )
        arguments = [ENDINGS[ending], *arguments]
    kinds: dict[str, Any] = dict(KINDS)
    tyro.extras.subcommand_cli_from_dict(kinds, args=arguments, prog=prog, description=__doc__)


if __name__ == "__main__":
    run(main)
