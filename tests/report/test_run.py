"""A run's folder is read, and what is wrong in it is named in one sentence."""

import json
import shutil

import numpy as np
import pytest

from refalign_jax.report.run import read_run


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
