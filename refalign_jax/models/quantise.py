"""Weights in 8 bits for inference: quantised once on the host, dequantised block by block where they are used.

    W[i, o] ≈ s[o]·q[i, o],    s[o] = max_i |W[i, o]| / q_max

Symmetric, with one float32 scale per output channel. q is a whole number in [-127, 127] (int8) or a float8 (e4m3fn, of
which the largest is 448). Only weights are quantised: products are computed in the compute dtype as before, of
dequantised kernels. The stack of layers stays in 8 bits, since a block is dequantised within the loop over blocks.

Quantised are the kernels of blocks and the token embedding, whose scale is per row. Norms, biases, modulations and the
layers around the blocks stay as they are: they are few, and t and the latents pass through them.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from refalign_jax.config import QuantisedDType
from refalign_jax.types import Array, Float, Params

_DTYPES: dict[str, tuple[Any, float]] = {"int8": (np.int8, 127.0), "float8": (ml_dtypes.float8_e4m3fn, 448.0)}
"""What q is stored as, and q_max."""

_SHARED_AXIS = ((re.compile(r"(^|/)blocks/.*kernel$"), -2), (re.compile(r"(^|/)token_embedding$"), -1))
"""Paths of the parameters that are quantised, and the axis along which values share a scale."""


class Quantised(NamedTuple):
    """A parameter in 8 bits; it takes the parameter's place in the tree.

    Attributes:
      values: q, of the parameter's shape.
      scale: s, float32, of the same shape with 1 in place of the axis along which it is shared.
    """

    values: Any
    scale: Any


def shared_axis(path: str) -> int | None:
    """The axis along which the values of a parameter share a scale; None where it is not quantised."""
    return next((axis for pattern, axis in _SHARED_AXIS if pattern.search(path)), None)


def quantise(weight: Float[np.ndarray, "*rest"], dtype: QuantisedDType, axis: int) -> Quantised:
    """Quantises an array on the host.

    Args:
      weight: finite.
      dtype: of q.
      axis: along which values share a scale.

    Returns:
      numpy arrays. The error of a value is at most half of its scale in int8, and in float8 at most 1/16 of the value
      or 2^-10 of the scale, whichever is larger.

    Raises:
      ValueError: it holds NaN or an infinity.
    """
    stored, largest = _DTYPES[dtype]
    weight = np.asarray(weight, np.float32)
    scale = np.abs(weight).max(axis=axis, keepdims=True) / np.float32(largest)
    if not np.isfinite(scale).all():
        raise ValueError("values that are NaN or infinite can't be quantised.")
    scale = np.where(scale > np.finfo(np.float32).tiny, scale, np.float32(1)).astype(np.float32)
    ratio = weight / scale
    if dtype == "int8":
        np.rint(ratio, out=ratio)
    np.clip(ratio, -largest, largest, out=ratio)
    return Quantised(ratio.astype(stored), scale)


def dequantise(params: Any, dtype: jnp.dtype) -> Any:
    """Replaces every `Quantised` in a tree by s·q in `dtype`; other leaves stay as they are."""

    def whole(x: Any) -> Any:
        return (x.values.astype(jnp.float32) * x.scale).astype(dtype) if isinstance(x, Quantised) else x

    return jax.tree.map(whole, params, is_leaf=is_quantised)


def take_rows(table: Any, ids: Array) -> Float[Array, "... D"]:
    """Returns rows of an embedding table, quantised or not, float32; only these rows are dequantised."""
    rows = jax.tree.map(lambda x: jnp.take(x, ids, axis=0), table)
    found: Array = dequantise(rows, jnp.dtype(jnp.float32)).astype(jnp.float32)
    return found


def is_quantised(x: Any) -> bool:
    """Whether a leaf is a `Quantised`."""
    return isinstance(x, Quantised)


def quantise_shapes(shapes: Params, dtype: QuantisedDType) -> dict[str, Any]:
    """Shapes of a quantised tree.

    Args:
      shapes: a nested dict of `jax.ShapeDtypeStruct`s, with or without shardings.
      dtype: of q.

    Returns:
      The same with a `Quantised` of shapes for each parameter that is quantised. A scale is split like its output
      channels.
    """

    def quantised(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> Any:
        axis = shared_axis(jax.tree_util.keystr(path, simple=True, separator="/"))
        if axis is None:
            return x
        sizes = list(x.shape)
        sizes[axis] = 1
        place = x.sharding
        if isinstance(place, NamedSharding):
            axes = [*place.spec, *(None,) * (len(sizes) - len(place.spec))]
            axes[axis] = None
            place = NamedSharding(place.mesh, PartitionSpec(*axes))
        return Quantised(
            jax.ShapeDtypeStruct(x.shape, _DTYPES[dtype][0], sharding=x.sharding),
            jax.ShapeDtypeStruct(tuple(sizes), jnp.float32, sharding=place),
        )

    found: dict[str, Any] = jax.tree_util.tree_map_with_path(quantised, shapes)
    return found
