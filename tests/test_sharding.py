"""Any arrangement of devices computes the same; every parameter has its place; checkpoints move between them."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from support import tiny
from support.runs import FAST_COMPILE, MODEL, recipe

from refalign_jax.alignment import SubjectPatches
from refalign_jax.config import AlignmentConfig, Config, MeshConfig, ModelConfig, OptimizerConfig, wan_1_3b, wan_14b
from refalign_jax.models import dit, gradients
from refalign_jax.sharding import (
    bytes_per_device,
    check_batch,
    check_heads,
    make_mesh,
    param_spec,
    replicated,
    state_sharding,
    to_devices,
)
from refalign_jax.trainer.checkpoint import Checkpoints
from refalign_jax.trainer.state import begin, init_state, save, state_shapes
from refalign_jax.trainer.step import train_step
from refalign_jax.trees import flatten

WIDE = ModelConfig(
    dit=dataclasses.replace(MODEL.dit, width=64, num_heads=8, num_layers=2, remat="attention"),
    alignment=AlignmentConfig(num_blocks=2, vfm_width=8),
)
"""Heads for eight devices; below, grids of an odd number of tokens, which no context divides."""

MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 4, 2), (2, 2, 2, 1), (1, 2, 2, 2)]
RINGS = [(1, 1, 1, 1, 8), (1, 1, 2, 1, 4), (1, 2, 1, 2, 2), (2, 1, 2, 1, 2), (1, 1, 2, 2, 2)]
"""Sizes of data, fsdp, context, tensor and, where it is not 1, ring."""


def mesh_of(data: int, fsdp: int, context: int = 1, tensor: int = 1, ring: int = 1, slices: int = 1):
    config = MeshConfig(data=data, fsdp=fsdp, context=context, ring=ring, tensor=tensor, slices=slices)
    return make_mesh(config, jax.devices()[: data * fsdp * context * ring * tensor])


@functools.cache
def one_step(references: int, shape: tuple[int, ...], masked: bool = False, accumulation: int = 1):
    """Metrics, gradient (the first moment is a tenth of it) and parameters after a step on this mesh, and its HLO."""
    alignment = dataclasses.replace(
        WIDE.alignment, center_targets="dataset" if masked else "none", subject_patches_only=masked
    )
    config = Config(
        model=dataclasses.replace(WIDE, alignment=alignment),
        optimizer=OptimizerConfig(clip=0, accumulation=accumulation),
    )
    mesh = mesh_of(*shape)
    state = init_state(tiny.params(WIDE), jax.random.key(0), config)
    places = state_sharding(state, mesh)
    counts = [min(count, references) for count in (3, 2, 0, 1, 3, 3, 1, 2)]
    batch = tiny.batch(counts, references, config=WIDE, grid=(3, 6, 10))  # 45 video tokens, 15 of each reference
    if masked:
        mask = jax.random.bernoulli(jax.random.key(2), 0.6, batch.vfm_features.shape[:3])
        batch = batch._replace(patches=SubjectPatches(mask, jax.random.normal(jax.random.key(3), (8, 8))))
    noise = jax.random.normal(jax.random.key(1), batch.video_latents.shape)
    index = jnp.array([900, 100, 500, 700, 999, 0, 300, 820])
    inputs = jax.device_put(state, places), *to_devices((batch, noise, index), mesh)
    jitted = jax.jit(
        lambda *inputs: train_step(*inputs, config),
        out_shardings=(places, replicated(mesh)),
        compiler_options=FAST_COMPILE,
    )
    with jax.set_mesh(mesh):
        compiled = jitted.lower(*inputs).compile()
    after, metrics = compiled(*inputs)
    kernel = after.params["dit"]["blocks"]["ffn"]["in"]["kernel"].sharding.shard_shape((2, 64, 40))
    assert kernel == (2, 64 // (shape[1] * shape[2] * math.prod(shape[4:])), 40 // shape[3])
    (moments,) = [x for x in after.optimizer if hasattr(x, "mu")]
    return jax.device_get((metrics, moments.mu, after.params)), compiled.as_text()


@pytest.mark.parametrize(
    ("shape", "references"),
    # another number of tokens matters where tokens are split
    [
        *((shape, 3) for shape in MESHES + RINGS),
        *((shape, 1) for shape in MESHES + RINGS[:2] if math.prod(shape[2:]) > 2),
    ],
)
def test_every_mesh_computes_the_same(shape, references):
    expected, _ = one_step(references, (1, 1, 1, 1))
    for ours, theirs in zip(one_step(references, shape)[0], expected, strict=True):
        ours, theirs = flatten(ours), flatten(theirs)
        for name, value in theirs.items():
            assert tiny.relative(ours[name], value) <= 1e-5 or np.abs(ours[name] - value).max() < 1e-12, name


@pytest.mark.parametrize(("shape", "samples"), [((2, 2, 1, 2), 2), ((2, 4, 1, 1), 1)])
def test_one_stream_as_gpus_have_it_computes_the_same(monkeypatch, shape, samples):
    """Where a device has one sample, modulations and gates are multiplied into kernels."""
    for module in (dit, gradients):
        monkeypatch.setattr(module, "on_gpu", lambda: True)
    (_, ours, _), hlo = one_step.__wrapped__(3, shape)
    assert f"f32[{samples},90,64]" in hlo  # of a device's samples, 45 video tokens and 45 of references
    theirs = flatten(one_step(3, (1, 1, 1, 1))[0][1])
    for name, value in flatten(ours).items():
        assert tiny.relative(value, theirs[name]) <= 1e-5 or np.abs(value - theirs[name]).max() < 1e-12, name


def test_masked_targets_on_a_mesh_and_in_parts():
    expected, _ = one_step(3, (1, 1, 1, 1), masked=True)
    plain, _ = one_step(3, (1, 1, 1, 1))
    assert abs(expected[0]["push"] / plain[0]["push"] - 1) > 1e-3
    for ours, theirs in zip(one_step(3, (1, 2, 2, 2), masked=True, accumulation=2)[0], expected, strict=True):
        ours, theirs = flatten(ours), flatten(theirs)
        for name, value in theirs.items():
            assert tiny.relative(ours[name], value) <= 1e-5 or np.abs(ours[name] - value).max() < 1e-12, name


def test_weights_are_gathered_activations_never():
    _, hlo = one_step(3, (1, 8, 1, 1))
    moved = re.findall(r"= [^=]*? (?:all-gather|all-reduce|reduce-scatter|all-to-all)\(", hlo)
    assert moved
    assert not [line for line in moved if re.search(r"\[8,\d+,\d+[,\]]", line)]


def test_slices_are_joined_by_the_data_axis():
    devices = mesh_of(4, 1, 2, 1, slices=2).devices
    ids = [[device.id for device in devices[rows].flat] for rows in (slice(0, 2), slice(2, 4))]
    assert ids == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match=r"mesh\.data=1 is not divisible by mesh\.slices=2"):
        mesh_of(1, 8, slices=2)


def test_heads_that_do_not_divide_are_refused_with_the_divisors_that_fit():
    check_heads(wan_14b(), mesh_of(1, 1, 4, 2))
    with pytest.raises(ValueError, match=r"num_heads=12 .* mesh.context=8 .* one of 1, 2, 3, 4, 6, 12\."):
        check_heads(wan_1_3b(), mesh_of(1, 1, 8, 1))


@pytest.mark.parametrize("dit", [wan_1_3b(), wan_14b()])
def test_the_state_of_both_models_is_spread_evenly(dit):
    config = Config(model=ModelConfig(dit=dit), optimizer=OptimizerConfig(ema_decay=0.99))
    alone, spread = (state_shapes(config, mesh_of(1, n)) for n in (1, 8))
    assert bytes_per_device(spread) / bytes_per_device(alone) < 1.01 / 8
    params, moments = spread.params, spread.optimizer[1].mu
    for a, b, c in zip(*map(jax.tree.leaves, (params, moments, spread.ema)), strict=True):
        assert a.sharding == b.sharding == c.sharding


def test_a_side_that_does_not_divide_is_whole_and_an_unknown_parameter_is_an_error():
    mesh = mesh_of(1, 8)
    every = ("fsdp", "context", "ring")
    assert param_spec("dit/blocks/self_attention/out/kernel", (3, 24, 24), mesh) == PartitionSpec(None, "tensor", every)
    part = mesh_of(1, 2, 4, 1)
    assert param_spec("dit/blocks/ffn/in/kernel", (3, 12, 7), part) == PartitionSpec(None, "fsdp", "tensor")
    assert param_spec("optimizer/1/mu/projectors/out", (2, 12, 8), mesh) == PartitionSpec(None, None, "tensor")
    with pytest.raises(AssertionError, match="no sharding rule"):
        param_spec("dit/new_layer/weights", (8, 8), mesh)


def test_parameters_are_born_in_their_places(tmp_path):
    config = dataclasses.replace(recipe(tmp_path), mesh=MeshConfig(fsdp=4))
    mesh = make_mesh(config.mesh)
    with Checkpoints(tmp_path / "checkpoints", 1) as checkpoints:
        state, position = begin(config, mesh, checkpoints)
    assert position is None
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(state_shapes(config, mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)


def test_a_checkpoint_moves_between_meshes_to_the_bit(tmp_path):
    config, saved = recipe(tmp_path), None
    for shape in ((8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 1, 1, 1), (1, 2, 1, 2)):
        mesh = mesh_of(*shape)
        with Checkpoints(tmp_path / "checkpoints", 1) as checkpoints:
            state, position = begin(config, mesh, checkpoints)
            assert state.params["projectors"]["in"].sharding.mesh == mesh
            assert position == (saved and {"examples_consumed": 8 * int(state.step)})
            values = jax.device_get(state._replace(key=jax.random.key_data(state.key)))
            if saved is not None:
                for a, b in zip(*map(jax.tree.leaves, (saved, values)), strict=True):
                    np.testing.assert_array_equal(a, b)
            state = state._replace(step=state.step + 1)
            save(state, {"examples_consumed": 8 * int(state.step)}, config, {}, checkpoints)
            saved = values._replace(step=values.step + 1)


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (0, 16), (8, 2)])
def test_a_mesh_of_another_number_of_devices_is_refused(data, fsdp):
    with pytest.raises(ValueError, match=r"mesh\.data=.* is not the number of devices, 8"):
        make_mesh(MeshConfig(data=data, fsdp=fsdp))


def test_a_batch_that_does_not_divide_is_refused():
    check_batch(16, 2, mesh_of(4, 2))
    with pytest.raises(ValueError, match=r"data.batch_size=12 is not divisible by .*, 8, times .*the next.* 16"):
        check_batch(12, 1, mesh_of(4, 2))
