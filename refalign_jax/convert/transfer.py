"""Whole transfers: a published weight file into a checkpoint, and back."""

from __future__ import annotations

from pathlib import Path

from refalign_jax.convert.checkpoint import Unread, import_params, open_params
from refalign_jax.convert.dit import Names, model_table
from refalign_jax.convert.files import open_weights, write_weights
from refalign_jax.convert.infer import infer_config, infer_names
from refalign_jax.convert.table import published_shapes, stored, to_published
from refalign_jax.initial import model_shapes
from refalign_jax.trees import count, flatten, unflatten


def import_weights(weights: Path, checkpoint: Path, num_heads: int | None = None) -> str:
    """Reads published weights of a Wan transformer into a checkpoint of parameters; returns what was done.

    The model's size is inferred from the shapes. Weights are read and written layer by layer; see `import_params` for
    the memory that takes.

    Raises:
      ValueError: the file is not whole, or not the weights of a Wan transformer, or `checkpoint` exists.
    """
    opened = open_weights(weights)
    config, has_projectors = infer_config(opened.shapes, opened.source, num_heads)
    shapes = model_shapes(config)
    if not has_projectors:
        del shapes["projectors"]
    table = model_table(config.dit, config.alignment if has_projectors else None, infer_names(opened.shapes))
    leaves = {}
    for path, leaf in flatten(stored(table, shapes, opened)).items():
        dtypes = [opened.dtypes[name] for name in leaf.entry.names]
        leaf.check_dtype(*dtypes)
        leaves[path] = Unread(leaf.shape, dtypes[0], leaf.__getitem__)
    import_params(checkpoint, unflatten(leaves), config)
    return f"{count(leaves):,} parameters of {opened.source} are in {checkpoint}."


def export_weights(
    checkpoint: Path,
    weights: Path,
    projectors: bool = False,
    names: Names = "wan",
    max_shard_bytes: int = 10 * 10**9,
    ema: bool = False,
) -> str:
    """Writes a checkpoint's transformer under published names; returns what was done.

    Weights are read and written layer by layer: memory holds a few copies of the largest layer's largest tensor,
    whatever the depth of the model and the number of processes that saved it.

    Raises:
      ValueError: no checkpoint there, no projectors or moving average in it though asked for, or the file exists.
    """
    params, config = open_params(checkpoint, ema)
    if projectors and "projectors" not in params:
        raise ValueError(f"{checkpoint} holds no projectors, only a transformer; leave out --projectors.")
    if not projectors:
        params.pop("projectors", None)
    table = model_table(config.dit, config.alignment if projectors else None, names)
    shapes = published_shapes(table, params)
    leaves = flatten(params)
    dtypes = {name: leaves[entry.path].dtype.numpy_dtype for entry in table for name in entry.names}
    ordered = {name: shapes[name] for entry in table for name in entry.names}
    written = write_weights(weights, to_published(table, params), ordered, dtypes, max_shard_bytes)
    return f"{count(params):,} parameters of {checkpoint} are in {', '.join(path.name for path in written)}."
