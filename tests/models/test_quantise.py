"""Quantised weights: bounds of the error, what is quantised, memory, and that one block at a time is at full size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from refalign_jax.config import MeshConfig
from refalign_jax.initial import init_model
from refalign_jax.models.condition import Condition
from refalign_jax.models.quantise import Quantised, dequantise, is_quantised, quantise, quantise_shapes, shared_axis
from refalign_jax.models.transformer import velocity
from refalign_jax.models.umt5 import UMT5Config, encode, init
from refalign_jax.sharding import bytes_per_device, make_mesh, place_shapes
from refalign_jax.trees import flatten, unflatten

DTYPES = ("int8", "float8")
DIT = dataclasses.replace(tiny.DIT, width=48, ffn_width=96, latent_channels=4)


def held(params, dtype):
    """A tree with the parameters that are quantised in 8 bits."""
    axes = {path: shared_axis(path) for path in flatten(params)}
    return unflatten(
        {p: x if axes[p] is None else quantise(np.asarray(x), dtype, axes[p]) for p, x in flatten(params).items()}
    )


def weights(*shape):
    """Channels of very different size, one of them zero."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal(shape).astype(np.float32) * 10.0 ** rng.integers(-6, 6, shape[-1]).astype(np.float32)
    kernel[..., 3] = 0
    return kernel


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_of_each_weight_is_bounded(dtype):
    kernel = weights(2, 64, 16)
    found = quantise(kernel, dtype, -2)
    assert found.values.dtype.itemsize == 1
    assert found.scale.shape == (2, 1, 16)
    assert found.scale.dtype == np.float32
    error = np.abs(np.asarray(dequantise(found, jnp.dtype("float32"))) - kernel)
    bound = found.scale / 2 if dtype == "int8" else np.maximum(np.abs(kernel) / 16, found.scale * 2.0**-10)
    assert (error <= bound * (1 + 1e-5)).all()
    assert not error[..., 3].any()
    again = quantise(np.asarray(dequantise(found, jnp.dtype("float32"))), dtype, -2)
    np.testing.assert_array_equal(again.values.astype(np.float32), found.values.astype(np.float32))


def test_the_largest_weight_of_a_channel_is_kept_and_int8_is_symmetric():
    kernel = weights(64, 16)
    found = quantise(kernel, "int8", -2)
    np.testing.assert_array_equal(np.abs(found.values).max(0)[np.arange(16) != 3], 127)
    np.testing.assert_array_equal(quantise(-kernel, "int8", -2).values, -found.values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(dtype, value):
    kernel = weights(8, 16)
    kernel[2, 5] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantise(kernel, dtype, -2)


def test_kernels_of_blocks_are_quantised_and_nothing_else():
    paths = flatten(jax.eval_shape(lambda: init_model(tiny.MODEL, jax.random.key(0)))["dit"])
    quantised = {path for path in paths if shared_axis(path) is not None}
    layers = [f"{kind}_attention/{name}" for kind in ("self", "cross") for name in ("query", "key", "value", "out")]
    assert quantised == {f"blocks/{layer}/kernel" for layer in [*layers, "ffn/in", "ffn/out"]}
    text = flatten(jax.eval_shape(lambda: init(UMT5Config(num_layers=1), jax.random.key(0))))
    names = ("query", "key", "value", "out", "ffn_gate", "ffn_in", "ffn_out")
    kept = {path for path in text if shared_axis(path) is None}
    assert kept == set(text) - {f"blocks/{name}/kernel" for name in names} - {"token_embedding"}


@pytest.fixture(scope="module")
def model():
    """Parameters, inputs of a velocity, and the velocity."""
    params = tiny.params(dataclasses.replace(tiny.MODEL, dit=DIT))["dit"]
    rng = np.random.default_rng(1)
    x, references = (jnp.asarray(rng.standard_normal((1, n, 4, 6, 4)), jnp.float32) for n in (2, 1))
    condition = Condition(jnp.asarray(rng.standard_normal((1, 5, DIT.text_width)), jnp.float32), references)
    inputs = x, jnp.full(1, 500.0), condition
    run = jax.jit(lambda params: velocity(params, DIT, *inputs))
    return params, run, run(params)


@pytest.mark.parametrize(("dtype", "least", "most"), [("int8", 1e-4, 0.02), ("float8", 1e-3, 0.06)])
def test_the_velocity_is_near_that_of_float32(model, dtype, least, most):
    params, run, exact = model
    assert least < tiny.relative(run(held(params, dtype)), exact) < most


def test_the_velocity_is_that_of_the_dequantised_weights(model):
    params, run, _ = model
    quantised = held(params, "int8")
    assert tiny.relative(run(quantised), run(dequantise(quantised, jnp.dtype("float32")))) <= 1e-6


def test_no_stack_of_kernels_is_dequantised_at_once(model):
    """In the program every array with an axis of layers and a kernel's shape is in 8 bits."""
    params, run, _ = model
    text = run.lower(held(params, "int8")).as_text()
    assert "tensor<3x48x96xi8>" in text
    assert "tensor<3x48x96xf32>" not in text
    assert "tensor<3x48x96xf32>" in run.lower(params).as_text()


@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.03), ("float8", 0.15)])
def test_embeddings_of_the_text_encoder(dtype, most):
    config = UMT5Config(
        vocab_size=64, width=32, attention_width=32, ffn_width=64, num_heads=4, num_layers=2, compute_dtype="float32"
    )
    rng, shapes = np.random.default_rng(2), jax.eval_shape(lambda: init(config, jax.random.key(0)))
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    ids, mask = np.arange(24, dtype=np.int32).reshape(2, 12), np.ones((2, 12), np.int32)
    exact = encode(params, ids, mask, config)
    assert 1e-3 < tiny.relative(encode(held(params, dtype), ids, mask, config), exact) < most


def test_memory_is_counted_and_scales_are_split_like_their_channels():
    shapes = {"dit": jax.eval_shape(lambda: init_model(tiny.MODEL, jax.random.key(0)))["dit"]}
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    placed = place_shapes(shapes, mesh, jnp.float32)
    found = quantise_shapes(placed, "int8")
    before, after = flatten(placed["dit"]), flatten(found["dit"])
    expected = 0
    for path, x in before.items():
        if shared_axis(path) is None:
            expected += bytes_per_device(x)
            continue
        quantised = after[path]
        assert is_quantised(quantised)
        spec, scale = (tuple(each.sharding.spec) for each in quantised)
        assert scale[-1] == spec[-1]
        assert scale[-2] is None
        expected += bytes_per_device(x) // 4 + bytes_per_device(quantised.scale)
    assert bytes_per_device(found) == expected < bytes_per_device(placed)
    assert isinstance(after["blocks/ffn/in/kernel"], Quantised)
