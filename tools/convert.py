"""Published weights to a checkpoint of ours and back.

python tools/convert.py import WEIGHTS CHECKPOINT
python tools/convert.py export CHECKPOINT WEIGHTS.safetensors [--projectors]
"""

from pathlib import Path
from typing import Annotated

import tyro

from refalign_jax.command import run_subcommands
from refalign_jax.convert import transfer
from refalign_jax.convert.dit import Names

Positional = tyro.conf.Positional


def import_(
    weights: Annotated[Path, Positional], checkpoint: Annotated[Path, Positional], /, *, num_heads: int | None = None
) -> None:
    """Reads Wan2.1's, RefAlign's or diffusers' safetensors into a checkpoint, dtypes kept.

    Args:
      weights: a safetensors file, an index of shards, or a folder with either.
      checkpoint: the folder to write.
      num_heads: attention heads; by default width / 128, as in every published Wan model.
    """
    print(transfer.import_weights(weights, checkpoint, num_heads))


def export(
    checkpoint: Annotated[Path, Positional],
    weights: Annotated[Path, Positional],
    /,
    *,
    projectors: bool = False,
    names: Names = "wan",
    max_shard_gb: float = 10.0,
    ema: bool = False,
) -> None:
    """Writes a checkpoint's transformer as safetensors under the published names, dtypes kept.

    Args:
      checkpoint: a checkpoint of parameters or of a training run, or a run's folder, of which the newest is taken.
      weights: the file to write, ending in .safetensors; beyond `max_shard_gb` it becomes shards and an index.
      projectors: include the projectors, which training continues with and inference does not need.
      names: wan, as RefAlign and Wan2.1 publish, or diffusers.
      max_shard_gb: the most one file holds, in 10^9 bytes.
      ema: the moving average in place of the parameters.
    """
    print(transfer.export_weights(checkpoint, weights, projectors, names, int(max_shard_gb * 1e9), ema))


if __name__ == "__main__":
    run_subcommands({"import": import_, "export": export})
