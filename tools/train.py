"""Trains by a recipe: `python tools/train.py configs/refalign_1_3b_stage1.py --train.folder runs/a [...]`.

`--help` shows every field with its type and the recipe's value. A run that finds checkpoints in its folder goes on.
"""

import logging
import sys
from pathlib import Path

import tyro

from refalign_jax.command import _exit
from refalign_jax.config import Config, read_recipe


def parse(arguments: list[str]) -> Config:
    """The recipe named first, with the fields that the other arguments override.

    Raises:
      ValueError: no such recipe, or a value that a field can't have.
    """
    recipe, rest = (arguments[0], arguments[1:]) if arguments and not arguments[0].startswith("-") else ("", arguments)
    if not recipe and not {"-h", "--help"} & set(rest):
        raise ValueError("Name a recipe first, as in: tools/train.py configs/tiny.py --train.folder runs/tiny.")
    default = read_recipe(Path(recipe)) if recipe else Config()
    return tyro.cli(
        Config, default=default, args=rest, description=__doc__, prog=f"tools/train.py {recipe or 'RECIPE'}"
    )


def main(arguments: list[str]) -> int:
    """Parses, then trains."""
    config = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    from refalign_jax.trainer.loop import train

    train(config)
    return 0


if __name__ == "__main__":
    _exit(lambda: main(sys.argv[1:]))
