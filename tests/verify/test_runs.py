"""Two runs compared step by step."""

import csv
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import tiny

from refalign_jax.convert.checkpoint import save_params
from refalign_jax.verify.runs import compare_runs


def metrics(scale=1.0, wrong_from=None, steps=20):
    """Losses that drift apart by `scale` roundings a step, and by a percent from a step on."""
    losses = {}
    for step in range(1, steps + 1):
        loss = 2.0 / step * (1 + 1e-7 * scale * step * (-1) ** step)
        losses[step] = loss * (1.01 if wrong_from and step >= wrong_from else 1)
    return losses


def write_run(folder, losses):
    folder.mkdir()
    lines = [{"start": 0}, {"compile_seconds": 3.0}]
    lines += [{"step": step, "loss": loss, "pull": None, "seconds": 0.1 * step} for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_csv(path, losses):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "note"])
        writer.writerows([step, loss, "x"] for step, loss in losses.items())
    return path


def test_runs_that_only_round_differently_agree_with_theirs_as_csv(tmp_path):
    ours, theirs = write_run(tmp_path / "a", metrics(0)), write_csv(tmp_path / "b.csv", metrics(3))
    comparison = compare_runs(ours, theirs)
    assert comparison.code == 0
    assert [drift.name for drift in comparison.drifts] == ["loss"], "times are not compared"


@pytest.mark.parametrize("with_spread", [False, True])
def test_the_first_step_of_divergence_is_named(tmp_path, with_spread):
    a, b = write_run(tmp_path / "a", metrics(0)), write_run(tmp_path / "b", metrics(1, wrong_from=7))
    spread = write_run(tmp_path / "c", metrics(2)) if with_spread else None
    comparison = compare_runs(a, b, spread)
    assert comparison.code == 1
    assert comparison.drifts[0].first == 7
    assert "loss first, at step 7" in comparison.summary


def test_the_measured_spread_is_stricter_than_the_model(tmp_path):
    a, b = write_run(tmp_path / "a", metrics(0)), write_run(tmp_path / "b", metrics(60))
    assert compare_runs(a, b).code == 0
    assert compare_runs(a, b, write_run(tmp_path / "c", metrics(1))).code == 1


def test_weights_are_compared_layer_by_layer_ours_with_theirs(tmp_path):
    from refalign_jax.config import ExportConfig
    from refalign_jax.convert.transfer import export_weights

    a, b = tmp_path / "a", tmp_path / "b"
    (a / "checkpoints").mkdir(parents=True)
    b.mkdir()
    save_params(a / "checkpoints" / "3", tiny.params(), tiny.MODEL)
    export_weights(a / "checkpoints" / "3", b / "step-3.safetensors", ExportConfig(projectors=True))
    assert compare_runs(a, b).code == 0
    metadata = None
    with (b / "step-3.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        metadata = header["__metadata__"]
    weights = load_file(b / "step-3.safetensors")
    weights["blocks.2.ffn.0.weight"] *= np.float32(1.01)
    save_file(weights, b / "step-3.safetensors", metadata=metadata)
    comparison = compare_runs(a, b)
    assert [drift.first for drift in comparison.drifts] == ["dit/blocks/ffn/in/kernel/2"]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda f: f / "none", "does not exist"),
        (lambda f: f, "is no run: expected metrics.jsonl"),
        (lambda f: write_csv(f / "x.csv", {}), "holds no metrics"),
        (lambda f: write_csv(f / "y.csv", {99: 1.0}), "no step with a metric or a checkpoint in common"),
    ],
)
def test_what_is_no_run_is_refused_in_a_sentence(tmp_path, make, sentence):
    good = write_csv(tmp_path / "good.csv", metrics())
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ValueError, match=sentence):
        compare_runs(good, make(folder))
