"""The mesh of devices, and where every parameter and every array of a batch lies on it.

The batch is split over the axes data and fsdp. Every kernel has one side of the transformer's width D: that side is
split over fsdp, which leaves the other side to a tensor axis and the token axis of activations to a context axis when
those are added. Vectors and modulations are small and lie everywhere. EMA and optimizer moments lie as their
parameters do, so that a device holds 1/fsdp of all of the state.

Activations stay split over the batch, and the weights of one layer are gathered when it is their turn. The compiler
does that only if told so; see `activations_on`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from refalign_jax.models.layers import Linear
from refalign_jax.train_config import MeshConfig

DATA, FSDP = "data", "fsdp"
BATCH = PartitionSpec((DATA, FSDP))
"""Of every array with a leading batch axis."""

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # D is the input side: [D, other]
    (r"(query|key|value)/kernel", (FSDP, None)),
    (r"blocks/ffn/in/kernel", (FSDP, None)),
    (r"(time_out|time_projection|head/linear|text_embedding/out)/kernel", (FSDP, None)),
    (r"projectors/(in|out)", (FSDP, None)),  # [D, D/2] and [D/2, E]
    (r"projectors/kernel", (FSDP, None)),  # [3, 3, D, E]
    # D is the output side: [other, D]
    (r"out/kernel", (None, FSDP)),
    (r"(patch_embedding|text_embedding/in|time_in)/kernel", (None, FSDP)),
    # small ones: everywhere
    (r"bias|scale|modulation|projectors/bias", ()),
)
"""How the last axes of a parameter are split, by the end of its path; leading axes (layers) never are. First match."""


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """Arranges the devices as configured.

    Raises:
      ValueError: the axes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    data = config.data or max(count // config.fsdp, 1)
    if data * config.fsdp != count:
        raise ValueError(
            f"mesh.data={config.data or 'the rest'} times mesh.fsdp={config.fsdp} is not the number of devices, "
            f"{count}; make their product {count}."
        )
    return jax.make_mesh((data, config.fsdp), (DATA, FSDP), (AxisType.Auto,) * 2, devices=devices)


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Refuses a batch that doesn't split evenly.

    Raises:
      ValueError: the examples of one part of the batch are not divisible by the devices.
    """
    count = mesh.size
    if batch_size % (accumulation * count):
        raise ValueError(
            f"data.batch_size={batch_size} is not divisible by {count} devices times optimizer.accumulation="
            f"{accumulation}; the next that is, is {-(-batch_size // (accumulation * count)) * accumulation * count}."
        )


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How one parameter is split.

    Args:
      path: "/"-separated; only its end counts, so that the moments of a parameter get the same answer.
      shape: of the parameter.
      mesh: the devices. A side that an axis doesn't divide is not split over it.

    Raises:
      AssertionError: no rule knows the path.
    """
    if not shape:
        return PartitionSpec()
    for pattern, axes in RULES:
        if re.search(rf"(^|/)({pattern})$", path):
            sides = [None] * (len(shape) - len(axes)) + list(axes)
            fitting = [a if a and n % mesh.shape[a] == 0 else None for a, n in zip(sides, shape, strict=True)]
            return PartitionSpec(*fitting)
    raise AssertionError(f"no sharding rule for {path} {shape}")


def state_sharding(shapes: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a tree of parameters, or of a train state that holds them."""

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, param_spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of, shapes)


def replicated(mesh: Mesh) -> NamedSharding:
    """Of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def activations_on(mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    """A context in which what is traced keeps the output of every linear layer split over the batch.

    Left to itself, XLA finds a kernel split along its input side and gathers the activations, which are far larger,
    in place of the kernel.
    """
    place = NamedSharding(mesh, BATCH)

    def keep(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        out = call(*args, **kwargs)
        linear = isinstance(context.module, Linear) and context.method_name == "__call__"
        return jax.lax.with_sharding_constraint(out, place) if linear else out

    return nn.intercept_methods(keep)


def to_devices(batch: Any, mesh: Mesh) -> Any:
    """Makes one global batch of each process's rows, split over the devices."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def bytes_a_device(shapes: Any) -> int:
    """Bytes that one device holds of a tree of `jax.ShapeDtypeStruct`s with shardings."""
    leaves = [x for x in jax.tree.leaves(shapes) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)
