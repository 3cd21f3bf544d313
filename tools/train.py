"""Trains a recipe.

    python tools/train.py configs/refalign_1_3b_stage1.py --data.path DATASET --train.folder runs/a
    python tools/train.py tiny --train.folder runs/tiny
    python tools/train.py RECIPE --from-dataset --data.path DATASET --train.folder runs/b

RECIPE is a Python file with get_config(), which is executed, or the bare name of one under configs/. Options override
its fields; after a recipe, --help shows every field with the recipe's value. A run that finds checkpoints in its
folder continues from the newest.
"""

from refalign_jax.command import log_progress, parse_recipe, require, run

# isort: split
import dataclasses
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from refalign_jax.config import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line."""

    from_dataset: bool = False
    """Take latent channels, widths, text length and number of references from the dataset data.path, and print them."""
    config: Annotated[Config, arg(name="")] = dataclasses.field(default_factory=Config)
    """The recipe."""


def main(arguments: list[str], prog: str) -> None:
    """Parses, then trains."""
    given = parse_recipe(Arguments, arguments, prog, __doc__)
    log_progress()
    data, train = given.config.data, given.config.train
    if data.path and not Path(data.path).is_file():
        require(f"{data.path}/manifest.json", "the manifest of a prepared dataset")
    if train.init and not train.checkpoint_folder and not (Path(train.folder) / "checkpoints").exists():
        require(train.init, "what train.init names: a run's folder, a checkpoint, or published weights")
    from refalign_jax.trainer import loop, preflight

    config = preflight.fit_to_dataset(given.config) if given.from_dataset else given.config
    loop.train(config)


if __name__ == "__main__":
    run(main)
