"""Benchmarks made of the trainer's own parts: figures add up, and operations find their scopes."""

import dataclasses
import json

import jax
import pytest
from support.places import ROOT
from support.runs import recipe

from refalign_jax import flops
from refalign_jax.command import load, override
from refalign_jax.config import Config, DataConfig, Plan, read_recipe, without_data
from refalign_jax.perf import benchmark, gpu_check
from refalign_jax.perf.profile import by_scope, phase_of, scope_of

TINY = str(ROOT / "configs/tiny.py")
FEW = Plan(warmup=1, steps=2, repeats=2, profile=1)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """The small recipe, whose program other tests compile too, on devices of one TFLOP/s."""
    config = recipe(tmp_path_factory.mktemp("benchmark"), peak_tflops=1.0)
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, num_steps=1))


def test_two_settings_of_training_in_turns(config):
    results = benchmark.measure({"a": config, "b": config}, "train", FEW)
    shape = flops.Shape(grid=(2, 4, 6), references=3, text_length=5)
    for result in results.values():
        seconds = result["seconds"]
        assert len(seconds["all"]) == 2
        assert seconds["min"] <= seconds["median"] <= seconds["max"]
        assert result["model_tflop"] * 1e12 == pytest.approx(8 * flops.train_flops(config.model, shape))
        rate = result["model_tflop"] / seconds["median"] / jax.device_count()
        assert result["tflops_per_device"] == pytest.approx(rate)
        assert result["mfu"] == pytest.approx(rate)
        assert result["planned_bytes"]["temp"] > 0
        scopes = result["scopes"]
        for scope in ("self_attention", "cross_attention", "ffn", "alignment", "embed", "head", "rest of the blocks"):
            assert scopes[scope]["forward"] > 0, scope
            assert scopes[scope]["backward"] > 0, scope
        assert scopes["optimizer"].keys() == {"neither"}
    assert "ratio" not in results["a"]
    turns = zip(results["a"]["seconds"]["all"], results["b"]["seconds"]["all"], strict=True)
    assert results["b"]["ratio"]["all"] == [b / a for a, b in turns]
    assert json.loads(json.dumps(results)).keys() == {"a", "b"}
    text = "\n".join(benchmark.lines("b", results["b"]))
    assert "MFU" in text
    assert "time relative to the first" in text
    assert "self_attention" in text


def test_the_checks_for_a_gpu(config, golden, monkeypatch):
    """Without a GPU: everything runs, and what a CPU cannot do is reported."""
    monkeypatch.setattr(gpu_check, "TOKENS", 64)
    measured = benchmark.measure

    def measure(settings, mode, plan):
        if settings["a"].model.dit.remat == "full":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nand so on")
        return measured(settings, mode, plan)

    monkeypatch.setattr(benchmark, "measure", measure)
    plan = Plan(warmup=0, steps=1, repeats=1, profile=0)
    results, verdicts = gpu_check.check(config, [golden / "encoders_a"], plan, ("none", "full"), ("xla", "xla"))
    assert results["train"]["full"] == {"failed": "RESOURCE_EXHAUSTED: out of memory"}
    assert results["sample"]["seconds"]["median"] > 0
    passed = {verdict.bar: verdict.passed for verdict in verdicts}
    assert passed == {
        "float32 as encoders_a": True,
        "bfloat16 xla as xla at 64 tokens, at most 2e-2": True,
        "cuDNN forward and backward, remat none": False,
        "cuDNN forward and backward, remat none, no padded references": False,
        "train step: MFU of at least 45%": False,
    }
    assert not gpu_check.compare_kernels(("cudnn", "xla")).passed


def test_kernels_are_compared_where_keys_count():
    assert gpu_check.attention_difference(("xla", "xla"), 64, heads=2, head_width=8) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("path", "scope", "phase"),
    [
        (
            "jit(program)/jvp(DiT)/blocks/while/body/closed_call/Block/self_attention/out/dot",
            "self_attention",
            "forward",
        ),
        ("jit(p)/transpose(jvp(DiT))/blocks/while/body/checkpoint/Block/ffn/in/dot", "ffn", "backward"),
        (
            "jit(p)/transpose(jvp(DiT))/blocks/checkpoint/rematted_computation/Block/mul",
            "rest of the blocks",
            "repeated",
        ),
        ("jit(p)/jvp(DiT)/blocks/while/body/alignment/checkpoint/dot;x/ffn/y", "alignment", "forward"),
        ("jit(p)/optimizer/mul", "optimizer", "neither"),
        ("jit(p)/jit(_normal)/add", "rest", "neither"),
        ("", "rest", "neither"),
    ],
)
def test_paths_tell_scope_and_phase(path, scope, phase):
    assert (scope_of(path), phase_of(path)) == (scope, phase)


def test_loops_are_not_counted_beside_what_is_in_them():
    text = """HloModule jit_program, is_scheduled=true

%body.1 (x.1: f32[2]) -> f32[2] {
  ROOT %mul.1 = f32[2]{0} multiply(%x.1, %x.1), metadata={op_name="jit(p)/jvp(DiT)/Block/ffn/mul"}
}

ENTRY %main.1 (x.2: f32[2]) -> f32[2] {
  %x.2 = f32[2]{0} parameter(0)
  ROOT %while.1 = f32[2]{0} while(%x.2), condition=%c, body=%body.1, metadata={op_name="jit(p)/jvp(DiT)/blocks/while"}
}
"""
    assert by_scope(text, {"mul.1": 2.0, "while.1": 3.0, "?": 1.0}) == {
        "ffn": {"forward": 2.0},
        "rest": {"neither": 1.0},
    }


def test_the_command_takes_a_second_setting_and_needs_no_data(tmp_path, monkeypatch, capsys):
    seen = {}

    def measure(settings, mode, plan):
        seen.update(settings)
        seconds = {"median": 1.0, "min": 1.0, "max": 1.0, "all": [1.0]}
        told = {"seconds": seconds, "tflops_per_device": 1.0, "peak_tflops": None, "mfu": None, "compile_seconds": 1.0}
        return {name: {**told, "planned_bytes": None, "peak_bytes": None} for name in settings}

    monkeypatch.setattr(benchmark, "measure", measure)
    path = tmp_path / "made" / "x.json"
    versus = ["--versus", "model.dit.remat=attention", "model.dit.offload=true", "synthetic.latent_grid=1,8,8"]
    main = load("benchmark")
    assert main([TINY, *versus, "--model.dit.remat", "full", "--json", str(path)], "benchmark") == 0
    a, b = seen["a"], seen["b"]
    assert (a.model.dit.remat, a.model.dit.offload, a.synthetic.latent_grid) == ("full", False, (2, 4, 6))
    assert (b.model.dit.remat, b.model.dit.offload, b.synthetic.latent_grid) == ("attention", True, (1, 8, 8))
    assert not override(b, ["model.dit.offload=false"]).model.dit.offload
    assert json.loads(path.read_text())["about"].keys() >= {"versions", "flags", "commit", "devices"}
    assert "b train: 1 s" in capsys.readouterr().out
    recipe_1_3b = TINY.replace("tiny", "refalign_1_3b_stage1")
    assert without_data(read_recipe(recipe_1_3b)).data == DataConfig(batch_size=8)
    with pytest.raises(ValueError, match="Name a recipe first"):
        main([], "benchmark")
    with pytest.raises(ValueError, match=r"Plan\.steps=0 must be at least 1"):
        Plan(steps=0)
