"""The VAE against golden values of the published code, and its properties."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refalign_jax.convert.files import open_weights
from refalign_jax.encoders.wan_vae import load_vae
from refalign_jax.models import vae
from refalign_jax.trees import count

GOLDEN = Path(__file__).parents[1] / "golden" / "encoders_a"


QUICK = {"xla_backend_optimization_level": 0}  # halves the time to compile
encode = jax.jit(vae.encode, static_argnames=("config", "tiling"), compiler_options=QUICK)
decode = jax.jit(vae.decode, static_argnames=("config", "tiling"), compiler_options=QUICK)


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def golden():
    """(config, parameters, values with channels last)."""
    sizes = json.loads((GOLDEN / "config.json").read_text())["vae"]
    config = vae.VAEConfig(
        width=sizes["dim"],
        latent_channels=sizes["z_dim"],
        width_multipliers=tuple(sizes["dim_mult"]),
        num_res_blocks=sizes["num_res_blocks"],
        temporal_downsample=tuple(sizes["temporal_downsample"]),
    )
    params = load_vae(config, open_weights(GOLDEN / "vae.safetensors"))
    arrays = np.load(GOLDEN / "values.npz")
    values = {
        k[4:]: np.moveaxis(arrays[k], 1, -1) if arrays[k].ndim == 5 else arrays[k] for k in arrays if k[:4] == "vae_"
    }
    return config, params, values


def test_the_statistics_are_the_published_ones(golden):
    config, _, values = golden
    np.testing.assert_array_equal(np.float32(config.latent_mean), values["latent_mean"])
    np.testing.assert_array_equal(np.float32(config.latent_std), values["latent_std"])


def test_encode_equals_golden(golden):
    config, params, values = golden
    assert relative_error(encode(params, values["video"], config), values["latents"]) <= 1e-5


def test_encode_of_one_frame_equals_golden(golden):
    config, params, values = golden
    assert relative_error(encode(params, values["video"][:, :1], config), values["image_latents"]) <= 1e-5


def test_decode_equals_golden(golden):
    config, params, values = golden
    assert relative_error(decode(params, values["latents"], config), values["decoded"]) <= 1e-4


SMALL = vae.VAEConfig(
    width=4,
    latent_channels=2,
    width_multipliers=(1, 2, 2),
    num_res_blocks=1,
    temporal_downsample=(True, True),
    latent_mean=(0.5, -0.5),
    latent_std=(2.0, 0.5),
)
"""Frames in fours as published, but four pixels a cell and few layers: quick to compile."""


@pytest.fixture(scope="module")
def small():
    """(parameters, video of 9 frames of 16×24, its latents, what they decode to)."""
    params = jax.jit(vae.init, static_argnames="config", compiler_options=QUICK)(SMALL, jax.random.key(0))
    video = jax.random.uniform(jax.random.key(1), (2, 9, 16, 24, 3), minval=-1.0)
    latents = encode(params, video, config=SMALL)
    return params, video, latents, decode(params, latents, config=SMALL)


def test_full_size_has_the_published_number_of_parameters():
    shapes = jax.eval_shape(lambda: vae.init(vae.VAEConfig(), jax.random.key(0)))
    assert count(shapes) == 126_892_531


def test_shapes_and_factors(small):
    _, video, latents, decoded = small
    assert latents.shape == (2, 3, 4, 6, 2)
    assert decoded.shape == video.shape
    assert latents.dtype == decoded.dtype == jnp.float32
    assert (vae.VAEConfig().spatial_factor, vae.VAEConfig().temporal_factor) == (8, 4)


def test_earlier_frames_do_not_see_later_ones(small):
    params, video, latents, decoded = small
    assert relative_error(encode(params, video[:, :5], config=SMALL), latents[:, :2]) <= 1e-6
    assert relative_error(decode(params, latents[:, :2], config=SMALL), decoded[:, :5]) <= 1e-6


def test_later_frames_do_see_earlier_ones(small):
    """Without the memories between chunks the last latent frame would not change."""
    params, video, latents, decoded = small
    altered = encode(params, video.at[:, 4].set(-video[:, 4]), config=SMALL)
    assert relative_error(altered[:, 2], latents[:, 2]) > 1e-3
    altered = decode(params, latents.at[:, 1].set(-latents[:, 1]), config=SMALL)
    assert relative_error(altered[:, 5:], decoded[:, 5:]) > 1e-3
    np.testing.assert_array_equal(altered[:, :1], decoded[:, :1])


def test_samples_of_a_batch_are_independent(small):
    params, video, latents, decoded = small
    found = encode(params, video.at[0].set(0.0), config=SMALL)
    np.testing.assert_array_equal(found[1], latents[1])
    found = decode(params, latents.at[0].set(0.0), config=SMALL)
    np.testing.assert_array_equal(found[1], decoded[1])


def test_sharded_over_the_batch_equals_unsharded(small):
    params, video, latents, _ = small
    devices = jax.devices()[:2]
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    video = jax.device_put(video, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    found = encode(params, video, config=SMALL)
    assert len(found.sharding.device_set) == len(devices)
    assert found.sharding.shard_shape(found.shape)[0] == 2 // len(devices)
    assert relative_error(found, latents) <= 1e-6


def test_bfloat16_is_close_to_float32(small):
    params, video, latents, _ = small
    found = encode(params, video, config=dataclasses.replace(SMALL, compute_dtype="bfloat16"))
    assert found.dtype == jnp.float32
    assert 1e-4 < relative_error(found, latents) <= 3e-2


def test_tiles_as_large_as_the_frames_change_nothing(small):
    params, video, latents, _ = small
    np.testing.assert_array_equal(encode(params, video, config=SMALL, tiling=vae.Tiling(size=24, overlap=8)), latents)


def test_tiles_are_coded_alone_and_blended_linearly(small):
    """Frames of 16×24 pixels make two tiles of 16×16 that share columns 8 to 15."""
    params, video, latents, _ = small
    tiling = vae.Tiling(size=16, overlap=8)
    left, right = (encode(params, part, config=SMALL) for part in (video[..., :16, :], video[..., 8:, :]))
    right_weight = np.array([0.25, 0.75])[:, None]
    middle = left[..., 2:, :] * (1 - right_weight) + right[..., :2, :] * right_weight
    expected = np.concatenate([left[..., :2, :], middle, right[..., 2:, :]], axis=-2)
    found = encode(params, video, config=SMALL, tiling=tiling)
    assert relative_error(found, expected) <= 1e-6
    assert relative_error(found, latents) > 1e-3

    left, right = (decode(params, part, config=SMALL) for part in (latents[..., :4, :], latents[..., 2:, :]))
    right_weight = (np.arange(8)[:, None] + 0.5) / 8
    middle = left[..., 8:, :] * (1 - right_weight) + right[..., :8, :] * right_weight
    expected = np.concatenate([left[..., :8, :], middle, right[..., 8:, :]], axis=-2)
    assert relative_error(decode(params, latents, config=SMALL, tiling=tiling), expected) <= 1e-6


@pytest.mark.parametrize("function", ["encode", "decode"])
def test_temporary_memory_does_not_grow_with_the_frames(function):
    """What XLA counts beside arguments and results, at 480×832, for 17 and for 81 frames."""
    params = jax.eval_shape(lambda: vae.init(SMALL, jax.random.key(0)))
    sizes = []
    for frames in (17, 81):
        shape = (1, frames, 480, 832, 3) if function == "encode" else (1, (frames - 1) // 4 + 1, 120, 208, 2)
        jitted = encode if function == "encode" else decode
        compiled = jitted.lower(params, jax.ShapeDtypeStruct(shape, jnp.float32), config=SMALL).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 8, 16, 16, 3), r"8 frames; the VAE needs 4k\+1, such as 9"),
        ((1, 5, 16, 18, 3), "16x18 pixels; rows and columns must be positive multiples of 4"),
        ((1, 0, 16, 16, 3), "0 frames"),
        ((5, 16, 16, 3), r"expected \[batch, frames, rows, columns, 3\]"),
        ((1, 3, 5, 16, 16), r"expected \[batch, frames, rows, columns, 3\]"),
    ],
)
def test_encode_refuses_other_shapes(shape, message):
    with pytest.raises(ValueError, match=message):
        vae.encode({}, jnp.zeros(shape), SMALL)


@pytest.mark.parametrize("shape", [(1, 2, 4, 4, 16), (2, 4, 4, 2), (1, 0, 4, 4, 2)])
def test_decode_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"latents have shape .*; expected \[batch, frames, rows, columns, 2\]"):
        vae.decode({}, jnp.zeros(shape), SMALL)


def test_tiles_must_fit_the_cells():
    with pytest.raises(ValueError, match="must be multiples of 4"):
        vae.encode({}, jnp.zeros((1, 1, 16, 16, 3)), SMALL, vae.Tiling(size=18, overlap=4))
    with pytest.raises(ValueError, match="overlap is 64"):
        vae.Tiling(size=64, overlap=64)


@pytest.mark.parametrize(
    "change",
    [
        {"width": 3},
        {"num_res_blocks": 0},
        {"width_multipliers": ()},
        {"temporal_downsample": (True,)},
        {"latent_mean": (0.0,)},
        {"latent_std": (0.0,) * 16},
        {"compute_dtype": "float16"},
    ],
)
def test_config_refuses_wrong_values(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        vae.VAEConfig(**change)
