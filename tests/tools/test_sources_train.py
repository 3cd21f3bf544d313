"""Both published data sets, prepared from the command line, feed the trainer together: steps at the demo's sizes."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from support.footage import SUBJECTS
from support.places import ROOT, environment
from support.published import opens2v_record, reference, write_opens2v, write_phantom, write_videos

SIZES = (
    *("--vae", "dct", "--text-encoder", "words", "--vfm", "daisy"),
    *("--height", "96", "--width", "96", "--num-frames", "9"),
)


def run(*arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(JAX_PLATFORMS="cpu", XLA_FLAGS=""),  # one device
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_both_sources_and_their_mixture_train(tmp_path):
    videos, clips = write_videos(tmp_path / "videos"), tmp_path / "clips"
    write_opens2v(tmp_path, {f"{name}{n}": opens2v_record(f"{name}.mp4") for name in SUBJECTS for n in range(3)})
    vids = {name: f"{name}_0_1" for name in SUBJECTS}
    clips.mkdir()
    for name, vid in vids.items():
        shutil.copy(videos / f"{name}.mp4", clips / f"{vid}.mp4")
    others = zip(vids.items(), [*vids.values()][1:] + [*vids.values()][:1], strict=True)
    rows = [
        (vid, f"A {name}.", {name: {"refer_result": [[reference(other, [0, 0, 60, 60])]]}})
        for (name, vid), other in others
    ]
    annotations, metadata = write_phantom(tmp_path, rows, dict.fromkeys(vids.values(), (96, 64)))
    first, second = tmp_path / "opens2v", tmp_path / "phantom"
    run("tools/prepare.py", "opens2v", tmp_path / "total_part1.json", first, "--videos", videos, *SIZES)
    run("tools/prepare.py", "phantom", annotations, second, "--videos", clips, "--metadata", metadata, *SIZES)
    train = (
        "--train.steps",
        2,
        "--optimizer.warmup-steps",
        0,
        "--train.preview-every",
        0,
        "--data.batch-size",
        2,
        "--data.held-out",
        0,
        "--train.held-out-every",
        0,
    )
    for name, data in (("a", ("path", first)), ("b", ("path", second)), ("c", ("mix", first, 6, second, 4))):
        chosen = (f"--data.{data[0]}", *data[1:])
        run("tools/train.py", "configs/demo.py", "--from-dataset", *chosen, "--train.folder", tmp_path / name, *train)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line]
        assert steps
        assert all(np.isfinite(line["loss"]) and line["pull"] > 0 for line in steps)
