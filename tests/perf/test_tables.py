"""What `ahead` and its tables compute without the TPU's compiler."""

import dataclasses
import json
import math
import subprocess
from pathlib import Path

import pytest
from support.places import ROOT

from refalign_jax.command import load
from refalign_jax.config import Config, DataConfig, MeshConfig, ModelConfig, wan_14b
from refalign_jax.devices import chip
from refalign_jax.initial import model_shapes
from refalign_jax.perf import hlo
from refalign_jax.perf.ahead import bounds, needed_gib
from refalign_jax.perf.search import POLICIES, candidates, meshes, options, ranked, suggest
from refalign_jax.perf.tables import parameter_table, summary, table
from refalign_jax.perf.topology import known_chip
from refalign_jax.sharding import make_mesh
from refalign_jax.trees import count


def test_what_compilers_say_of_memory():
    assert needed_gib("Ran out of memory in memory space hbm. Used 17.07G of 15.75G hbm.") == 17.07
    assert needed_gib("total memory required for HLO temporaries (1.5T) exceeds available HBM (95.73G)") == 1536
    assert needed_gib("another failure") is None


def test_the_table_of_parameters_adds_up():
    config = Config(model=ModelConfig(dit=wan_14b()), mesh=MeshConfig(fsdp=1))
    lines = parameter_table(config).splitlines()
    assert int(lines[-1].split()[0].replace(",", "")) == 4 * count(model_shapes(config.model))
    spread = parameter_table(dataclasses.replace(config, mesh=MeshConfig(fsdp=4, context=2, tensor=2))).splitlines()
    (ffn,) = [line for line in spread if line.startswith("dit/blocks/ffn/in/kernel")]
    assert ffn.split()[-3:] == ["fsdp·context·ring,", "tensor", f"{40 * 5120 * 13824 * 4 // 16:,}"]


def test_candidates_fit_chips_batch_and_heads():
    config = Config(model=ModelConfig(dit=wan_14b()))
    found = [candidate.mesh for candidate in candidates(dataclasses.replace(config), 64)]
    sizes = {(mesh.fsdp, mesh.context, mesh.tensor) for mesh in found}
    assert (8, 8, 1) in sizes
    assert (8, 4, 2) in sizes
    assert {mesh.ring for mesh in found} == {1}
    assert all(math.prod(size) == 64 and 8 % size[0] == 0 and 40 % (size[1] * size[2]) == 0 for size in sizes)


def test_a_chip_that_the_table_does_not_have_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="'cpu', whose peak, memory and bandwidth are not in CHIPS"):
        known_chip(make_mesh(MeshConfig()), "v99:1x1")


def test_bounds_are_of_compute_and_links():
    moved = hlo.Collectives(count={"all-gather": 2}, received={"all-gather": 10**9})
    found = bounds(moved, tflops=459.0, known=chip("TPU v5"))
    assert found == {
        "collectives": {"all-gather": {"count": 2, "gb": 1.0}},
        "bound_seconds": {"compute": 1.0, "links": round(2 / 1200, 4)},
        "bound_by": "compute",
    }


def test_what_fits_is_ranked_by_its_bounds():
    def report(name, fits, compute, links):
        """As reports were before the estimate of memory traffic was removed."""
        return {"name": name, "fits": fits, "bound_seconds": {"compute": compute, "links": links, "memory": 99}}

    reports = [report("a", True, 3, 1), report("b", False, 1, 1), report("c", True, 2, 2.5), report("d", True, 1, 4)]
    assert [r["name"] for r in ranked(reports)] == ["c", "a", "d"]


@pytest.mark.parametrize("folder", ["compiled", "gpu", "remat"])
def test_the_tables_on_the_page_are_made_from_the_reports(folder):
    reports = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / folder).glob("*.json"))]
    assert len(reports) > 4
    assert table(reports) in (ROOT / "docs/pods-and-memory.md").read_text()


@pytest.mark.parametrize(
    ("fitting", "policy", "split", "compilations"),
    [
        ({1: "narrow"}, "narrow", 1, 3),
        ({1: "none"}, "none", 1, 3),
        ({1: "full"}, "full", 1, 4),
        ({2: "attention"}, "attention", 2, 5),
    ],
)
def test_the_least_split_and_the_least_recomputation_are_suggested(monkeypatch, fitting, policy, split, compilations):
    """A compiler that only knows with which first policy a sample split over so many devices fits."""
    monkeypatch.setattr("refalign_jax.perf.search.num_devices", lambda config, topology: 64)
    asked = []

    def compiled(config, topology):
        mesh, remat = config.mesh, config.model.dit.remat
        first = fitting.get(mesh.context * mesh.tensor)
        asked.append((mesh, remat))
        return {
            "fits": first is not None and POLICIES.index(remat) >= POLICIES.index(first),
            "mesh": {"fsdp": mesh.fsdp, "context": mesh.context, "tensor": mesh.tensor},
            "remat": remat,
            "batch": config.data.batch_size,
            "slices": 1,
        }

    config = Config(model=ModelConfig(dit=wan_14b()), data=DataConfig(batch_size=3))
    *_, best = suggest(config, "v5p:4x4x4", compiled)
    assert best["fits"]
    assert (best["remat"], best["mesh"]["context"] * best["mesh"]["tensor"], best["batch"]) == (
        policy,
        split,
        64 // split,
    )
    assert len(asked) == len(set(asked)) == compilations
    assert options(best).endswith(f"--data.batch-size {64 // split} --model.dit.remat {policy}")


def test_what_fits_nowhere_is_said(monkeypatch):
    monkeypatch.setattr("refalign_jax.perf.search.num_devices", lambda config, topology: 4)
    config = Config(model=ModelConfig(dit=wan_14b()))
    with pytest.raises(ValueError, match="v5e:2x2 does not hold the step on any mesh"):
        list(suggest(config, "v5e:2x2", lambda config, topology: {"fits": False}))
    assert {(mesh.context, mesh.tensor) for mesh in meshes(config, 4)} == {
        (1, 1),
        (2, 1),
        (1, 2),
        (4, 1),
        (2, 2),
        (1, 4),
    }


REPORTS = sorted(
    path for folder in ("compiled", "gpu", "remat", "sample") for path in ROOT.glob(f"benchmarks/{folder}/*")
)


def test_reports_are_made_again_by_their_own_commands(monkeypatch, capsys):
    """The settings are in the reports alone: a recipe that exists, no place of another machine, the same file."""
    ran = []

    def run(command, **_):
        ran.append(command)
        return subprocess.CompletedProcess(command, 2 if len(ran) == 1 else 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert load("compile")(["--again", *map(str, REPORTS)], "compile.py") == 2, "the first one failed"
    printed = capsys.readouterr()
    assert printed.out.count("\n| train, ") == sum(
        "train" in path.read_text() for path in REPORTS if "sample" not in str(path)
    )
    assert f"unchanged: {REPORTS[0]}." in printed.err
    for path, (_, tool, recipe, *arguments) in zip(REPORTS, ran, strict=True):
        assert Path(tool).samefile(ROOT / "tools/compile.py")
        assert (ROOT / "configs" / Path(recipe).name).with_suffix(".py").exists()
        assert "--topology" in arguments
        assert arguments[-2:] == ["--json", str(path)]
        assert arguments.count("--json") == 1
        assert "--dump" not in arguments


def test_what_is_no_report_is_not_made_again(tmp_path):
    report = json.loads(REPORTS[0].read_text())
    several, nameless = tmp_path / "several.json", tmp_path / "nameless.json"
    several.write_text(json.dumps([report, report]))
    report["about"]["command"] = "tools/compile.py --topology v5e:2x2"
    nameless.write_text(json.dumps(report))
    for path, why in ((several, "too many values"), (nameless, "its command names no recipe")):
        with pytest.raises(ValueError, match=rf"--again .*{path.name}: no report of one compilation .*{why}"):
            load("compile")(["--again", str(path)], "compile.py")


def test_sampling_has_a_table_of_its_own():
    report = json.loads((ROOT / "benchmarks/sample/14b_h100_int8.json").read_text())
    stage = json.loads((ROOT / "benchmarks/sample/text_h100_int8.json").read_text())
    train = json.loads((ROOT / "benchmarks/compiled/1_1.3b_v5e_4x4.json").read_text())
    first, second = table([report, train, stage]).split("\n\n")
    assert first == table([train])
    assert second == table([report, stage])
    _, _, row, text = second.splitlines()
    assert "transformer, 14.3e9 on h100:1" in row
    assert " int8 " in row
    assert f"| {report['tflops']['model_a_sample']:,.0f} |" in row
    assert "UMT5, 5.7e9 on h100:1" in text
    assert "quantised" in summary(stage)


def test_quantised_weights_are_for_sampling_alone():
    common = ["tiny", "--topology", "v5e:2x2", "--weights-dtype", "int8"]
    for more, why in (
        ([], "for --step sample and text"),
        (["--step", "sample", "--sweep"], "--sweep and --suggest have"),
    ):
        with pytest.raises(ValueError, match=why):
            load("compile")([*common, *more], "compile.py")
