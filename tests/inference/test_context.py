"""One video over several devices: its tokens over the context axis, and parameters over it and over fsdp."""

import dataclasses

import jax
import pytest
from PIL import Image
from safetensors.numpy import load_file
from support import tiny
from support.footage import photograph

from refalign_jax.config import GenerateConfig, MeshConfig, ModelConfig
from refalign_jax.convert.checkpoint import save_params
from refalign_jax.data.records import Reference
from refalign_jax.inference.generate import generate_one
from refalign_jax.inference.opening import open_generator
from refalign_jax.inference.requests import Request
from refalign_jax.sharding import make_mesh

DIT = dataclasses.replace(tiny.DIT, num_layers=2, latent_channels=4)
MODEL = ModelConfig(dit=DIT, alignment=tiny.MODEL.alignment)
# Nine video tokens and three of the reference: odd numbers, so that padding is needed.
SMALL = GenerateConfig(
    vae="dct", text_encoder="words", height=16, width=48, num_frames=9, num_steps=2, save="latents", keep_loaded=True
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A function that draws the same video with some settings, and returns its generator and latents."""
    folder = tmp_path_factory.mktemp("context")
    save_params(folder / "weights", tiny.params(MODEL), MODEL)
    Image.fromarray(photograph("cat")).save(folder / "cat.png")
    request = Request(id="cat", prompt="A cat.", references=(Reference(path=folder / "cat.png"),))

    def draw(mesh=None, **settings):
        generator = open_generator(str(folder / "weights"), dataclasses.replace(SMALL, **settings))
        if mesh is not None:
            params = jax.device_get(generator.transformer())
            generator = dataclasses.replace(generator, transformer=Whole(params), mesh=mesh)
        generate_one(request, folder / "cat.mp4", generator)
        return generator, load_file(folder / "cat-latents.safetensors")["latents"]

    return draw


class Whole:
    """Parameters that are on no mesh."""

    def __init__(self, params):
        self._params = params

    def __call__(self):
        return self._params

    def release(self):
        pass


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [("float32", {"fsdp": 2}), ("int8", {"batched_guidance": True})],
    ids=["float32-fsdp", "int8-branches"],
)
def test_one_video_over_several_devices_is_that_of_one(drawn, dtype, settings):
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    alone = drawn(one, weights_dtype=dtype, batched_guidance=True)[1]
    generator, latents = drawn(weights_dtype=dtype, context=2, **settings)
    assert tiny.relative(latents, alone) <= 1e-5
    fsdp = settings.get("fsdp", 1)
    assert dict(generator.mesh.shape) == {"data": 4 // fsdp, "fsdp": fsdp, "context": 2, "ring": 1, "tensor": 1}
    kernel = generator.transformer()["blocks"]["ffn"]["in"]["kernel"]
    kernel = kernel.values if dtype == "int8" else kernel
    assert kernel.dtype == dtype
    assert kernel.sharding.shard_shape(kernel.shape)[1] == DIT.width // (2 * fsdp)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"context": 3}, r"--fsdp 1 times --context 3 is 3; it must divide the number of this process's devices, 8\."),
        ({"context": 4, "fsdp": 4}, "--fsdp 4 times --context 4 is 16; it must divide"),
        ({"context": 4}, r"--context 4 must divide the transformer's 2 heads\."),
    ],
    ids=["devices", "devices-fsdp", "heads"],
)
def test_what_can_not_be_split_is_one_sentence(drawn, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        drawn(**settings)
    with pytest.raises(ValueError, match="context=0 must be"):
        dataclasses.replace(SMALL, context=0)
