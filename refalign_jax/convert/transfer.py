"""Whole transfers: a published weight file into a checkpoint, and back."""

from __future__ import annotations

from pathlib import Path

from refalign_jax.config import ExportConfig
from refalign_jax.convert.checkpoint import Unread, import_params, open_params
from refalign_jax.convert.dit import model_table
from refalign_jax.convert.infer import describe, open_transformer
from refalign_jax.convert.table import check, published_shapes, stored, to_published
from refalign_jax.convert.write import write_weights
from refalign_jax.initial import model_shapes
from refalign_jax.trees import count, flatten, unflatten

_DEFAULTS = ExportConfig()


def import_weights(weights: Path, checkpoint: Path, num_heads: int | None = None) -> str:
    """Reads published weights of a Wan transformer into a checkpoint of parameters; returns what was done.

    The model is as the file's metadata or a config.json beside it says; otherwise its size is inferred from the shapes.
    Weights are read and written layer by layer; see `import_params` for the memory that takes.

    Raises:
      ValueError: the file is not whole, not the weights of a Wan transformer, holds a number that is not finite, or
        does not say how many heads there are; or `checkpoint` exists.
    """
    opened = open_transformer(weights, num_heads)
    config = opened.config
    shapes = model_shapes(config)
    if not opened.has_projectors:
        del shapes["projectors"]
    table = model_table(config.dit, config.alignment if opened.has_projectors else None, opened.names)
    leaves = {
        path: Unread(leaf.shape, leaf.dtype, leaf.__getitem__)
        for path, leaf in flatten(stored(table, shapes, opened.tensors)).items()
    }
    import_params(checkpoint, unflatten(leaves), config)
    return f"{count(leaves):,} parameters of {opened.tensors.source} are in {checkpoint}."


def export_weights(checkpoint: str | Path, weights: Path, config: ExportConfig = _DEFAULTS) -> str:
    """Writes a checkpoint's transformer under published names, its configuration in the header; returns what was done.

    Weights are read and written layer by layer: memory holds a few copies of the largest layer's largest tensor,
    whatever the depth of the model and the number of processes that saved it.

    Args:
      checkpoint: a checkpoint of parameters or of a training run, or a run's folder, of which the newest is taken.
      weights: the file to write, ending in .safetensors.
      config: how.

    Raises:
      ValueError: no checkpoint there, no projectors or moving average in it though asked for, the file exists, or the
        checkpoint's arrays are not those of its model.
    """
    params, model = open_params(checkpoint, config.ema, config.verify_checkpoint)
    if config.projectors and "projectors" not in params:
        raise ValueError(f"{checkpoint} holds no projectors, only a transformer; leave out --projectors.")
    if not config.projectors:
        params.pop("projectors", None)
    expected = model_shapes(model)
    if not config.projectors:
        expected.pop("projectors", None)
    found, wanted = ({name: tuple(x.shape) for name, x in flatten(tree).items()} for tree in (params, expected))
    check(wanted, found, str(checkpoint))
    table = model_table(model.dit, model.alignment if config.projectors else None, config.names)
    shapes = published_shapes(table, params)
    leaves = flatten(params)
    dtypes = {name: leaves[entry.path].dtype.numpy_dtype for entry in table for name in entry.names}
    ordered = {name: shapes[name] for entry in table for name in entry.names}
    tensors = to_published(table, params)
    written = write_weights(weights, tensors, ordered, dtypes, int(config.max_shard_gb * 1e9), describe(model))
    return f"{count(params):,} parameters of {checkpoint} are in {', '.join(path.name for path in written)}."
