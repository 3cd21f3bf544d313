"""Weights read and quantised on the host, layer by layer.

Beyond what is kept, a quarter of float32, the host holds one layer of one tensor at full size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from refalign_jax.config import QuantisedDType
from refalign_jax.convert.lora import Adapter, deltas_of
from refalign_jax.convert.table import check
from refalign_jax.models.quantise import Quantised, is_quantised, quantise, quantise_shapes, shared_axis
from refalign_jax.trees import flatten, unflatten
from refalign_jax.types import Params


def read_quantised(params: Params, dtype: QuantisedDType) -> dict[str, Any]:
    """Reads parameters and quantises them; those that stay as they are keep the dtype stored.

    Args:
      params: a nested dict of what `table.stored` found.
      dtype: of the quantised values.

    Returns:
      numpy arrays, and a `Quantised` of them for each parameter that is quantised.

    Raises:
      ValueError: a number that is not finite.
    """
    leaves = flatten(params)
    return unflatten(
        {
            path: leaf[()] if shared_axis(path) is None else _quantise(path, leaf, dtype, ())
            for path, leaf in leaves.items()
        }
    )


def place_quantised(
    params: Params, shapes: Params, dtype: QuantisedDType, adapters: Sequence[Adapter] = ()
) -> dict[str, Any]:
    """Reads a transformer's parameters and puts them into their place on the devices, quantised.

    Args:
      params: a nested dict of what `table.stored` found, or of what `checkpoint.open_params` opened.
      shapes: `jax.ShapeDtypeStruct`s with shardings; what is not quantised gets their dtype.
      dtype: of the quantised values.
      adapters: opened for this model; they are added in float32 before a weight is quantised.

    Raises:
      ValueError: parameters of another model, listed with their shapes, or a number that is not finite.
    """
    leaves, targets = flatten(params), flatten(quantise_shapes(shapes, dtype))
    expected = {path: tuple(x.shape) for path, x in flatten(shapes).items()}
    check(expected, {path: tuple(leaf.shape) for path, leaf in leaves.items()}, "The checkpoint")
    placed: dict[str, Any] = {}
    for path, target in targets.items():
        if is_quantised(target):
            value: Any = _quantise(path, leaves[path], dtype, adapters)
        else:
            value = np.array(leaves[path][()], np.float32)
            for layer, delta in deltas_of(adapters, path):
                value[... if layer is None else layer] += delta
            value = value.astype(target.dtype)
        placed[path] = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding).block_until_ready(), value, target)
    return unflatten(placed)


def _quantise(path: str, leaf: Any, dtype: QuantisedDType, adapters: Sequence[Adapter]) -> Quantised:
    """Reads and quantises one parameter: a stack layer by layer, anything else in parts of its rows."""
    axis = shared_axis(path)
    assert axis is not None, path
    stack = axis == -2
    step = 1 if stack else 2**14
    found: Quantised | None = None
    for start in range(0, leaf.shape[0], step):
        span = slice(start, start + step)
        weight = np.asarray(leaf[span,], np.float32)
        for _, delta in deltas_of(adapters, path, start) if stack else ():
            weight = weight + delta
        try:
            part = quantise(weight, dtype, axis)
        except ValueError as error:
            raise ValueError(f"{path}, {'layer' if stack else 'rows from'} {start}: {error}") from error
        if found is None:
            found = Quantised(*(np.empty((leaf.shape[0], *x.shape[1:]), x.dtype) for x in part))
        for whole, x in zip(found, part, strict=True):
            whole[span] = x
    assert found is not None, path
    return found
