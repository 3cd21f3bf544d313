"""Converts published weights to a checkpoint and back.

    python tools/convert.py import WEIGHTS CHECKPOINT
    python tools/convert.py export CHECKPOINT WEIGHTS.safetensors --projectors

Both ways read and write layer by layer; a missing, unexpected or misshapen tensor is an error, and nothing is written.
"""

from refalign_jax.command import require, run

# isort: split
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg

from refalign_jax.config import ExportConfig


def import_(
    weights: Positional[Path],
    checkpoint: Positional[Path],
    /,
    *,
    num_heads: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: width / 128)")] = None,
) -> None:
    """Reads weights of Wan2.1, RefAlign, diffusers or ComfyUI into a checkpoint; dtypes are kept, float8 is widened.

    Args:
      weights: a safetensors or torch file, an index of shards, or a folder with one of these or with a pipeline.
      checkpoint: the folder to write, a local one.
      num_heads: attention heads, where neither the file nor a config.json beside it says; published Wan models have
        width / 128.
    """
    require(weights, "published weights")
    from refalign_jax.convert.transfer import import_weights

    print(import_weights(weights, checkpoint, num_heads))


def export(
    checkpoint: Positional[str],
    weights: Positional[Path],
    /,
    *,
    config: Annotated[ExportConfig, arg(name="")] = ExportConfig(),  # noqa: B008 (frozen)
) -> None:
    """Writes a checkpoint's transformer as safetensors under the published names; dtypes are kept.

    Args:
      checkpoint: a checkpoint of parameters or of a training run, or a run's folder, of which the newest is taken;
        local or gs://.
      weights: the file to write, ending in .safetensors; a larger one than max_shard_gb becomes shards and an index.
      config: how.
    """
    require(checkpoint, "a checkpoint or a run's folder")
    from refalign_jax.convert.transfer import export_weights

    print(export_weights(checkpoint, weights, config))


def main(arguments: list[str], prog: str) -> None:
    """Parses and converts."""
    commands: dict[str, Any] = {"import": import_, "export": export}
    tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog=prog, description=__doc__)


if __name__ == "__main__":
    run(main)
