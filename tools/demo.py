"""RefAlign as a whole in one command, small: photographs to clips, a model trained on them, samples, scores, report.

python tools/demo.py                  one run; `make demo`
python tools/demo.py --compare        with and without alignment, three seeds; `make demo-compare`
"""

import logging
import sys
from pathlib import Path
from typing import Annotated

import tyro

from refalign_jax.command import run
from refalign_jax.config import DemoConfig, read_recipe
from refalign_jax.demo.stages import compare, demo

RECIPE = Path(__file__).parents[1] / "configs" / "demo.py"


def main(
    *,
    compare_alignment: Annotated[bool, tyro.conf.arg(name="compare")] = False,
    recipe: Path = RECIPE,
    config: Annotated[DemoConfig, tyro.conf.arg(name="")] = DemoConfig(),  # noqa: B008 (frozen)
) -> int:
    """Runs the demo; stopped at any moment and started again, it goes on.

    Args:
      compare_alignment: train each seed without alignment too, and report both side by side.
      recipe: of the model and its training.
      config: of what size.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    try:
        report = (compare if compare_alignment else demo)(config, read_recipe(recipe))
    except (InterruptedError, KeyboardInterrupt) as stopped:
        print(str(stopped) or "Stopped; start again to go on.", file=sys.stderr)
        return 130
    print(f"The report is {report.resolve()}")
    return 0


if __name__ == "__main__":
    run(main)
