"""The full-size VAE (127 M parameters, random) against diffusers' AutoencoderKLWan, and torch's own checkpoints."""

import dataclasses

import jax
import numpy as np
import pytest

from refalign_jax.convert.pickle_files import open_pickle_weights
from refalign_jax.convert.table import to_ours, to_published
from refalign_jax.convert.vae import vae_table
from refalign_jax.encoders.wan_vae import load_vae
from refalign_jax.models import vae
from refalign_jax.trees import count, flatten

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CONFIG = vae.VAEConfig()
SHAPES = jax.eval_shape(lambda: vae.init(CONFIG, jax.random.key(0)))


@dataclasses.dataclass
class StateDict:
    """Tensors of a torch module as a weight file would give them."""

    tensors: dict
    source: str = "state dict"

    @property
    def shapes(self):
        return {name: tuple(value.shape) for name, value in self.tensors.items()}

    @property
    def dtypes(self):
        return {name: value.numpy().dtype for name, value in self.tensors.items()}

    def read(self, name):
        return self.tensors[name].numpy()


def relative_error(found, expected):
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def to_torch(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def from_torch(x):
    return np.moveaxis(x.numpy(), 1, -1)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def params(theirs):
    return load_vae(CONFIG, StateDict(theirs.state_dict()))


def test_size(params):
    assert count(params) == 126_892_531


def test_encode_and_decode_equal_diffusers(theirs, params):
    """Three chunks of 48×64 pixels, both ways; their latents are not normalised."""
    video = np.random.default_rng(0).uniform(-1, 1, (1, 9, 48, 64, 3)).astype(np.float32)
    mean, std = np.float32(CONFIG.latent_mean), np.float32(CONFIG.latent_std)
    latents = (from_torch(theirs.encode(to_torch(video)).latent_dist.mode()) - mean) / std
    found = np.asarray(jax.jit(vae.encode, static_argnames="config")(params, video, config=CONFIG))
    assert relative_error(found, latents) <= 1e-4

    decoded = from_torch(theirs.decode(to_torch(latents * std + mean)).sample)
    found = np.asarray(jax.jit(vae.decode, static_argnames="config")(params, latents, config=CONFIG))
    assert relative_error(found.clip(-1, 1), decoded) <= 1e-4  # diffusers clips, Wan's decoder does not


def test_published_names_are_what_diffusers_converts_from(params):
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    published = {name: torch.from_numpy(value) for name, value in to_published(vae_table(CONFIG, "wan"), params)}
    converted = convert_wan_vae_to_diffusers(published)
    ours = dict(to_published(vae_table(CONFIG, "diffusers"), params))
    assert converted.keys() == ours.keys()
    for name, value in ours.items():
        assert np.array_equal(converted[name].numpy(), value), name


def test_exported_weights_load_strictly_in_diffusers(theirs, params):
    state = {name: torch.from_numpy(value) for name, value in to_published(vae_table(CONFIG, "diffusers"), params)}
    diffusers.AutoencoderKLWan().load_state_dict(state, strict=True)


def test_reads_a_checkpoint_that_torch_saved(tmp_path, params):
    state = {name: torch.from_numpy(value) for name, value in to_published(vae_table(CONFIG), params)}
    torch.save(state, tmp_path / "Wan2.1_VAE.pth")
    returned = to_ours(vae_table(CONFIG), SHAPES, open_pickle_weights(tmp_path / "Wan2.1_VAE.pth"))
    for path, value in flatten(returned).items():
        assert np.array_equal(value, flatten(params)[path]), path


def test_reads_every_kind_of_tensor_that_torch_saves(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "view": base[1:, ::2],
        "transposed": base.T,
        "expanded": torch.ones(3, 1).expand(3, 4),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "bfloat16": torch.linspace(-2, 2, 7).bfloat16(),
        "half": torch.linspace(-2, 2, 7).half(),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }
    module = torch.nn.Linear(3, 2)
    torch.save({"model": tensors | dict(module.state_dict()), "step": 3}, tmp_path / "a.pt")
    weights = open_pickle_weights(tmp_path / "a.pt")
    for name, value in (tensors | dict(module.state_dict())).items():
        np.testing.assert_array_equal(weights.read(name).astype(np.float32), value.float().numpy(), err_msg=name)
    torch.save(module.state_dict(), tmp_path / "b.pt")
    assert dict(open_pickle_weights(tmp_path / "b.pt").shapes) == {"weight": (2, 3), "bias": (2,)}


def test_refuses_what_torch_saves_beside_tensors(tmp_path):
    torch.save(torch.nn.Linear(3, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"names torch\.nn\.modules\.linear\.Linear"):
        open_pickle_weights(tmp_path / "module.pt")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_reads_both_formats_of_torch(tmp_path, new, protocol):
    base = torch.arange(24.0)
    tensors = {
        "whole": base.reshape(4, 6),
        "column": base.reshape(4, 6)[:, 2],
        "half": torch.linspace(-2, 2, 7).bfloat16(),
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }
    module = torch.nn.BatchNorm2d(3)
    content = {"state_dict": tensors | dict(module.state_dict()), "other": {"step": torch.tensor(7)}}
    torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    weights = open_pickle_weights(tmp_path / "a.pt")
    assert set(weights.shapes) == set(content["state_dict"])
    for name, value in content["state_dict"].items():
        found = weights.read(name)
        np.testing.assert_array_equal(found.astype(np.float32), value.detach().float().numpy(), err_msg=name)
    torch.save(module.state_dict(), tmp_path / "b.pt", _use_new_zipfile_serialization=new)
    assert set(open_pickle_weights(tmp_path / "b.pt").shapes) == set(module.state_dict())


def test_reads_float8_of_torch(tmp_path):
    value = torch.linspace(-3, 3, 8).to(torch.float8_e4m3fn)
    torch.save({"w": value.reshape(2, 4)}, tmp_path / "a.pt")
    found = open_pickle_weights(tmp_path / "a.pt").read("w")
    np.testing.assert_array_equal(found.astype(np.float32), value.float().numpy().reshape(2, 4))
