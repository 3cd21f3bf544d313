"""The mesh of devices, and how parameters, activations and batches are split over it.

    axis      splits                                                   communication in a step
    data      the batch                                                gradients (all-reduce; over DCN between slices)
    fsdp      the batch; the width D of every kernel                   weights (all-gather), gradients (reduce-scatter)
    context   the tokens; the width D of every kernel, like fsdp       queries, keys, values (all-to-all); weights
    ring      the tokens further; D like context                       keys, values (permutations, overlapped); weights
    tensor    heads and hidden width; the other side of every kernel   partial sums of two products per block

So a device holds 1/(fsdp·context·ring·tensor) of parameters, moving average and moments, and 1/(data·fsdp) of the
batch. Vectors and modulations are small and are replicated.

Activations are placed on JAX's ambient mesh, which the caller sets by `jax.set_mesh(mesh)` around compilation. Without
an ambient mesh, nothing is constrained and the model is a single-device program.
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

AXES = ("data", "fsdp", "context", "ring", "tensor")
DATA, FSDP, CONTEXT, RING, TENSOR = AXES
WIDTH = (FSDP, CONTEXT, RING)
"""The axes over which the width D of a kernel is split."""

BATCH = PartitionSpec((DATA, FSDP))
"""Arrays with a leading batch axis."""
SEQUENCE = (RING, CONTEXT)
"""The axes over which tokens are split: into a part per device of the ring, and each part over the context."""
TOKENS = PartitionSpec((DATA, FSDP), SEQUENCE)
"""Tokens at the transformer's width, [B, T, D]."""
HIDDEN = PartitionSpec((DATA, FSDP), SEQUENCE, TENSOR)
"""Tokens within attention, [B, T, N·K] and [B, T, N, K], and within the feed-forward network, [B, T, hidden]."""
CONDITION = PartitionSpec((DATA, FSDP), None, TENSOR)
"""Keys and values of the text, [B, S, N·K]: few tokens, which are replicated over context and ring."""

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
    # small ones: replicated
    (r"bias|scale|modulation|projectors/bias", ()),
)
"""Mesh axes of a parameter's last dimensions, by the end of its path; the first match counts.

Leading dimensions, such as the layers of a stack, are never split.
"""


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """Arranges devices in a mesh.

    Args:
      config: sizes of the axes; with several slices, each holds an equal part of the data axis.
      devices: to arrange; None: all.

    Returns:
      A mesh with the axes `AXES`.

    Raises:
      ValueError: the axes don't multiply to the number of devices, or the slices don't divide the data axis.
    """
    devices = jax.devices() if devices is None else devices
    count, model = len(devices), config.fsdp * config.context * config.ring * config.tensor
    data = config.data or max(count // model, 1)
    if data * model != count:
        raise ValueError(
            f"mesh.data={config.data or 'the rest'} times fsdp={config.fsdp} times context={config.context} times "
            f"ring={config.ring} times tensor={config.tensor} is not the number of devices, {count}; make their "
            f"product {count}."
        )
    if data % config.slices:
        raise ValueError(
            f"mesh.data={data} is not divisible by mesh.slices={config.slices}; slices are joined by the data axis."
        )
    shape = (data, config.fsdp, config.context, config.ring, config.tensor)
    within, between = (data // config.slices, *shape[1:]), (config.slices, 1, 1, 1, 1)
    if config.slices == 1:
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif hasattr(devices[0], "slice_index"):
        arranged = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    else:  # simulated slices: consecutive devices
        arranged = np.asarray(devices).reshape(shape)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a mesh splits a batch: its data axis times its fsdp axis."""
    return mesh.shape[DATA] * mesh.shape[FSDP]


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Checks that a batch splits evenly.

    Args:
      batch_size: examples per step, over all devices.
      accumulation: number of equal parts of a batch whose gradients are accumulated.
      mesh: the devices.

    Raises:
      ValueError: a part of the batch is not divisible by the data axis times the fsdp axis.
    """
    count = batch_parts(mesh)
    if batch_size % (accumulation * count):
        raise ValueError(
            f"data.batch_size={batch_size} is not divisible by mesh.data times mesh.fsdp, {count}, times "
            f"optimizer.accumulation={accumulation}; the next that is, is "
            f"{-(-batch_size // (accumulation * count)) * accumulation * count}."
        )


def check_heads(dit: DiTConfig, mesh: Mesh) -> None:
    """Checks that the heads split evenly over the context and tensor axes, and that there is a kernel for the ring.

    Raises:
      ValueError: they don't; the message lists the products of the two axes that do. Or a ring is asked of GPUs.
    """
    gpu = mesh.devices.flat[0].platform in ("gpu", "cuda")
    if mesh.shape[RING] > 1 and (gpu or dit.attention == "cudnn"):
        raise ValueError(
            f"mesh.ring={mesh.shape[RING]} has no kernel on NVIDIA GPUs; split the tokens by mesh.context, up to the "
            f"{dit.num_heads} heads."
        )
    parts = mesh.shape[CONTEXT] * mesh.shape[TENSOR]
    if dit.num_heads % parts:
        fitting = [str(n) for n in range(1, dit.num_heads + 1) if dit.num_heads % n == 0]
        raise ValueError(
            f"model.dit.num_heads={dit.num_heads} is not divisible by mesh.context={mesh.shape[CONTEXT]} times "
            f"mesh.tensor={mesh.shape[TENSOR]}; their product must be one of {', '.join(fitting)}."
        )


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Mesh axes of each dimension of one parameter, by `RULES`.

    Args:
      path: "/"-separated; only its end matters, so that a parameter's moments and moving average are split like it.
      shape: shape of the parameter; a scalar is replicated.
      mesh: the devices. A dimension that its mesh axes don't divide is not split.

    Raises:
      AssertionError: no rule matches the path.
    """
    if not shape:
        return PartitionSpec()
    for pattern, axes in RULES:
        if re.search(rf"(^|/)({pattern})$", path):
            by_dimension = [None] * (len(shape) - len(axes)) + list(axes)
            return PartitionSpec(*(_fitting(*pair, mesh) for pair in zip(by_dimension, shape, strict=True)))
    raise AssertionError(f"no sharding rule for {path} {shape}")


def _fitting(axes: str | tuple[str, ...] | None, size: int, mesh: Mesh) -> str | tuple[str, ...] | None:
    """The mesh axes that divide a dimension: all of the given ones, else the first ones, else none."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    for used in (names[:end] for end in range(len(names), 0, -1)):
        if size % int(np.prod([mesh.shape[name] for name in used])) == 0:
            return used if len(used) > 1 else used[0]
    return None


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """Applies `param_spec` to each leaf.

    Args:
      state: a tree of arrays or shapes: parameters, or a train state with their moments and moving average.
      mesh: the devices.

    Returns:
      A tree of `NamedSharding`s, as for `jax.device_put` and for the `out_shardings` of `jax.jit`.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, param_spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, state)


def place_shapes(shapes: Any, mesh: Mesh, dtype: Any = None) -> Any:
    """Adds `state_sharding` to the shapes of a tree, to restore it, or to compile for it without arrays.

    Args:
      shapes: a tree of arrays or shapes, as in `state_sharding`.
      mesh: the devices.
      dtype: dtype of all leaves; None: that of each leaf.

    Returns:
      A tree of `jax.ShapeDtypeStruct`s with shardings.
    """
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding),
        shapes,
        state_sharding(shapes, mesh),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that each device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: Array, place: PartitionSpec) -> Array:
    """Constrains how the compiler splits an activation over the ambient mesh; without a mesh, returns x as it is.

    Without constraints, where a kernel is split along its input side, XLA gathers the activations, which are far larger
    than the kernel.
    """
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, place)


def unsharded() -> contextlib.AbstractContextManager[Any]:
    """A context without an ambient mesh, for single-device programs."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def ambient_device() -> Any:
    """What is known of the ambient mesh's devices or, without a mesh, of the default devices: platform and kind."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.devices()[0] if mesh.empty else mesh.abstract_device


def on_gpu() -> bool:
    """Whether the ambient device is a GPU."""
    return ambient_device().platform in ("gpu", "cuda")


def is_split() -> bool:
    """Whether the ambient mesh has more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def axis_size(*axes: str) -> int:
    """Returns the product of the sizes of axes of the ambient mesh; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else int(np.prod([mesh.shape[axis] for axis in axes]))


def to_devices(batch: Any, mesh: Mesh) -> Any:
    """Puts arrays with a leading batch axis on the devices, split by `BATCH`.

    Args:
      batch: a tree of arrays; each process gives the rows of its own devices.
      mesh: the devices.

    Returns:
      A tree of global arrays.
    """
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def bytes_per_device(shapes: Any) -> int:
    """Bytes per device of a tree of `jax.ShapeDtypeStruct`s with shardings, without its random keys."""
    leaves = [x for x in jax.tree.leaves(shapes) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)
