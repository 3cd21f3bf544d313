"""A sampled video belongs to its inputs: what is kept, what is made again and why, and what is left of a failure."""

import dataclasses
import json
import os
import resource
import shutil
import signal

import jax
import numpy as np
import pytest
from PIL import Image
from support import tiny
from support.footage import photograph

from refalign_jax.config import GenerateConfig, ModelConfig
from refalign_jax.convert.checkpoint import save_params
from refalign_jax.inference import generate as generate_module
from refalign_jax.inference.generate import generate
from refalign_jax.inference.opening import open_generator
from refalign_jax.inference.outputs import read_samples
from refalign_jax.inference.requests import read_requests
from refalign_jax.locks import exclusive

MODEL = ModelConfig(dit=dataclasses.replace(tiny.DIT, num_heads=1, latent_channels=4), alignment=tiny.MODEL.alignment)
SMALL = GenerateConfig(
    vae="dct", text_encoder="words", height=32, width=48, num_frames=5, num_steps=1, fps=8.0, batch_size=2
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "checkpoint"
    save_params(folder, tiny.params(MODEL), MODEL)
    return folder


@pytest.fixture(scope="module")
def generator(weights):
    return open_generator(str(weights), SMALL)


@pytest.fixture
def prompts(tmp_path):
    for name in ("cat", "coffee"):
        Image.fromarray(photograph(name)).save(tmp_path / f"{name}.png")
    Image.fromarray(np.full((96, 128), 255, np.uint8)).save(tmp_path / "mask.png")
    return write(
        tmp_path / "prompts.jsonl",
        {"id": "one", "prompt": "A cat.", "references": [{"image": "cat.png", "mask": "mask.png"}]},
        {"id": "two", "prompt": "Coffee.", "references": [{"image": "coffee.png"}, {"image": "cat.png"}]},
        {"id": "three", "prompt": "Words."},
    )


def write(path, *lines):
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def other_image(folder, out):
    Image.fromarray(photograph("astronaut")).save(folder / "coffee.png")


def other_mask(folder, out):
    mask = np.zeros((96, 128), np.uint8)
    mask[20:60, 20:90] = 255
    Image.fromarray(mask).save(folder / "mask.png")


def emptied(folder, out):
    (out / "two.mp4").write_bytes(b"")


def edited(folder, out):
    (out / "two.mp4").write_bytes((out / "two.mp4").read_bytes()[:-1] + b"x")


def missing_reference(folder, out):
    (out / "one-reference-0.png").unlink()


@pytest.mark.parametrize(
    ("change", "made", "reason"),
    [
        (other_image, ["two"], "1 again (other references)"),
        (other_mask, ["one"], "1 again (other references)"),
        (emptied, ["two"], "1 again (its files were changed)"),
        (edited, ["two"], "1 again (its files were changed)"),
        (missing_reference, ["one"], "1 again (its files are missing)"),
    ],
)
def test_what_changed_is_made_again_and_the_rest_is_kept(generator, prompts, tmp_path, capsys, change, made, reason):
    out = tmp_path / "out"
    generate(read_requests(prompts), out, generator)
    change(tmp_path, out)
    for entry in read_samples(out):
        os.utime(out / entry["video"], (1, 1))
    capsys.readouterr()
    generate(read_requests(prompts), out, generator)
    assert capsys.readouterr().out.splitlines()[0] == f"2 of 3 videos are kept; to be made: {reason}."
    entries = read_samples(out)
    assert [entry["id"] for entry in entries if (out / entry["video"]).stat().st_mtime > 1] == made
    generate(read_requests(prompts), tmp_path / "fresh", generator)
    for entry in entries:
        assert (out / entry["video"]).read_bytes() == (tmp_path / "fresh" / entry["video"]).read_bytes()
    generate(read_requests(prompts), out, generator)
    assert capsys.readouterr().out.endswith("All 3 videos are there, made of the same inputs; they are kept.\n")


def test_other_settings_and_other_weights_make_all_again_and_moved_ones_do_not(weights, prompts, tmp_path, capsys):
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(weights, copy)
    requests = read_requests(prompts)[2:]

    def reason(place, **changes):
        generate(requests, out, open_generator(str(place), dataclasses.replace(SMALL, **changes)))
        return capsys.readouterr().out.strip()

    assert reason(weights).endswith("1 new.")
    assert reason(copy).startswith("All 1 videos are there")
    assert read_samples(out)[0]["made"]["weights"] == f"{copy}/params"
    assert reason(copy, fps=4.0).endswith("1 again (other fps).")
    assert reason(copy, fps=4.0, weights_dtype="bfloat16").endswith("1 again (other weights_dtype).")
    assert reason(copy, seed=3).endswith("1 again (other fps, seed, weights_dtype).")
    shutil.rmtree(copy)
    save_params(copy, _scaled(tiny.params(MODEL)), MODEL)
    assert reason(copy, seed=3).endswith("1 again (other weights).")


def _scaled(params):
    return jax.tree.map(lambda x: x * 1.5, params)


def test_other_prompts_in_the_same_folder_leave_entries_and_scores_alone(generator, prompts, tmp_path):
    out = tmp_path / "out"
    generate(read_requests(prompts), out, generator)
    entries = read_samples(out)
    entries[0]["scores"] = {"right": 1.0}
    (out / "samples.json").write_text(json.dumps(entries))
    other = write(tmp_path / "other.jsonl", {"id": "four", "prompt": "Others."})
    assert [entry["id"] for entry in generate(read_requests(other), out, generator)] == ["four"]
    assert [entry["id"] for entry in read_samples(out)] == ["one", "two", "three", "four"]
    assert generate(read_requests(prompts), out, generator)[0]["scores"] == {"right": 1.0}
    assert len(read_samples(out)) == 4


def test_what_is_missing_is_named_and_the_rest_is_made(generator, prompts, tmp_path):
    lines = [{"prompt": "", "references": [{"image": f"{n}.png"}]} for n in range(5)]
    write(tmp_path / "bad.jsonl", {"prompt": "", "references": [{"image": "cat.png"}]}, *lines)
    requests, out = read_requests(tmp_path / "bad.jsonl"), tmp_path / "out"
    message = (
        r"^5 of 6 videos were not made\. \S*bad\.jsonl, line 2: \S+0\.png does not exist.*; and 2 more\. The other 1 "
    )
    with pytest.raises(ValueError, match=message):
        generate(requests, out, generator)
    assert [path.name for path in out.glob("*.mp4")] == ["0001.mp4"]
    assert [entry["id"] for entry in read_samples(out)] == ["0001"]
    with pytest.raises(ValueError, match="5 of 5 videos were not made"):
        generate(requests[1:], tmp_path / "none", generator)
    assert not (tmp_path / "none").exists()


def test_a_sample_that_is_not_finite_is_named_and_the_rest_is_made(generator, prompts, tmp_path, monkeypatch):
    def denoise(params, inputs, **_):
        wrong = inputs.references is not None and inputs.references.shape[1] == 2
        yield inputs.noise * jax.numpy.where(wrong, np.nan, 1.0)

    monkeypatch.setattr(generate_module, "denoise", denoise)
    with pytest.raises(
        ValueError, match=r"two: The sample of two holds NaN or infinity; the weights|line 2: The sample"
    ):
        generate(read_requests(prompts), tmp_path / "out", generator)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.mp4")) == ["one.mp4", "three.mp4"]
    assert [path.name for path in (tmp_path / "out").glob("two*")] == []


def test_prompts_that_are_cut_are_named_with_the_tokens_lost(generator, prompts, tmp_path, capsys):
    path = write(tmp_path / "long.jsonl", {"id": "long", "prompt": "word " * 600}, {"prompt": "short"})
    generate(read_requests(path), tmp_path / "out", generator)
    most = generator.config.data.text_length
    assert f"The prompt of long has 601 tokens; it is cut at {most} and loses {601 - most}." in capsys.readouterr().out


def test_a_full_disk_leaves_nothing_half_written(generator, prompts, tmp_path):
    requests, out = read_requests(prompts), tmp_path / "out"
    generate(requests[2:], out, generator)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name[0] != "."}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1200, hard))
        with pytest.raises(OSError, match=r"out/\S+ can't be written: File too large"):
            generate(requests, out, generator)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name[0] != "."} == before
    assert len(generate(requests, out, generator)) == 3


def test_one_writer_a_folder(generator, prompts, tmp_path):
    with exclusive(tmp_path / "out", "a test"), pytest.raises(ValueError, match="is in use by"):
        generate(read_requests(prompts), tmp_path / "out", generator)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        "[{}]",
        '[{"id": 3, "video": "a"}]',
        "[" * 100_000,
        '[{"id": "a", "video": "a.mp4"}, {"id": "a", "video": "b.mp4"}]',
    ],
)
def test_samples_json_of_any_shape_is_one_sentence(tmp_path, text):
    (tmp_path / "samples.json").write_text(text)
    with pytest.raises(ValueError, match=r"samples\.json.*; remove (it|the file)\.$") as error:
        read_samples(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"id": "three", "video": "three.mp4"},
        {"id": "three", "video": "three.mp4", "made": 3, "references": 4, "files": 5},
        {"id": "three", "video": "three.mp4", "made": {"encoders": 3, "digests": []}, "references": [5], "files": {}},
        {"id": "three", "video": "../three.mp4", "files": {"../kept": "x"}},
    ],
)
def test_entries_of_any_shape_are_made_again(generator, prompts, tmp_path, entry):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "kept").write_text("")
    (out / "samples.json").write_text(json.dumps([entry]))
    (out / "three.mp4").write_text("")
    generate(read_requests(prompts)[2:], out, generator)
    assert (out / "three.mp4").stat().st_size > 100
    assert (tmp_path / "kept").exists()
