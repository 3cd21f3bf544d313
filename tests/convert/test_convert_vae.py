"""The table of the VAE's weights: published names, shapes, both directions, strictness."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from refalign_jax.convert.files import open_weights
from refalign_jax.convert.table import published_shapes, to_ours, to_published
from refalign_jax.convert.vae import vae_table
from refalign_jax.convert.write import write_weights
from refalign_jax.models import vae
from refalign_jax.trees import flatten

TESTS = Path(__file__).parents[1]
NARROW = vae.VAEConfig(width=4)


def shapes_of(config):
    return jax.eval_shape(lambda: vae.init(config, jax.random.key(0)))


@dataclasses.dataclass
class Given:
    """Tensors in memory as a weight file would give them."""

    tensors: dict
    source: str = "given"

    @property
    def shapes(self):
        return {name: value.shape for name, value in self.tensors.items()}

    def read(self, name):
        return self.tensors[name]


@pytest.fixture(scope="module")
def params():
    """Numbers that tell every element from every other."""
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), shapes_of(NARROW))


def test_names_and_shapes_are_those_of_the_published_checkpoint():
    manifest = json.loads((TESTS / "golden" / "manifests" / "wan2.1_vae.json").read_text())
    config = vae.VAEConfig()
    assert published_shapes(vae_table(config), shapes_of(config)) == {k: tuple(v) for k, v in manifest.items()}


def test_the_golden_file_comes_back_byte_for_byte(tmp_path):
    weights = open_weights(TESTS / "golden" / "encoders_a" / "vae.safetensors")
    table = vae_table(NARROW)
    exported = dict(to_published(table, to_ours(table, shapes_of(NARROW), weights)))
    assert exported.keys() == weights.shapes.keys()
    for name, value in exported.items():
        assert value.tobytes() == weights.read(name).tobytes(), name


@pytest.mark.parametrize("names", ["wan", "diffusers"])
def test_round_trip_through_a_file(tmp_path, params, names):
    table = vae_table(NARROW, names)
    exported = dict(to_published(table, params))
    dtypes = {name: value.dtype for name, value in exported.items()}
    shapes = published_shapes(table, shapes_of(NARROW))
    write_weights(tmp_path / "vae.safetensors", ((name, exported[name]) for name in shapes), shapes, dtypes)
    returned = to_ours(table, shapes_of(NARROW), open_weights(tmp_path / "vae.safetensors"))
    for (path, found), expected in zip(
        flatten(returned).items(), map(flatten(params).get, flatten(returned)), strict=True
    ):
        np.testing.assert_array_equal(found, expected, err_msg=path)


def test_both_names_hold_the_same_tensors(params):
    wan, diffusers = vae_table(NARROW), vae_table(NARROW, "diffusers")
    by_path = {entry.path: entry.name for entry in diffusers}
    exported = dict(to_published(diffusers, params))
    for entry, (name, value) in zip(wan, to_published(wan, params), strict=True):
        assert name == entry.name
        np.testing.assert_array_equal(value, exported[by_path[entry.path]])


def test_a_missing_extra_or_misshapen_tensor_is_named(params):
    tensors = dict(to_published(vae_table(NARROW), params))
    tensors["surplus"] = tensors.pop("encoder.conv1.bias")
    tensors["decoder.head.0.gamma"] = tensors["decoder.head.0.gamma"][:2]
    with pytest.raises(ValueError, match=r"1 missing: encoder\.conv1\.bias \[4\].*unexpected: surplus \[4\].*head\.0"):
        to_ours(vae_table(NARROW), shapes_of(NARROW), Given(tensors))


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="names is 'keras'"):
        vae_table(NARROW, "keras")
