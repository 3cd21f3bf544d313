"""Two runs compared step by step."""

import csv
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file
from support import tiny

from refalign_jax.convert.checkpoint import save_params
from refalign_jax.trees import flatten, unflatten
from refalign_jax.verify.runs import compare_runs


def metrics(scale=1.0, wrong_from=None, steps=20):
    """Losses that drift apart by `scale` roundings a step, and by a percent from a step on."""
    losses = {}
    for step in range(1, steps + 1):
        loss = 2.0 / step * (1 + 1e-7 * scale * step * (-1) ** step)
        losses[step] = loss * (1.01 if wrong_from and step >= wrong_from else 1)
    return losses


def write_run(folder, losses, dtype=None):
    folder.mkdir()
    if dtype:
        config = {"config": {"model": {"dit": {"compute_dtype": dtype}}}}
        (folder / "config.json").write_text(json.dumps(config))
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
    ours, theirs = write_run(tmp_path / "a", metrics(0)), write_csv(tmp_path / "b.csv", metrics(2))
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
    a, b = write_run(tmp_path / "a", metrics(0)), write_run(tmp_path / "b", metrics(2))
    assert compare_runs(a, b).code == 0
    assert compare_runs(a, b, write_run(tmp_path / "c", metrics(0.1))).code == 1


STEPS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 300)
MEASURED = {
    "accumulation, loss": (1.8e-7, 1.8e-7, 2.1e-7, 2.1e-7, 2.1e-7, 3.0e-7, 4.4e-7, 4.4e-7, 4.4e-7, 4.4e-7),
    "fsdp 2, context 2, gradient": (0, 1.2e-7, 1.5e-7, 1.7e-7, 2.0e-7, 4.1e-7, 4.1e-7, 4.1e-7, 4.4e-7, 9.3e-7),
    "accumulation in bfloat16, gradient": (0, 1.7e-4, 1.7e-4, 1.8e-4, 2.6e-4, 1.1e-3, 1.1e-3, 1.1e-3, 5.2e-3, 8.5e-3),
    "learning rate + 1%, loss": (0, 2.7e-6, 2.7e-6, 2.5e-5, 7.3e-5, 1.8e-4, 3.7e-4, 5.9e-4, 1.1e-3, 1.2e-3),
    "no weight decay, gradient": (0, 3.0e-6, 3.8e-6, 2.0e-5, 3.6e-5, 6.3e-5, 1.5e-4, 7.6e-4, 3.5e-3, 4.4e-3),
    "betas swapped, loss": (0, 0, 1.9e-5, 3.2e-5, 5.8e-4, 1.1e-3, 3.2e-3, 9.2e-3, 4.5e-2, 7.2e-2),
}
"""Largest relative differences up to a step that were measured between runs of the tiny recipe: docs/verify.md."""


@pytest.mark.parametrize(
    ("name", "dtype", "first"),
    [
        ("accumulation, loss", "float32", None),
        ("fsdp 2, context 2, gradient", "float32", None),
        ("accumulation in bfloat16, gradient", "bfloat16", None),
        ("accumulation in bfloat16, gradient", "float32", 2),
        ("learning rate + 1%, loss", "float32", 2),
        ("no weight decay, gradient", "float32", 2),
        ("betas swapped, loss", "float32", 3),
    ],
)
def test_measured_runs_get_the_right_verdict(tmp_path, name, dtype, first):
    """Another order of sums raises no alarm; a small fault does, at the step that docs/verify.md states."""
    a = write_run(tmp_path / "a", dict.fromkeys(STEPS, 1.0), dtype)
    b = write_run(tmp_path / "b", {k: 1 - d for k, d in zip(STEPS, MEASURED[name], strict=True)})
    (drift,) = compare_runs(a, b).drifts
    assert drift.first == first


def test_the_model_counts_the_steps_between_records_and_says_where_it_ends(tmp_path):
    def bounds(steps, dtype=None):
        name = f"{len(list(tmp_path.iterdir()))}"
        return compare_runs(write_run(tmp_path / name, dict.fromkeys(steps, 1.0), dtype), tmp_path / name)

    every = bounds(range(1, 901)).drifts[0].bounds
    tenth = bounds(range(10, 901, 10)).drifts[0].bounds
    later = bounds(range(1001, 1901)).drifts[0].bounds
    np.testing.assert_array_equal(tenth, every[9::10])
    np.testing.assert_array_equal(later, every)
    assert np.isclose(every[0], 10 * 2.0**-23, rtol=0.03)
    assert np.isfinite(every[525 - 1])
    assert np.isinf(every[526 - 1])
    assert "After 526 steps it excludes nothing" in bounds(range(1, 901)).bound
    assert "as far as the bound reaches" in bounds(range(1, 901)).summary
    assert "excludes nothing" not in bounds(range(1, 100)).bound
    assert "rounding explains every difference" in bounds(range(1, 100)).summary
    assert np.isclose(bounds(range(1, 3), "bfloat16").drifts[0].bounds[0], 2.0**-8, rtol=0.03)
    a = write_csv(tmp_path / "a.csv", metrics(0))
    assert compare_runs(a, a, profile="16bit").drifts[0].bounds[0] > 2.0**-8


def test_weights_are_compared_layer_by_layer_ours_with_theirs(tmp_path):
    from refalign_jax.config import ExportConfig
    from refalign_jax.convert.transfer import export_weights

    a, b = tmp_path / "50% #a", tmp_path / "b"  # characters that mean something in URLs
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


@pytest.mark.parametrize("value", ["NaN", "Infinity"])
@pytest.mark.parametrize("step", [3, 900])
def test_a_number_that_is_not_finite_is_beyond_every_bound(tmp_path, value, step):
    losses = dict.fromkeys(range(1, 1001), 1.0)
    a, b = write_run(tmp_path / "a", losses), write_run(tmp_path / "b", losses)
    path = b / "metrics.jsonl"
    lines = path.read_text().replace(f'"step": {step}, "loss": 1.0', f'"step": {step}, "loss": {value}')
    path.write_text(lines)
    comparison = compare_runs(a, b)
    assert comparison.drifts[0].first == step
    comparison.show(Console(file=io.StringIO()))
    assert compare_runs(b, b).code == 0


def test_a_spread_that_lacks_something_is_named(tmp_path):
    a, b = write_run(tmp_path / "a", metrics(0)), write_run(tmp_path / "b", metrics(2))
    for run in (a, b):
        path = run / "metrics.jsonl"
        path.write_text("".join(json.dumps(json.loads(x) | {"grad_norm": 1.0}) + "\n" for x in path.open()))
    bound = compare_runs(a, b, write_run(tmp_path / "c", metrics(1))).bound
    assert "That run lacks grad_norm: there it is a model. The bound is a model of rounding in float32" in bound
    with pytest.raises(ValueError, match=r"d has no step with a metric or a checkpoint in common with .*a\.$"):
        compare_runs(a, b, write_run(tmp_path / "d", {99: 1.0}))


def test_weights_that_began_at_zero_are_measured_by_the_others(tmp_path):
    """Rounding may move an AdamW update of 1e-5 by a part in 1e5, but not a weight of 0.02."""
    flat = dict(flatten(tiny.params()))
    small, large = "dit/blocks/cross_attention/query/bias", "dit/blocks/cross_attention/query/kernel"
    flat[small] = jnp.full_like(flat[small], 1e-5)

    def first(run, **moved):
        for folder, changes in (("a", {}), (run, moved)):
            path = tmp_path / folder / "checkpoints" / "2"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                changed = {name: flat[name] * factor for name, factor in changes.items()}
                save_params(path, unflatten(flat | changed), tiny.MODEL)
        return compare_runs(tmp_path / "a", tmp_path / run).drifts[0].first

    assert first("b", **{small: 1 + 1e-5}) is None
    assert first("c", **{large: 1 + 1e-5}) == f"{large}/0"
    assert first("d", **{small: 1.1}) == f"{small}/0"


def test_what_does_not_depend_on_the_weights_does_not_drift(tmp_path):
    """A wrong rate is seen however late it begins."""
    for name, rate in (("a", 1.0), ("b", 1.0001)):
        lines = [{"step": k, "loss": 1.0, "learning_rate": rate if k > 800 else 1.0} for k in range(1, 1001)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rate = compare_runs(tmp_path / "a.jsonl", tmp_path / "b.jsonl").drifts[1]
    assert (rate.name, rate.first) == ("learning_rate", 801)


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
