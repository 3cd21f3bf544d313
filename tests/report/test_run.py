"""A run's folder is read, and what is wrong in it is named in one sentence."""

import json
import re
import shutil

import numpy as np
import pytest

from refalign_jax.report.run import read_run
from refalign_jax.report.sections import set_up


def test_a_whole_run(runs):
    run = read_run(runs["a0"])
    assert run.config.train.steps == 40
    assert run.program["parameters"] == 1234
    assert [sample.id for sample in run.samples] == ["0", "1", "2"]
    assert [len(sample.references) for sample in run.samples] == [1, 1, 2]
    assert [sample.truth is None for sample in run.samples] == [False, True, False]
    assert run.evaluation is not None
    assert run.evaluation.numbers["accuracy"] == 0.875
    steps, values = run.series("held_out_loss")
    assert steps.tolist() == [10, 20, 30, 40]
    np.testing.assert_allclose(values, 25 / steps)


def test_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"is no run's folder: it has no config\.json; name the train\.folder"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", r"config\.json is not JSON"),
        ("config.json", "{}", r"config\.json is not one that a run wrote"),
        ("config.json", '{"config": {"modle": 1}, "about": {}}', r"Config has no field 'modle'"),
        ("metrics.jsonl", "{\n", r"metrics\.jsonl, line 1 can't be read"),
        ("samples/samples.json", '[{"id": "0"}]', r"samples\.json is no list of samples \(KeyError\('prompt'\)\)"),
        ("evaluation.json", '{"numbers": {"a": "b"}}', r"evaluation\.json is no evaluation \(could not convert"),
        (
            "evaluation.json",
            '{"confusions": [{"title": "t", "labels": ["a"], "matrix": [[1, 2]]}]}',
            r"'t' has 1 labels and a matrix of \(1, 2\)",
        ),
    ],
)
def test_damage_is_named(runs, tmp_path, file, text, message):
    copy = tmp_path / "run"
    shutil.copytree(runs["a0"], copy, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    (copy / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_run(copy)


def test_start_and_time_survive_a_resume(runs, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(runs["a0"], copy, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "samples"))
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    half = next(n for n, line in enumerate(lines) if json.loads(line).get("step") == 21)
    first, again = ({"start": step, "time": time} for step, time in ((0, "2026-01-02T03:04:05"), (20, "2026-01-03T00")))
    lines = [json.dumps(first), *lines[1:half], json.dumps(again), *lines[half:]]
    (copy / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    config = json.loads((copy / "config.json").read_text())
    config["about"]["time"] = again["time"]  # a start writes config.json anew
    (copy / "config.json").write_text(json.dumps(config))
    facts = re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", set_up(read_run(copy)).html)
    found = dict(facts)
    assert found["Started"] == "2026-01-02 03:04:05"
    assert found["Continued"] == "2026-01-03 00, start 2"
    assert found["Time of all steps"] == "0 min 20 s"


def test_lost_files_and_missing_ones(runs, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(runs["a0"], copy, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    (copy / "samples" / "1.mp4").unlink()
    (copy / "samples" / "2-truth.mp4").unlink()
    run = read_run(copy)
    assert [sample.id for sample in run.samples] == ["0", "2"]
    assert run.lost == 1
    assert run.samples[1].truth is None
    for name in ("evaluation.json", "metrics.jsonl", "samples/samples.json"):
        (copy / name).unlink()
    run = read_run(copy)
    assert (run.samples, run.evaluation, run.steps) == ((), None, ())
    lines = [{"start": 0}, {"step": 1, "loss": None}, {"step": 2, "loss": 1}]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')
    steps, values = read_run(copy).series("loss")
    assert steps.tolist() == [1, 2]
    assert np.isnan(values[0])
