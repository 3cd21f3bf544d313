"""One video from the command line: golden values, what the file says of itself, memory, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from support import tiny
from support.footage import photograph

from refalign_jax.command import load
from refalign_jax.config import WAN_NEGATIVE_PROMPT, GenerateConfig, ModelConfig, SamplingConfig
from refalign_jax.convert.checkpoint import save_params
from refalign_jax.convert.transfer import export_weights
from refalign_jax.data.images import read_image
from refalign_jax.data.records import Reference
from refalign_jax.data.video import probe, read_comment, read_frames
from refalign_jax.inference import generate as generate_module
from refalign_jax.inference.draw import embed, references_of
from refalign_jax.inference.generate import generate_one
from refalign_jax.inference.opening import open_generator, read_sigmas
from refalign_jax.inference.requests import Request

MODEL = ModelConfig(dit=dataclasses.replace(tiny.DIT, num_heads=1, latent_channels=4), alignment=tiny.MODEL.alignment)
SIZE = ["--height", "32", "--width", "48", "--num-frames", "5", "--num-steps", "2"]
STAND_INS = ["--vae", "dct", "--text-encoder", "words"]


def sample(*arguments):
    load("sample")([str(argument) for argument in arguments], "sample")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_params(folder / "checkpoint", tiny.params(MODEL), MODEL)
    export_weights(folder / "checkpoint", folder / "refalign.safetensors")
    return folder / "refalign.safetensors"


@pytest.fixture
def pictures(tmp_path):
    for name in ("cat", "coffee"):
        Image.fromarray(photograph(name)).save(tmp_path / f"{name}.png")
    return tmp_path / "cat.png", tmp_path / "coffee.png"


def test_golden_sampling(golden, tmp_path):
    """The latents that the published code sampled, with three branches of guidance."""
    values = np.load(golden / "dit_a" / "values.npz")
    shutil.copy(golden / "dit_a" / "weights.safetensors", tmp_path / "refalign.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": 2}))
    save_file({"noise": values["sample_noise"]}, tmp_path / "noise.safetensors")
    given = {"prompt": values["text"], "negative": values["negative_text"], "references": values["reference_latents"]}
    save_file(given, tmp_path / "embeddings.safetensors")
    _, _, F, H, W = values["sample_noise"].shape
    options = ["--vae", "dct", "--height", 8 * H, "--width", 8 * W, "--num-frames", 4 * F - 3, "--num-steps", 8]
    options += ["--noise", tmp_path / "noise.safetensors", "--embeddings", tmp_path / "embeddings.safetensors"]
    options += ["--dtype", "float32", "--save", "latents", "--prompt", "", "--out", tmp_path / "golden.mp4"]
    sample("--weights", tmp_path / "refalign.safetensors", *options)
    found = load_file(tmp_path / "golden-latents.safetensors")["latents"]
    assert tiny.relative(found, values["sample_latents"][0]) <= 1e-5


def test_the_file_says_how_it_was_made_and_is_the_same_whatever_its_name(weights, pictures, tmp_path, capsys):
    cat, coffee = pictures
    common = ["--weights", weights, "--prompt", "Both of “them”.", "--reference", cat, "--reference", coffee]
    common += [*SIZE, *STAND_INS, "--seed", "7"]
    first, second = tmp_path / "a.mp4", tmp_path / "b.mp4"
    sample(*common, "--out", first, "--show-references", "--save", "pixels")
    assert "cat.png and 1 other references have a background" in capsys.readouterr().out
    sample(*common, "--out", second, "--batch-size", "3", "--keep-loaded")
    assert first.read_bytes() == second.read_bytes()
    assert probe(first).num_frames == 5
    about, beside = json.loads(read_comment(first)), json.loads((tmp_path / "a.json").read_text())
    assert about["prompt"] == beside["prompt"] == "Both of “them”."
    assert about["made"]["seed"] == 7
    assert about["made"]["sampling"]["num_steps"] == 2
    assert about["made"]["digests"] == beside["made"]["digests"]
    assert set(about["made"]["digests"]) == {"weights"}
    assert str(tmp_path) not in read_comment(first)
    assert beside["references"][1]["source"] == str(coffee)
    assert [read_image(tmp_path / f"a-reference-{i}.png").shape for i in range(2)] == [(32, 48, 3)] * 2
    assert not list(tmp_path.glob("b-*"))
    pixels = load_file(tmp_path / "a-pixels.safetensors")["pixels"]
    shown = read_frames(first, range(5))
    assert pixels.shape == (5, 32, 48, 3)
    assert np.abs((pixels.clip(-1, 1) + 1) * 127.5 - shown).mean() < 20
    sample(*common[:-1], "8", "--out", second)
    assert first.read_bytes() != second.read_bytes()


def test_without_references_there_are_two_branches_and_no_blank_reference(weights, tmp_path, monkeypatch):
    seen, denoise = [], generate_module.denoise

    def watched(params, inputs, **settings):
        seen.append(inputs)
        return denoise(params, inputs, **settings)

    monkeypatch.setattr(generate_module, "denoise", watched)
    sample("--weights", weights, "--prompt", "A cat.", "--out", tmp_path / "a.mp4", *SIZE, *STAND_INS)
    assert [inputs.references for inputs in seen] == [None]


def test_one_network_is_in_memory_at_a_time(weights, pictures, tmp_path):
    """Read in the order text encoder, VAE, transformer, VAE; no two of them are there at once."""
    generator = open_generator(str(weights), SMALL)
    log, others, transformer = [], {}, generator.transformer
    codec, text = Watched(generator.codec, "codec", log, others), Watched(generator.text, "text", log, others)
    generator = dataclasses.replace(generator, codec=codec, text=text)
    others |= {"codec": lambda: codec.loaded, "text": lambda: text.loaded}
    others["transformer"] = lambda: transformer.is_loaded
    request = Request(id="0001", prompt="A cat.", references=(Reference(path=pictures[0]),))
    generate_one(request, tmp_path / "a.mp4", generator)
    assert log == ["text", "codec", "codec"]
    assert [codec.loaded, text.loaded, transformer.is_loaded] == [False] * 3
    kept = dataclasses.replace(generator, generate=dataclasses.replace(generator.generate, keep_loaded=True))
    others.clear()
    generate_one(request, tmp_path / "a.mp4", kept)
    assert transformer.is_loaded


SMALL = GenerateConfig(vae="dct", text_encoder="words", height=32, width=48, num_frames=5, num_steps=2)


class Watched:
    """An encoder that notes when it is loaded, and that no other is then."""

    def __init__(self, encoder, name, log, others):
        self._encoder, self._name, self.loaded = encoder, name, False
        self._log, self._others = log, others

    def __getattr__(self, name):
        if name in ("encode", "decode"):
            if not self.loaded:
                self._log.append(self._name)
                there = [other for other, loaded in self._others.items() if other != self._name and loaded()]
                assert not there, f"{there} when {self._name} is read"
            self.loaded = True
        return getattr(self._encoder, name)

    def release(self):
        self.loaded = False


def test_wans_negative_prompt_is_the_default(weights):
    generator = open_generator(str(weights), SMALL)
    assert generator.generate.negative_prompt == ""  # for the stand-in
    assert "三条腿" in WAN_NEGATIVE_PROMPT
    assert WAN_NEGATIVE_PROMPT.endswith("倒着走")
    assert (len(WAN_NEGATIVE_PROMPT), WAN_NEGATIVE_PROMPT.count("\uff0c")) == (137, 27)


def test_embeddings_take_the_place_of_the_encoder(weights, tmp_path):
    width, rng = MODEL.dit.text_width, np.random.default_rng(0)
    file = tmp_path / "e.safetensors"
    prompt, negative = rng.standard_normal((3, width), np.float32), rng.standard_normal((1, 5, width), np.float32)
    save_file({"walk.prompt": prompt, "negative": negative, "prompt": 0 * prompt}, file)
    config = dataclasses.replace(SMALL, text_encoder=None, embeddings=str(file))
    generator = open_generator(str(weights), config)
    found = embed([Request(id="walk", prompt="x"), Request(id="other", prompt="y")], generator)
    np.testing.assert_array_equal(found["walk"][0], np.pad(prompt, ((0, 2), (0, 0))))
    np.testing.assert_array_equal(found["walk"][1], negative[0])
    assert not found["other"][0].any()
    assert references_of(Request(id="walk", prompt="x"), np.zeros((0, 32, 48, 3), np.uint8), generator) is None
    save_file({"prompt": prompt}, file)
    with pytest.raises(ValueError, match="holds no embedding `negative` of the negative prompt"):
        embed([Request(id="walk", prompt="x")], open_generator(str(weights), config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "x", "--weights", "w"], "No --out is named"),
        (["--prompt", "x", "--out", "a.mp4"], "No --weights is named"),
        (["a", "b"], "2 places are named; give WEIGHTS PROMPTS OUT"),
        (["a", "b", "c", "--out", "d"], "named twice"),
        (["--weights", "w", "--out", "a.mp4"], "Nothing to draw is given; give one of --prompt"),
        (["a", "b", "c", "--prompt", "x"], "--prompt and --prompts are given"),
        (["a", "b", "c", "--reference", "x.png"], "belong to --prompt"),
        (["a", "b", "c", "--images", "x"], "--images belongs to --eval"),
        (["--weights", "WEIGHTS", "--prompt", "x", "--out", "a.avi"], "--out a.avi must end in .mp4"),
        (["--weights", "WEIGHTS", "--prompt", "x", "--out", "none/a.mp4"], "is in none, which is no folder"),
        (["--weights", "WEIGHTS", "--prompt", "x", "--out", "a.mp4", "--reference", "n.png"], "n.png does not exist"),
        (
            ["--weights", "WEIGHTS", "--prompt", "x", "--out", "a.mp4", "--noise", "n"],
            "n does not exist; expected a safe",
        ),
        (
            ["--weights", "WEIGHTS", "--prompt", "x", "--out", "a.mp4", "--sigmas", "n"],
            "neither a table .refalign, wan",
        ),
        (["--weights", "WEIGHTS", "--prompt", "x", "--out", "a.mp4", "--lora", "n"], "n does not exist"),
    ],
)
def test_what_makes_no_sense(weights, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    options = [str(weights) if option == "WEIGHTS" else option for option in options]
    with pytest.raises(ValueError, match=message):
        sample(*options, *SIZE, *STAND_INS)
    assert not list(tmp_path.iterdir())


def test_noise_of_another_shape(weights, tmp_path):
    save_file({"noise": np.zeros((4, 2, 4, 5), np.float32)}, tmp_path / "n.safetensors")
    with pytest.raises(ValueError, match=r"noise is \[4, 2, 4, 5\]; it must be \[4, 2, 4, 6\]"):
        sample(
            *("--weights", weights, "--prompt", "x", "--out", tmp_path / "a.mp4"),
            *("--noise", tmp_path / "n.safetensors", *SIZE, *STAND_INS),
        )
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1.0, 0.5, 0.7]", "must descend"),
        ("[2, 1]", "at most 1"),
        ("[]", "lists no noise level"),
        ("[0]", "lists no noise level"),
        ("{}", "lists no noise level"),
        ('["a"]', "is no JSON list of noise levels"),
        ("[1, NaN]", "sigma_values"),
        ("3", "is no JSON list of noise levels"),
        ("[[1]]", "is no JSON list of noise levels"),
    ],
)
def test_noise_levels_that_make_no_sense(tmp_path, text, message):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_sigmas(str(tmp_path / "s.json"))


def test_noise_levels_of_a_file_decide_the_steps(weights, tmp_path):
    (tmp_path / "s.json").write_text("[1.0, 0.9375, 0.8333, 0.625, 0]")
    config = dataclasses.replace(SMALL, num_steps=None, sigmas=str(tmp_path / "s.json"))
    sampling = open_generator(str(weights), config).config.sampling
    assert (sampling.num_steps, sampling.sigma_values) == (4, (1.0, 0.9375, 0.8333, 0.625))
    with pytest.raises(ValueError, match="lists 4 noise levels, but --num-steps is 2"):
        open_generator(str(weights), dataclasses.replace(config, num_steps=2))


def test_phantom_is_sampled_as_it_publishes(weights):
    generator = open_generator(str(weights), dataclasses.replace(SMALL, num_steps=None, phantom=True))
    assert generator.config.model.dit.reference_cross_attention
    assert generator.config.sampling == SamplingConfig(solver="unipc", sigmas="wan", integer_timesteps=True)
