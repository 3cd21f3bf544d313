"""The mesh of devices, and where every parameter, every activation and every array of a batch lies on it.

    axis      splits                                                   moves in a step
    data      the batch                                                gradients (all-reduce; over DCN between slices)
    fsdp      the batch; the width D of every kernel                   weights (all-gather), gradients (reduce-scatter)
    context   the tokens; the width D of every kernel, as fsdp does    queries, keys, values (all-to-all); weights
    tensor    heads and hidden width; the other side of every kernel   partial sums of two products a block

So a device holds 1/(fsdp·context·tensor) of parameters, moving average and moments, and 1/(data·fsdp) of the batch.
Vectors and modulations are small and lie everywhere.

The mesh is JAX's ambient one: whoever compiles does so under `jax.set_mesh(mesh)`. Without one nothing here has any
effect, and the model is a program of one device.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from refalign_jax.config import DiTConfig, MeshConfig
from refalign_jax.types import Array

AXES = ("data", "fsdp", "context", "tensor")
DATA, FSDP, CONTEXT, TENSOR = AXES
WIDTH = (FSDP, CONTEXT)
"""The axes over which the width D of a kernel is split."""

BATCH = PartitionSpec((DATA, FSDP))
"""Of every array with a leading batch axis."""
TOKENS = PartitionSpec((DATA, FSDP), CONTEXT)
"""Of tokens at the transformer's width, [B, T, D]."""
HIDDEN = PartitionSpec((DATA, FSDP), CONTEXT, TENSOR)
"""Of tokens within attention, [B, T, N·K] and [B, T, N, K], and within the feed-forward network."""
CONDITION = PartitionSpec((DATA, FSDP), None, TENSOR)
"""Of the text's keys and values: few tokens, which every part of the context attends to."""

RULES: tuple[tuple[str, tuple[str | tuple[str, ...] | None, ...]], ...] = (
    # D is the input side: [D, other]
    (r"(query|key|value)/kernel", (WIDTH, TENSOR)),
    (r"blocks/ffn/in/kernel", (WIDTH, TENSOR)),
    (r"(time_out|time_projection|text_embedding/out)/kernel", (WIDTH, TENSOR)),
    (r"head/linear/kernel", (WIDTH, None)),
    (r"projectors/(in|out)", (WIDTH, TENSOR)),  # [D, D/2] and [D/2, E]
    (r"projectors/kernel", (None, None, WIDTH, TENSOR)),  # [3, 3, D, E]
    # D is the output side: [other, D]
    (r"out/kernel", (TENSOR, WIDTH)),
    (r"(patch_embedding|text_embedding/in|time_in)/kernel", (None, WIDTH)),
    # small ones: everywhere
    (r"bias|scale|modulation|projectors/bias", ()),
)
"""How the last axes of a parameter are split, by the end of its path; leading axes (layers) never are. First match."""


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """Arranges the devices as configured; of several slices, each holds an equal part of the data axis.

    Raises:
      ValueError: the axes don't multiply to the number of devices, or the slices don't divide the data axis.
    """
    devices = jax.devices() if devices is None else devices
    count, model = len(devices), config.fsdp * config.context * config.tensor
    data = config.data or max(count // model, 1)
    if data * model != count:
        raise ValueError(
            f"mesh.data={config.data or 'the rest'} times fsdp={config.fsdp} times context={config.context} times "
            f"tensor={config.tensor} is not the number of devices, {count}; make their product {count}."
        )
    if data % config.slices:
        raise ValueError(
            f"mesh.data={data} is not divisible by mesh.slices={config.slices}; slices are joined by the data axis."
        )
    shape = (data, config.fsdp, config.context, config.tensor)
    within, between = (data // config.slices, *shape[1:]), (config.slices, 1, 1, 1)
    if config.slices == 1:
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif hasattr(devices[0], "slice_index"):
        arranged = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    else:  # simulated: equal runs of the devices
        arranged = np.asarray(devices).reshape(shape)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Refuses a batch that doesn't split evenly.

    Raises:
      ValueError: the examples of one part of the batch are not divisible by data times fsdp.
    """
    count = mesh.shape[DATA] * mesh.shape[FSDP]
    if batch_size % (accumulation * count):
        raise ValueError(
            f"data.batch_size={batch_size} is not divisible by mesh.data times mesh.fsdp, {count}, times "
            f"optimizer.accumulation={accumulation}; the next that is, is "
            f"{-(-batch_size // (accumulation * count)) * accumulation * count}."
        )


def check_heads(dit: DiTConfig, mesh: Mesh) -> None:
    """Refuses a mesh over which the heads don't split evenly.

    Raises:
      ValueError: heads not divisible by context times tensor; the divisors that fit are named.
    """
    parts = mesh.shape[CONTEXT] * mesh.shape[TENSOR]
    if dit.num_heads % parts:
        fitting = [str(n) for n in range(1, dit.num_heads + 1) if dit.num_heads % n == 0]
        raise ValueError(
            f"model.dit.num_heads={dit.num_heads} is not divisible by mesh.context={mesh.shape[CONTEXT]} times "
            f"mesh.tensor={mesh.shape[TENSOR]}; their product must be one of {', '.join(fitting)}."
        )


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How one parameter is split.

    Args:
      path: "/"-separated; only its end counts, so that the moments of a parameter get the same answer.
      shape: of the parameter.
      mesh: the devices. A side that its axes don't divide is not split.

    Raises:
      AssertionError: no rule knows the path.
    """
    if not shape:
        return PartitionSpec()
    for pattern, axes in RULES:
        if re.search(rf"(^|/)({pattern})$", path):
            sides = [None] * (len(shape) - len(axes)) + list(axes)
            return PartitionSpec(*(_fitting(side, size, mesh) for side, size in zip(sides, shape, strict=True)))
    raise AssertionError(f"no sharding rule for {path} {shape}")


def _fitting(side: str | tuple[str, ...] | None, size: int, mesh: Mesh) -> str | tuple[str, ...] | None:
    """The axes of a side that divide it: all of them or, of several, the first alone; else none."""
    names = (side,) if isinstance(side, str) else side or ()
    for used in (names, names[:1]):
        if used and size % int(np.prod([mesh.shape[name] for name in used])) == 0:
            return used if len(used) > 1 else used[0]
    return None


def state_sharding(shapes: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a tree of parameters, or of a train state that holds them."""

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, param_spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of, shapes)


def place_shapes(shapes: Any, mesh: Mesh, dtype: Any = None) -> Any:
    """`jax.ShapeDtypeStruct`s with the sharding of every leaf, for restoring and for compiling without arrays.

    Args:
      shapes: a tree of arrays or shapes, as `state_sharding` takes it.
      mesh: the devices.
      dtype: of all leaves; None keeps each leaf's own.
    """
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding),
        shapes,
        state_sharding(shapes, mesh),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: Array, place: PartitionSpec) -> Array:
    """Tells the compiler where an activation lies on the ambient mesh; without a mesh, x as it is.

    Left to itself, XLA finds a kernel split along its input side and gathers the activations, which are far larger,
    in place of the kernel.
    """
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, place)


def unsharded() -> contextlib.AbstractContextManager[Any]:
    """A context without a mesh, within which programs are those of one device."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def is_split() -> bool:
    """Whether the ambient mesh has more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def context_parts() -> int:
    """Over how many devices of the ambient mesh the tokens are split."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[CONTEXT]


def to_devices(batch: Any, mesh: Mesh) -> Any:
    """Makes one global batch of each process's rows, split over the devices."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def bytes_a_device(shapes: Any) -> int:
    """Bytes that one device holds of a tree of `jax.ShapeDtypeStruct`s with shardings."""
    leaves = [x for x in jax.tree.leaves(shapes) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)
