"""Many videos into a folder: the same bytes in any batch and any part, what a killed process leaves, the gallery."""

import dataclasses
import html
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image
from support import tiny
from support.footage import photograph
from support.pair import Pair
from support.places import ROOT, environment

from refalign_jax.config import GenerateConfig, ModelConfig
from refalign_jax.convert.checkpoint import save_params
from refalign_jax.data.video import read_frames
from refalign_jax.drawing import Inputs, batches, rows_per_call
from refalign_jax.inference import generate as generate_module
from refalign_jax.inference.generate import generate
from refalign_jax.inference.opening import open_generator
from refalign_jax.inference.outputs import read_samples
from refalign_jax.inference.requests import read_eval, read_requests
from refalign_jax.locks import exclusive

MODEL = ModelConfig(dit=dataclasses.replace(tiny.DIT, num_heads=1, latent_channels=4), alignment=tiny.MODEL.alignment)
SMALL = GenerateConfig(vae="dct", text_encoder="words", height=32, width=48, num_frames=5, num_steps=1, fps=8.0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "checkpoint"
    save_params(folder, tiny.params(MODEL), MODEL)
    return folder


@pytest.fixture(scope="module")
def generator(weights):
    return open_generator(str(weights), SMALL)


def write_prompts(folder, count):
    """Requests with no, one and two references in turn."""
    for name in ("cat", "coffee"):
        Image.fromarray(photograph(name)).save(folder / f"{name}.png")
    images = [{"image": "cat.png", "subject": "<cat>"}, {"image": "coffee.png"}]
    lines = [{"id": f"v{n}", "prompt": f"Number {n} & <b>.", "references": images[: n % 3]} for n in range(count)]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder / "prompts.jsonl"


def files(folder):
    """The files of a folder by name, but those whose content is a list of all entries."""
    names = [path for path in folder.iterdir() if path.is_file() and path.name[0] != "."]
    return {path.name: path.read_bytes() for path in names if path.suffix not in (".json", ".html")}


def test_the_bytes_of_a_video_are_the_same_in_any_batch_part_and_order(generator, tmp_path):
    requests = read_requests(write_prompts(tmp_path, 7))

    def make(name, requests, **changes):
        settings = dataclasses.replace(generator.generate, **changes)
        generate(requests, tmp_path / name, dataclasses.replace(generator, generate=settings))
        return files(tmp_path / name)

    whole = make("whole", requests)
    assert sum(name.endswith(".mp4") for name in whole) == 7
    assert make("batch", requests[::-1], batch_size=5) == whole
    one = make("parts", requests, part=(2, 3))
    assert {name for name in one if name.endswith("mp4")} == {"v1.mp4", "v4.mp4"}
    held = threading.Event()

    def hold():
        with exclusive(tmp_path / "parts", "another part"):
            held.set()
            time.sleep(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    make("parts", requests, part=(1, 3))
    thread.join()
    assert make("parts", requests, part=(3, 3)) == whole
    assert {entry["id"] for entry in read_samples(tmp_path / "parts")} == {f"v{n}" for n in range(7)}


def test_shortcuts_and_branches_over_devices_leave_the_bytes_alone(weights, tmp_path):
    config = dataclasses.replace(
        SMALL, num_steps=5, guidance_interval=(0.8, 1.0), cache_threshold=0.5, batched_guidance=True
    )
    generator, requests = open_generator(str(weights), config), read_requests(write_prompts(tmp_path, 5))
    assert rows_per_call(generator.mesh, 1, batched_guidance=True) == 8 // 3
    generate(requests, tmp_path / "a", generator)
    larger = dataclasses.replace(generator.generate, batch_size=4)
    generate(requests[::-1], tmp_path / "b", dataclasses.replace(generator, generate=larger))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    made = read_samples(tmp_path / "a")[0]["made"]["sampling"]
    assert (made["guidance_interval"], made["cache_threshold"], made["batched_guidance"]) == ([0.8, 1.0], 0.5, True)
    with pytest.raises(ValueError, match="holds none of the 5 noise levels"):
        open_generator(str(weights), dataclasses.replace(config, guidance_interval=(0.0, 0.1)))


@pytest.mark.slow
def test_processes_that_have_joined_share_the_videos(weights, tmp_path):
    """With the branches of each video over the four devices of its process; each makes every second video."""
    prompts, out = write_prompts(tmp_path, 4), tmp_path / "out"
    options = [f"--{name}={getattr(SMALL, name.replace('-', '_'))}" for name in ("vae", "text-encoder", "fps")]
    options += ["--height=32", "--width=48", "--num-frames=5", "--num-steps=2", "--batched-guidance=True"]
    command = [str(ROOT / "tools/sample.py"), f"--weights={weights}", f"--prompts={prompts}", f"--out={out}", *options]
    pair = Pair(tmp_path, *command, "--distributed")
    assert pair.wait() == [0, 0], pair.said()
    for index, output in enumerate(pair.outputs):
        assert "to be made: 2 new" in output.read_text(), index
    entries = {entry["id"]: entry for entry in read_samples(out)}
    assert sorted(entries) == ["v0", "v1", "v2", "v3"]
    generator = open_generator(str(weights), dataclasses.replace(SMALL, num_steps=2))
    generate(read_requests(prompts), tmp_path / "alone", generator)
    for id in entries:
        ours, theirs = (read_frames(folder / f"{id}.mp4", range(5)).astype(int) for folder in (out, tmp_path / "alone"))
        assert np.abs(ours - theirs).mean() < 1


def test_videos_of_one_kind_share_a_batch():
    def one(tokens, references):
        shape = (references, 2, 2, 4) if references else None
        text = np.zeros((tokens, 3), np.float32)
        return Inputs(np.zeros((1, 2, 2, 4), np.float32), text, text, None if shape is None else np.zeros(shape))

    inputs = {"a": one(5, 0), "b": one(5, 2), "c": one(5, 0), "d": one(7, 0), "e": one(5, 0)}
    assert batches(inputs, 2) == [["a", "c"], ["e"], ["b"], ["d"]]


def test_latents_outlive_a_process_that_fails_after_them(generator, tmp_path, monkeypatch):
    requests, out = read_requests(write_prompts(tmp_path, 3)), tmp_path / "out"

    def fail(*_):
        raise OSError("out/v0.mp4 can't be written: a test.")

    with monkeypatch.context() as patched:
        patched.setattr(generate_module, "write_files", fail)
        with pytest.raises(OSError, match="a test"):
            generate(requests, out, generator)
    assert len(list((out / ".latents").iterdir())) == 3
    (out / ".latents" / ".half.safetensors.1.partial").write_bytes(b"of a process that was killed")
    assert not files(out)
    with monkeypatch.context() as patched:
        patched.setattr(generate_module, "denoise", lambda *_, **__: pytest.fail("sampled again"))
        generate(requests, out, generator)
    assert not (out / ".latents").exists()
    generate(requests, tmp_path / "fresh", generator)
    assert files(out) == files(tmp_path / "fresh")


def test_the_gallery_shows_every_video_with_prompt_and_references(generator, tmp_path):
    generate(read_requests(write_prompts(tmp_path, 3)), tmp_path / "out", generator)
    page = (tmp_path / "out/gallery.html").read_text()
    assert re.findall(r'<video src="([^"]+)"', page) == ["v0.mp4", "v1.mp4", "v2.mp4"]
    assert re.findall(r'<img src="([^"]+)"', page) == [
        *("v1-reference-0.png", "v2-reference-0.png", "v2-reference-1.png")
    ]
    assert html.escape("Number 2 & <b>.") in page
    assert "&lt;cat&gt;" in page
    assert "<b>." not in page


def write_eval(folder, **changes):
    Image.fromarray(photograph("cat")).save(folder / "cat.png")
    item = {"img_paths": ["cat.png"], "prompt": "A cat.", "synthesis_flag": "wrong", "class_label": ["Cat"]}
    (folder / "Open-Domain_Eval.json").write_text(json.dumps({"singleobj_1": item | changes}))
    return folder / "Open-Domain_Eval.json"


def test_prompts_of_opens2v_eval(tmp_path):
    path = write_eval(tmp_path)
    (request,) = read_eval(path)
    assert (request.id, request.prompt) == ("singleobj_1", "A cat.")
    assert [(r.path, r.subject) for r in request.references] == [(tmp_path / "cat.png", "Cat")]
    (request,) = read_eval(path, tmp_path / "elsewhere")
    assert request.references[0].path == tmp_path / "elsewhere" / "cat.png"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": 3}, "'singleobj_1': prompt is 3; it must be a string"),
        ({"img_paths": "cat.png"}, "img_paths is 'cat.png'; it must be a list"),
        ({"img_paths": [3]}, r"img_paths\[0\] is 3; it must be a string"),
    ],
)
def test_prompts_of_opens2v_eval_in_another_form(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_eval(write_eval(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is no file of OpenS2V-Eval"),
        ("{}", "is no file of OpenS2V-Eval"),
        ("{", "is not JSON"),
        ('{"a": 3}', "'a' is 3; it must be an object"),
        ('{"a/b": {"prompt": "", "img_paths": []}}', "id is 'a/b'; it must be a file's name"),
    ],
)
def test_files_that_are_not_opens2v_evals(tmp_path, text, message):
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_eval(tmp_path / "e.json")


@pytest.mark.slow
def test_killing_a_run_of_forty_ten_times_gives_the_same_forty_files(weights, tmp_path):
    """Killed by SIGKILL whenever some more files are there, in both stages; compared with a run in other batches."""
    prompts = write_prompts(tmp_path, 40)
    options = ["--vae", "dct", "--text-encoder", "words", "--height", "32", "--width", "48"]
    options += ["--num-frames", "5", "--num-steps", "1", "--fps", "8"]
    variables = environment(XLA_FLAGS="--xla_backend_optimization_level=0")

    def start(out, *more):
        command = [sys.executable, "tools/sample.py", str(weights), str(prompts), str(out), *options, *more]
        return subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def count(out):
        return len(list(out.glob(".latents/*.safetensors"))) + 2 * len(list(out.glob("*.mp4")))

    rng, out = random.Random(0), tmp_path / "killed"
    for kill in range(10):
        process, goal = start(out), 6 * kill + rng.randrange(1, 6)
        while process.poll() is None and count(out) < goal:
            time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()  # it is not done: 60 of 80 at most
        time.sleep(rng.random() / 50)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    for place, more in ((out, ()), (tmp_path / "whole", ("--batch-size", "7"))):
        _, error = (process := start(place, *more)).communicate()
        assert process.returncode == 0, error
    expected = files(tmp_path / "whole")
    assert sum(name.endswith(".mp4") for name in expected) == 40
    assert files(out) == expected
    ours, theirs = ({entry["id"]: entry for entry in read_samples(place)} for place in (out, tmp_path / "whole"))
    assert ours == theirs
    assert not (out / ".latents").exists()
