"""Runs all of RefAlign at a small size: photographs become clips, a model learns them, is sampled, scored and reported.

    python tools/demo.py                  one run, as `make demo` does
    python tools/demo.py --compare        with and without alignment, five seeds, as `make demo-compare` does
    python tools/demo.py --unseen 3       held-out clips show three subjects that training does not
    python tools/demo.py --photo me.jpg   the trained model with your own photograph as its reference

Stopped at any moment and started again, it continues.
"""

from refalign_jax.command import log_progress, run

# isort: split
import sys
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from refalign_jax.config import DemoConfig, read_recipe


def demo(
    recipe: Positional[str] = "demo",
    /,
    *,
    compare: bool = False,
    photo: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None,
    config: Annotated[DemoConfig, arg(name="")] = DemoConfig(),  # noqa: B008 (frozen)
) -> int:
    """Runs the demo.

    Args:
      recipe: the model and its training, a file or the bare name of one under configs/.
      compare: train each seed without alignment and with other targets too, and report all side by side.
      photo: an image; nothing is trained, the run that is there is sampled with it.
      config: the size.
    """
    read = read_recipe(recipe)
    log_progress()
    if photo is not None:
        from refalign_jax.demo.photo import sample_photograph

        picture, sentence = sample_photograph(photo, config.place / "seed-0")
        print(f"{sentence}\nThe picture is {picture.resolve()}; references left, three sampled frames right.")
        return 0
    from refalign_jax.demo import stages

    try:
        report = (stages.compare if compare else stages.demo)(config, read)
    except InterruptedError as stopped:  # a run that Ctrl-C or SIGTERM ended has saved a checkpoint
        print(stopped, file=sys.stderr)
        return 130
    print(f"The report is {report.resolve()}")
    return 0


def main(arguments: list[str], prog: str) -> int:
    """Parses and runs the demo."""
    return tyro.cli(demo, args=arguments, prog=prog, description=__doc__)


if __name__ == "__main__":
    run(main)
