"""Videos, prompts and references to a prepared dataset.

python tools/prepare.py jsonl RECORDS.jsonl DATASET --vae dct --text-encoder words --vfm daisy
python tools/prepare.py jsonl RECORDS.jsonl DATASET --vae DIR --text-encoder DIR --vfm DIR
"""

from pathlib import Path
from typing import Annotated

import tyro

from refalign_jax.command import run_subcommands
from refalign_jax.config import PrepareConfig
from refalign_jax.data.prepare import prepare
from refalign_jax.data.sources.jsonl import read_jsonl

Positional = tyro.conf.Positional
Flat = tyro.conf.arg(name="")


def jsonl(
    records: Annotated[Path, Positional],
    dataset: Annotated[str, Positional],
    /,
    *,
    config: Annotated[PrepareConfig, Flat],
) -> None:
    """Prepares a JSONL file of one's own; started again, it goes on where it stopped.

    Args:
      records: lines {"video", "prompt", "references": [{"image", "subject"?, "mask"?}]}, paths relative to the file.
      dataset: the folder to write, local or gs://.
      config: how.
    """
    print(prepare(read_jsonl(records), dataset, config, {"name": "jsonl", "records": str(records)}))


if __name__ == "__main__":
    run_subcommands({"jsonl": jsonl})
