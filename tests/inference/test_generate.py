"""Sampling by prompts and reference images: from checkpoints and published weights, with their encoders."""

import dataclasses
import json
import os

import numpy as np
import pytest
from PIL import Image
from support import tiny
from support.footage import photograph, write_records

from refalign_jax.config import ExportConfig, GenerateConfig, ModelConfig, PrepareConfig
from refalign_jax.convert.checkpoint import save_params
from refalign_jax.convert.transfer import export_weights
from refalign_jax.data.images import read_image
from refalign_jax.data.prepare import prepare
from refalign_jax.data.sources.jsonl import read_jsonl
from refalign_jax.data.video import probe, read_frames
from refalign_jax.inference.generate import generate
from refalign_jax.inference.opening import open_generator
from refalign_jax.inference.outputs import read_samples
from refalign_jax.inference.requests import read_requests

MODEL = ModelConfig(
    dit=dataclasses.replace(tiny.DIT, latent_channels=4, rope_theta=500.0), alignment=tiny.MODEL.alignment
)
SMALL = GenerateConfig(
    vae="dct", text_encoder="words", height=32, width=48, num_frames=5, num_steps=2, fps=8.0, batch_size=2
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of a tiny model whose widths the stand-ins' defaults don't have."""
    folder = tmp_path_factory.mktemp("weights") / "checkpoint"
    save_params(folder, tiny.params(MODEL), MODEL)
    return folder


@pytest.fixture
def prompts(tmp_path):
    for name in ("cat", "coffee"):
        Image.fromarray(photograph(name)).save(tmp_path / f"{name}.png")
    lines = [
        {"id": "one", "prompt": "A cat.", "references": [{"image": "cat.png", "subject": "cat"}]},
        {"id": "two", "prompt": "Both.", "references": [{"image": "cat.png"}, {"image": "coffee.png"}]},
        {"prompt": "Nothing but words."},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_videos_references_and_what_is_told_of_them(weights, prompts, tmp_path):
    out = tmp_path / "out"
    entries = generate(read_requests(prompts), out, open_generator(str(weights), SMALL))
    assert entries == read_samples(out)
    assert [entry["id"] for entry in entries] == ["one", "two", "0003"]
    assert [len(entry["references"]) for entry in entries] == [1, 2, 0]
    assert entries[0]["prompt"] == "A cat."
    assert entries[0]["references"][0]["subject"] == "cat"
    assert "subject" not in entries[1]["references"][0]
    for entry in entries:
        assert probe(out / entry["video"]).num_frames == 5
        assert read_frames(out / entry["video"], [0]).shape == (1, 32, 48, 3)
        assert entry["made"]["sampling"]["num_steps"] == 2
        for reference in entry["references"]:
            image = read_image(out / reference["image"])
            assert image.shape == (32, 48, 3)
            assert (image[:, :2] == 255).all()  # the photograph is 4:3, so white is left at both sides
            assert image[:, 20:28].mean() < 250


def test_a_video_does_not_depend_on_its_neighbours_and_is_not_made_twice(weights, prompts, tmp_path):
    requests, generator = read_requests(prompts), open_generator(str(weights), SMALL)
    together, apart = tmp_path / "a", tmp_path / "b"
    generate(requests, together, generator)
    generate(requests[1:2], apart, generator)
    ours, theirs = (read_frames(folder / "two.mp4", range(5)) for folder in (together, apart))
    np.testing.assert_array_equal(ours, theirs)
    assert (ours != read_frames(together / "one.mp4", range(5))).any()

    (together / "two.mp4").unlink()
    os.utime(together / "one.mp4", (1, 1))
    changed = [*requests[:2], dataclasses.replace(requests[2], prompt="Other words.")]
    before = (together / "0003.mp4").read_bytes()
    generate(changed, together, generator)
    assert (together / "one.mp4").stat().st_mtime == 1  # kept
    np.testing.assert_array_equal(read_frames(together / "two.mp4", range(5)), theirs)
    assert (together / "0003.mp4").read_bytes() != before
    other = dataclasses.replace(generator, generate=dataclasses.replace(generator.generate, seed=1))
    generate(requests[1:2], apart, other)
    assert (read_frames(apart / "two.mp4", range(5)) != theirs).any()


def test_published_weights_sample_as_their_checkpoint(weights, prompts, tmp_path):
    file = tmp_path / "refalign.safetensors"
    export_weights(weights, file, ExportConfig(projectors=True))
    requests = read_requests(prompts)[:2]
    drawn = []
    for source in (weights, file):
        out = tmp_path / f"from {source.name}"
        generator = open_generator(str(source), SMALL)
        generate(requests, out, generator)
        drawn.append(np.stack([read_frames(out / f"{request.id}.mp4", range(5)) for request in requests]))
    np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": None}, "No --vae is named, and no dataset names it"),
        ({"text_encoder": None}, "No --text-encoder is named"),
        ({"height": 40}, "The height is 40; it must be a multiple of 16 pixels"),
        ({"dataset": "nowhere", "vae": None}, "nowhere"),
        ({"ema": True}, "no moving average"),
    ],
)
def test_settings_that_do_not_fit(weights, changes, message):
    with pytest.raises(ValueError, match=message):
        open_generator(str(weights), dataclasses.replace(SMALL, **changes))


def test_weights_that_are_none(tmp_path):
    for name, message in (
        ("", "No weights are named"),
        (str(tmp_path), "is no checkpoint"),
        ("gone", "does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            open_generator(name, SMALL)


@pytest.mark.parametrize(
    ("prepared", "asked", "expected"), [({"fps": 12.0}, 0.0, 12), ({"stride": 2}, 0.0, 4), ({"fps": 12.0}, 24.0, 24)]
)
def test_the_frame_rate_is_the_datasets(weights, tmp_path, prepared, asked, expected):
    settings = {"height": 32, "width": 48, "num_frames": 5, "dct_channels": 4, "word_width": MODEL.dit.text_width}
    config = PrepareConfig(vae="dct", text_encoder="words", vfm="daisy", **settings, **prepared)
    prepare(read_jsonl(write_records(tmp_path)), tmp_path / "d", config, {})
    config = dataclasses.replace(SMALL, vae=None, fps=asked, dataset=str(tmp_path / "d"))
    generator = open_generator(str(weights), config)
    assert (generator.generate.fps, generator.made["fps"]) == (expected, expected)


def test_without_a_dataset_the_frame_rate_is_wans(weights):
    assert open_generator(str(weights), dataclasses.replace(SMALL, fps=0.0)).generate.fps == 16


def test_a_reference_that_is_gone_is_named(weights, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "A cat.", "references": [{"image": "gone.png"}]}\n')
    with pytest.raises(ValueError, match=r"gone\.png does not exist"):
        generate(read_requests(path), tmp_path / "out", open_generator(str(weights), SMALL))
    assert not list((tmp_path / "out").glob("*.mp4"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_frames": 6}, r"num_frames=6 must be 4k\+1"),
        ({"fps": -1}, "fps=-1 must be at least 0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"save": "latents,video"}, "save='latents,video' has 'video'; known are latents, pixels"),
        ({"lora_scale": (1.0,)}, "lora_scale has 1 numbers for 0 adapters"),
        ({"part": (3, 2)}, r"part=\(3, 2\) must be two numbers"),
    ],
)
def test_numbers_that_make_no_video(values, message):
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**values)
