"""What is computed here: motion amplitude, and when a value is computed again."""

import itertools
import json

import numpy as np
import pytest

from refalign_jax.data.video import write_video
from refalign_jax.digests import Digests
from refalign_jax.evaluate.compute import Task, compute, read_ids, videos_of
from refalign_jax.evaluate.motion import frames, motion_amplitude

cv2 = pytest.importorskip("cv2")


def clip(kind: str) -> np.ndarray:
    """Five frames of 64x96: still, moving right, down, both ways at once, or noise."""
    rng = np.random.default_rng(0)
    world = cv2.GaussianBlur(rng.integers(0, 255, (200, 200, 3)).astype(np.uint8), (0, 0), 3)
    world = cv2.normalize(world, None, 0, 255, cv2.NORM_MINMAX)
    shift = {"still": (0, 0), "right": (0, -2), "down": (-3, 0), "diagonal": (-1, -3)}
    if kind == "noise":
        return rng.integers(0, 255, (5, 64, 96, 3)).astype(np.uint8)
    down, right = shift[kind]
    return np.stack([world[50 + t * down : 114 + t * down, 50 + t * right : 146 + t * right] for t in range(5)])


def written_out(pixels: np.ndarray) -> float:
    """The formula, as OpenS2V-Eval states it."""
    greys = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_BGR2GRAY) for frame in pixels]
    flows = []
    for before, after in itertools.pairwise(greys):
        flow = cv2.calcOpticalFlowFarneback(
            before,
            after,
            None,
            pyr_scale=0.5,
            levels=3,
            winsize=15,
            iterations=3,
            poly_n=5,
            poly_sigma=1.2,
            flags=0,
        )
        flows.append(cv2.resize(flow, (16, int(16 * 64 / 96)), interpolation=cv2.INTER_AREA))
    return abs(float(np.mean(np.stack(flows).astype(np.float64))))


@pytest.mark.parametrize("kind", ["still", "right", "down", "diagonal", "noise"])
def test_motion_amplitude_is_the_formula(tmp_path, kind):
    write_video(tmp_path / "a.mp4", clip(kind), fps=8)
    found = motion_amplitude(tmp_path / "a.mp4")
    assert found == pytest.approx(written_out(np.stack(list(frames(tmp_path / "a.mp4")))), abs=1e-6)
    if kind in ("right", "down", "diagonal"):
        assert found > 0.3
    if kind == "still":
        assert found < 0.05


def test_a_video_of_one_frame_has_no_motion(tmp_path):
    write_video(tmp_path / "a.mp4", clip("still")[:1], fps=8)
    with pytest.raises(ValueError, match="fewer than two frames"):
        motion_amplitude(tmp_path / "a.mp4")


def test_a_value_is_computed_again_only_if_its_input_changed(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.bin").write_bytes(name.encode())
    scores, asked = tmp_path / "scores", []

    def value(name: str) -> float | None:
        asked.append(name)
        return None if name == "c" else float(len(asked))

    task = Task(file="m", key="k", inputs={n: (tmp_path / f"{n}.bin",) for n in "abc"}, compute=value)
    scores.mkdir()
    (scores / "m.json").write_text(json.dumps({"b": {"k": 0.25}}))

    def again() -> int:
        with Digests(scores) as digests:
            return compute(task, scores, digests)

    assert again() == 2
    assert asked == ["a", "c"], "b has a value of other origin"
    assert json.loads((scores / "m.json").read_text()) == {"b": {"k": 0.25}, "a": {"k": 1.0}}
    assert again() == 0
    (tmp_path / "a.bin").write_bytes(b"another")
    assert again() == 1
    assert asked == ["a", "c", "a"]
    (scores / "m.json").write_text("[]")
    with pytest.raises(ValueError, match="is no object of video ids"):
        again()


def test_videos_and_ids_that_are_missing_are_named(tmp_path):
    (tmp_path / "one.mp4").touch()
    assert list(videos_of(tmp_path, ())) == ["one"]
    with pytest.raises(ValueError, match=r"lacks 2 videos: three.mp4, two.mp4\."):
        videos_of(tmp_path, ("one", "three", "two"))
    with pytest.raises(ValueError, match=r"has no <id>\.mp4"):
        videos_of(tmp_path / "none", ())
    prompts = tmp_path / "p.json"
    prompts.write_text(json.dumps({"one": {"prompt": "p", "img_paths": []}}))
    assert read_ids(prompts) == ("one",)
    prompts.write_text("[1]")
    with pytest.raises(ValueError, match="is no file of OpenS2V-Eval"):
        read_ids(prompts)
