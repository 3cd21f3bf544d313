"""The VAE against golden values of the published code, and its properties."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from refalign_jax.convert.files import open_weights
from refalign_jax.convert.table import to_ours
from refalign_jax.convert.vae import vae_table
from refalign_jax.models import vae

GOLDEN = Path(__file__).parents[1] / "golden" / "encoders_a"
NARROW = vae.VAEConfig(width=4)


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
    shapes = jax.eval_shape(lambda: vae.init(jax.random.key(0), config))
    params = to_ours(vae_table(config), shapes, open_weights(GOLDEN / "vae.safetensors"))
    arrays = np.load(GOLDEN / "values.npz")
    values = {
        k[4:]: np.moveaxis(arrays[k], 1, -1) if arrays[k].ndim == 5 else arrays[k] for k in arrays if k[:4] == "vae_"
    }
    return config, params, values


@pytest.fixture(scope="module")
def encode():
    return jax.jit(vae.encode, static_argnames=("config", "tiling"))


@pytest.fixture(scope="module")
def decode():
    return jax.jit(vae.decode, static_argnames=("config", "tiling"))


def test_the_statistics_are_the_published_ones(golden):
    config, _, values = golden
    np.testing.assert_array_equal(np.float32(config.latent_mean), values["latent_mean"])
    np.testing.assert_array_equal(np.float32(config.latent_std), values["latent_std"])


def test_encode_equals_golden(golden, encode):
    config, params, values = golden
    assert relative_error(encode(params, values["video"], config), values["latents"]) <= 1e-5


def test_encode_of_one_frame_equals_golden(golden, encode):
    config, params, values = golden
    assert relative_error(encode(params, values["video"][:, :1], config), values["image_latents"]) <= 1e-5


def test_decode_equals_golden(golden, decode):
    config, params, values = golden
    assert relative_error(decode(params, values["latents"], config), values["decoded"]) <= 1e-4
