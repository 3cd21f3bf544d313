"""Choice of frames, by number and by time, and their size."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.footage import photograph
from support.forms import encode, numbers

from refalign_jax.config import PrepareConfig
from refalign_jax.data.clip_frames import resize_and_crop
from refalign_jax.data.clips import choose_by_time, choose_frames, load_clip
from refalign_jax.data.records import Record, Skipped


@given(st.integers(1, 200), st.integers(0, 20), st.integers(1, 5), st.integers(0, 9))
def test_frames_are_inside_distinct_and_ascending(available, k, stride, seed):
    num_frames = 4 * k + 1
    frames = choose_frames(available, num_frames, stride, np.random.default_rng(seed))
    if available < num_frames:
        assert frames is None
        return
    assert len(frames) == num_frames
    assert 0 <= frames[0] <= frames[-1] < available
    steps = np.diff(frames)
    assert (steps >= 1).all()
    if available >= (num_frames - 1) * stride + 1:
        assert (steps == stride).all()
    elif num_frames > 1:
        assert (frames[0], frames[-1]) == (0, available - 1)
        assert np.ptp(steps) <= 1


def test_every_start_is_drawn():
    rng = np.random.default_rng(0)
    assert {int(choose_frames(15, 5, 3, rng)[0]) for _ in range(100)} == {0, 1, 2}


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 9), st.integers(0, 9), st.sampled_from([24, 30, 60]))
def test_a_rate_that_divides_the_videos_is_a_stride(available, stride, k, seed, rate):
    by_number = choose_frames(available, k, stride, np.random.default_rng(seed))
    times = np.arange(available + 1) / rate
    by_time = choose_by_time(times, k, rate / stride, np.random.default_rng(seed))
    if available >= (k - 1) * stride + 1:
        np.testing.assert_array_equal(by_time, by_number)
    else:
        assert by_time is None


@given(st.lists(st.floats(0.005, 0.5), min_size=1, max_size=40), st.integers(1, 9), st.floats(2, 60), st.integers(0, 9))
def test_chosen_frames_are_on_display_at_their_times(steps, k, fps, seed):
    times = np.cumsum([0.0, *steps])
    chosen = choose_by_time(times, k, fps, np.random.default_rng(seed))
    if chosen is None:
        assert times[-1] <= (k - 1) / fps + 2e-3
        return
    stamps = times[chosen[0]] + np.arange(k) / fps
    assert (times[chosen] <= stamps + 2e-3).all()
    assert (stamps <= times[chosen + 1]).all()


SMALL = PrepareConfig(vae="dct", text_encoder="words", vfm="daisy", height=64, width=96, num_frames=9)


@pytest.mark.parametrize("rate", [24, 30, 60])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_clips_rate_is_the_one_asked_for(tmp_path, rate, suffix):
    encode(tmp_path / f"x.{suffix}", range(rate), rate=rate)
    record = Record(id="x", video=tmp_path / f"x.{suffix}", prompt="")
    clip = load_clip(record, dataclasses.replace(SMALL, fps=12))
    first, *_ = shown = numbers(clip.video)
    assert shown == [first + k * rate // 12 for k in range(9)]
    assert (clip.metadata["fps"], clip.metadata["frames"]) == (12, shown)
    clip = load_clip(record, dataclasses.replace(SMALL, stride=2))
    assert np.diff(numbers(clip.video)).tolist() == [2] * 8
    assert clip.metadata["fps"] == rate / 2
    clip = load_clip(record, dataclasses.replace(SMALL, stride=10))  # spread evenly over what there is
    apart = np.diff(clip.metadata["frames"]).sum()
    assert clip.metadata["fps"] == pytest.approx(rate * 8 / apart)


def test_a_pause_is_kept(tmp_path):
    encode(tmp_path / "x.mp4", [*range(6), *range(30, 36)])
    record = Record(id="x", video=tmp_path / "x.mp4", prompt="")
    clip = load_clip(record, dataclasses.replace(SMALL, fps=6))
    shown = numbers(clip.video)
    starts = clip.metadata["frames"][0]
    on_display = [max(n for n in [*range(6), *range(30, 36)] if n <= starts + 4 * k) for k in range(9)]
    assert shown == on_display
    assert clip.metadata["fps"] == 6
    clip = load_clip(record, dataclasses.replace(SMALL, num_frames=9))
    first, last = clip.metadata["frames"][0], clip.metadata["frames"][-1]
    seconds = ([*range(6), *range(30, 36)][last] - [*range(6), *range(30, 36)][first]) / 24
    assert clip.metadata["fps"] == pytest.approx(8 / seconds)


def test_a_part_of_a_video_that_is_too_short_is_left_out(tmp_path):
    encode(tmp_path / "x.mp4", range(24))
    record = Record(id="x", video=tmp_path / "x.mp4", prompt="", frames=(4, 20))
    clip = load_clip(record, dataclasses.replace(SMALL, fps=12.5))
    assert clip.metadata["frames"][0] == 4
    assert clip.metadata["frames"][-1] == 19
    left = load_clip(record, dataclasses.replace(SMALL, fps=12))
    assert isinstance(left, Skipped)
    assert left.reason == "shorter than 9 frames at 12 a second"
    assert left.detail.endswith("x.mp4 shows the clip for 0.67 s; it must be above 0.67 s.")
    left = load_clip(dataclasses.replace(record, frames=(30, 40)), dataclasses.replace(SMALL, fps=12))
    assert left.detail.endswith("x.mp4 shows the clip for 0.00 s; it must be above 0.67 s.")


def test_a_rate_and_a_stride_exclude_each_other():
    with pytest.raises(ValueError, match=r"stride=2 has no effect beside fps=12; give one of them"):
        dataclasses.replace(SMALL, fps=12.0, stride=2)
    with pytest.raises(ValueError, match=r"fps=-1\.0 must be at least 0"):
        dataclasses.replace(SMALL, fps=-1.0)


@pytest.mark.parametrize(("height", "width"), [(48, 48), (32, 128), (192, 64), (96, 128)])
def test_the_centre_is_kept_and_nothing_is_stretched(height, width):
    frames = photograph("cat")[None]
    out = resize_and_crop(frames, height, width)
    assert out.shape == (1, height, width, 3)
    scale = max(height / 96, width / 128)
    y, x = np.mgrid[:height, :width]
    rows = np.clip(((y + 0.5 - height / 2) / scale + 48).astype(int), 0, 95)
    columns = np.clip(((x + 0.5 - width / 2) / scale + 64).astype(int), 0, 127)
    assert np.corrcoef(out[0].ravel(), frames[0, rows, columns].ravel())[0, 1] > 0.95


def test_frames_of_the_right_size_are_untouched():
    frames = photograph("cat")[None]
    assert resize_and_crop(frames, 96, 128) is frames
