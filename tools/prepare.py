"""Prepares a dataset from videos, prompts and reference images, by the frozen encoders.

    python tools/prepare.py RECORDS.jsonl DATASET --vae dct --text-encoder words --vfm daisy
    python tools/prepare.py RECORDS.jsonl DATASET --vae DIR --text-encoder DIR --vfm DIR
    python tools/prepare.py jsonl RECORDS DATASET …

The kind of the records, one of the subcommands, need not be named where the file's ending shows it. Encoders must be
named; dct, words and daisy are stand-ins without weights, for trying things out.
"""

from refalign_jax.command import require, run

# isort: split
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from refalign_jax.config import PrepareConfig

Flat = arg(name="")


def jsonl(
    records: Positional[Path],
    dataset: Positional[str],
    /,
    *,
    config: Annotated[PrepareConfig, Flat],
) -> None:
    """Prepares a JSONL file of your own; started again, it continues where it stopped.

    Args:
      records: lines {"video", "prompt", "references": [{"image", "subject"?, "mask"?}]}, paths relative to the file.
      dataset: the folder to write, local or gs://.
      config: how.
    """
    require(records, "a JSONL file")
    from refalign_jax.data.prepare import prepare
    from refalign_jax.data.sources.jsonl import read_jsonl

    print(prepare(read_jsonl(records), dataset, config, {"name": "jsonl", "records": str(records)}))


KINDS = {"jsonl": jsonl}
ENDINGS = {".jsonl": "jsonl"}
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
    tyro.extras.subcommand_cli_from_dict(dict(KINDS), args=arguments, prog=prog, description=__doc__)


if __name__ == "__main__":
    run(main)
