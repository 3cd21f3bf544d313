"""Videos of the studio, without its page: one after the other, watched, cancelled, and the same as the command's."""

import dataclasses
import json
import threading

import numpy as np
import pytest
from PIL import Image
from support import tiny
from support.footage import photograph

from refalign_jax.config import GenerateConfig, ModelConfig
from refalign_jax.convert.checkpoint import save_params
from refalign_jax.convert.transfer import export_weights
from refalign_jax.data.images import read_image
from refalign_jax.data.records import Reference
from refalign_jax.data.video import write_video
from refalign_jax.inference.draw import clean_estimate
from refalign_jax.inference.generate import Progress, generate_one
from refalign_jax.inference.opening import open_generator
from refalign_jax.inference.requests import Request
from refalign_jax.studio import jobs
from refalign_jax.studio.jobs import Shown, Studio, duration

MODEL = ModelConfig(dit=dataclasses.replace(tiny.DIT, num_heads=1, latent_channels=4), alignment=tiny.MODEL.alignment)
SMALL = GenerateConfig(vae="dct", text_encoder="words", height=32, width=48, num_frames=5, num_steps=3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_params(folder / "checkpoint", tiny.params(MODEL), MODEL)
    export_weights(folder / "checkpoint", folder / "refalign.safetensors")
    return str(folder / "refalign.safetensors")


@pytest.fixture
def studio(weights, tmp_path):
    found = Studio(weights, SMALL, tmp_path / "out")
    yield found
    found.close()


@pytest.fixture
def cat(tmp_path):
    Image.fromarray(photograph("cat")).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def states(studio, job):
    return [shown.state for shown in studio.updates(job)]


def test_the_video_is_the_commands_and_is_watched(studio, weights, cat, tmp_path, monkeypatch):
    seen, show = [], Studio.show
    monkeypatch.setattr(Studio, "show", lambda self, job, shown: (seen.append(shown), show(self, job, shown)))
    job = studio.ask("A cat.", [(cat, "")], {"seed": 7, "width": None}, preview_every=1)
    assert states(studio, job)[-1] == "done"
    request = Request(id="0001", prompt="A cat.", references=(Reference(path=cat),))
    generate_one(request, tmp_path / "other.mp4", open_generator(weights, dataclasses.replace(SMALL, seed=7)))
    assert job.out.read_bytes() == (tmp_path / "other.mp4").read_bytes()
    beside = json.loads(job.out.with_suffix(".json").read_text())
    assert beside["prompt"] == "A cat."
    assert beside["made"]["seed"] == 7
    kept = studio.folder / beside["references"][0]["source"]
    assert kept.read_bytes() == cat.read_bytes()
    images, notes = studio.see([cat], {})
    assert notes == ["cat.png has a background, which is not removed; the model was trained with subjects on white."]
    np.testing.assert_array_equal(images[0], read_image(studio.folder / "0001-reference-0.png"))
    texts = [shown.text for shown in seen]
    assert texts[:3] == ["Encoding the prompt", "Encoding the references", "Reading the transformer"]
    assert texts[3].startswith("Step 0 of 3")
    assert texts[4] == "Step 1 of 3"
    assert "Step 2 of 3, about " in texts[5]
    assert texts[-1] == "Decoding the video"
    assert [shown.step for shown in seen][-4:] == [1, 2, 2, 2]
    assert seen[-1].preview.shape == (32, 48, 3)
    assert not np.array_equal(seen[-1].preview, seen[-4].preview)
    assert studio.finished == [job]


def test_the_preview_is_what_eulers_velocity_points_to():
    x, v = np.random.default_rng(0).standard_normal((2, 1, 2, 3, 4))
    sigma, following = 0.9, 0.7
    np.testing.assert_allclose(clean_estimate(x, x + (following - sigma) * v, (sigma, following)), x - sigma * v)
    np.testing.assert_array_equal(clean_estimate(x, v, (0.1, 0.0)), v)


class Stage:
    """Stands in for `generate_one`: each video waits until it may go on."""

    def __init__(self, monkeypatch):
        self.begun, self.go_on = threading.Semaphore(0), threading.Semaphore(0)
        monkeypatch.setattr(jobs, "generate_one", self)

    def __call__(self, request, out, generator, show_references, watch):
        (out.parent / f"{out.stem}-reference-0.png").touch()
        self.begun.release()
        assert self.go_on.acquire(timeout=60)
        watch(Progress("sample", 1, 3, np.zeros((1, 2, 4, 6, 4))))
        if request.prompt == "bad":
            raise ValueError("The weights are at fault.")
        write_video(out, np.zeros((1, 32, 48, 3), np.uint8), 8)
        return {"prompt": request.prompt}


def test_one_at_a_time_in_order_and_each_can_be_cancelled(studio, monkeypatch):
    stage = Stage(monkeypatch)
    first, second, third = (studio.ask(prompt, [], {}, 0) for prompt in ("one", "two", "three"))
    assert stage.begun.acquire(timeout=60)
    assert next(studio.updates(second)).text == "Waiting for 1 video before this one"
    assert next(studio.updates(third)).text == "Waiting for 2 videos before this one"
    studio.cancel(second)
    assert states(studio, second) == ["cancelled"]
    assert next(studio.updates(third)).text == "Waiting for 1 video before this one"
    studio.cancel(first)
    assert next(studio.updates(first)).text == "Stopping after this step"
    stage.go_on.release(2)
    assert states(studio, first)[-1] == "cancelled"
    assert states(studio, third)[-1] == "done"
    studio.cancel(third)
    assert next(studio.updates(third)).state == "done"
    assert sorted(path.name for path in studio.folder.iterdir()) == ["0003-reference-0.png", "0003.mp4", "stills"]
    assert read_image(third.still).shape == (32, 48, 3)


def test_a_failure_is_a_sentence_and_the_next_video_is_made(studio, monkeypatch):
    stage = Stage(monkeypatch)
    stage.go_on.release(2)
    bad, good = studio.ask("bad", [], {}, 0), studio.ask("good", [], {}, 0)
    assert list(studio.updates(bad))[-1] == Shown("failed", "The weights are at fault.")
    assert states(studio, good)[-1] == "done"
    assert studio.finished == [good]


def test_what_makes_no_video_is_refused_before_it_is_queued(studio, cat, tmp_path):
    for arguments, sentence in (
        (("  ", [], {}, 0), "There is nothing to draw"),
        (("A cat.", [(cat, "")] * 4, {}, 0), "4 pictures are given; the model was trained with at most 3"),
        (("A cat.", [], {"num_frames": 6}, 0), "num_frames"),
        (("A cat.", [], {"width": 50}, 0), "The width is 50; it must be a multiple of 16"),
        (("A cat.", [], {}, -1), "-1 steps"),
    ):
        with pytest.raises(ValueError, match=sentence):
            studio.ask(*arguments)
    (tmp_path / "notes.png").write_text("no picture")
    with pytest.raises(ValueError, match="is not an image") as caught:
        studio.see([tmp_path / "notes.png"], {})
    assert studio.explain(caught.value, [tmp_path / "notes.png"]).startswith("notes.png is not an image")
    assert list(studio.folder.iterdir()) == []


def test_networks_stay_loaded_only_if_asked(weights, tmp_path):
    studio = Studio(weights, dataclasses.replace(SMALL, keep_loaded=True), tmp_path)
    first, second = studio.open({"seed": 1}), studio.open({"seed": 2, "solver": "unipc"})
    assert first.transformer is second.transformer
    assert second.generate.seed == 2
    assert second.config.sampling.solver == "unipc"
    studio.close()
    assert not studio.folder.exists()


def test_durations_in_words():
    assert [duration(s) for s in (0.2, 59.4, 200, 7500)] == ["1 s", "59 s", "3 min 20 s", "2 h 5 min"]
