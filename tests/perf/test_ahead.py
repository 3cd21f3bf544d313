"""Compilation for TPU topologies on a host without a TPU: reports are right, impossible settings are refused.

The tests that compile are skipped where libtpu is not installed.
"""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys

import pytest
from support.places import ROOT, TESTS, environment

from refalign_jax.config import Config, MeshConfig, ModelConfig, wan_14b
from refalign_jax.devices import chip
from refalign_jax.initial import model_shapes
from refalign_jax.perf import hlo
from refalign_jax.perf.ahead import bounds, candidates, known_chip, needed_gib, ranked
from refalign_jax.perf.tables import parameter_table, summary, table
from refalign_jax.sharding import make_mesh
from refalign_jax.trees import count

COMMAND = [sys.executable, str(ROOT / "tools/compile.py"), str(TESTS / "support/ahead_recipe.py")]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def run(*arguments: str) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in environment().items() if name != "XLA_FLAGS"}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=variables, check=False)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The report and the program of two blocks on a slice with a context of two."""
    folder = tmp_path_factory.mktemp("ahead")
    done = run("--topology", "v5e:2x2", "--json", str(folder / "report.json"), "--dump", str(folder))
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text()), (folder / "optimized.hlo.txt").read_text(), done.stdout


@needs_libtpu
def test_a_training_step_for_a_slice_that_is_not_there(compiled):
    report, _, printed = compiled
    assert (report["chips"], report["chip"], report["fits"]) == (4, "TPU v5 lite", True)
    assert report["mesh"] == {"data": 1, "fsdp": 2, "context": 2, "tensor": 1}
    assert 0 < report["memory_gib"]["arguments"] < report["memory_gib"]["total"] < 1
    assert report["collectives"].keys() >= {"all-gather", "all-to-all"}
    assert printed.strip() == summary(report)


@needs_libtpu
def test_no_token_sequence_is_gathered_and_no_score_matrix_exists(compiled):
    _, text, _ = compiled
    program = hlo.parse(text)
    assert hlo.kernels(program)["tpu_custom_call"] >= 6, "splash attention: forwards, again, backwards; of both kinds"
    video, references, width = 3 * 24 * 24, 2 * 24 * 24, 256
    for sizes in hlo.arrays(program, "all-gather"):
        assert math.prod(sizes) < video * width, sizes
        assert not {video, references} & set(sizes) or width not in sizes, sizes
    for sizes in hlo.arrays(program):
        assert sum(n >= video for n in sizes) < 2, sizes


@needs_libtpu
def test_what_does_not_fit_is_reported_with_what_it_needs(tmp_path):
    big = ("--synthetic.latent-grid", "41", "96", "96", "--data.batch-size", "64", "--model.dit.remat", "none")
    done = run("--topology", "v5e:2x2", *big, "--json", str(tmp_path / "report.json"))
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["fits"]
    assert report["memory_gib"]["total"] > report["memory_gib"]["chip"]
    assert "fits         no" in done.stdout
    assert "does not fit" in table([report])


def test_what_compilers_say_of_memory():
    assert needed_gib("Ran out of memory in memory space hbm. Used 17.07G of 15.75G hbm.") == 17.07
    assert needed_gib("total memory required for HLO temporaries (1.5T) exceeds available HBM (95.73G)") == 1536
    assert needed_gib("another failure") is None


@needs_libtpu
def test_a_sweep_ranks_the_meshes_that_fit(tmp_path):
    done = run("--topology", "v5e:2x2", "--sweep", "--json", str(tmp_path / "reports.json"))
    assert done.returncode == 0, done.stderr
    reports = json.loads((tmp_path / "reports.json").read_text())
    sizes = [tuple(report["mesh"][name] for name in ("fsdp", "context", "tensor")) for report in reports]
    assert sizes == [(2, 1, 2), (2, 2, 1)], "two examples and two heads leave no others"
    assert {report["remat"] for report in reports} == {"none"}, "the first policy fits"
    assert "2 fit; the fastest by its bounds first:" in done.stdout
    assert run("--table", str(tmp_path / "reports.json")).stdout.strip() == table(reports)


@needs_libtpu
def test_what_does_not_fit_each_other_is_refused_before_compiling():
    for arguments, sentence in (
        (("--topology", "v9:1x1"), "can't be used"),
        (("--topology", "v5e:2x4", "--mesh.data", "1"), "is not the number of devices, 8"),
        (("--topology", "v5e:2x2", "--mesh.fsdp", "1", "--mesh.context", "4"), "num_heads=2 is not divisible"),
        ((), "Name a topology"),
        (("--table", "benchmarks/none.json"), "can't be read as a report"),
        (("--table", str(ROOT / "benchmarks/2026-11-26-cpu-train.json")), "it lacks memory_gib, tiles, topology"),
    ):
        done = run(*arguments)
        assert done.returncode == 2, done.stdout
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


def test_the_table_of_parameters_adds_up():
    config = Config(model=ModelConfig(dit=wan_14b()), mesh=MeshConfig(fsdp=1))
    lines = parameter_table(config).splitlines()
    assert int(lines[-1].split()[0].replace(",", "")) == 4 * count(model_shapes(config.model))
    spread = parameter_table(dataclasses.replace(config, mesh=MeshConfig(fsdp=4, context=2, tensor=2))).splitlines()
    (ffn,) = [line for line in spread if line.startswith("dit/blocks/ffn/in/kernel")]
    assert ffn.split()[-3:] == ["fsdp·context,", "tensor", f"{40 * 5120 * 13824 * 4 // 16:,}"]


def test_candidates_fit_chips_batch_and_heads():
    config = Config(model=ModelConfig(dit=wan_14b()))
    found = [candidate.mesh for candidate in candidates(dataclasses.replace(config), 64)]
    sizes = {(mesh.fsdp, mesh.context, mesh.tensor) for mesh in found}
    assert (8, 8, 1) in sizes
    assert (8, 4, 2) in sizes
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


@pytest.mark.parametrize("folder", ["compiled", "remat"])
def test_the_tables_on_the_page_are_made_from_the_reports(folder):
    reports = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / folder).glob("*.json"))]
    assert len(reports) > 4
    assert table(reports) in (ROOT / "docs/pods-and-memory.md").read_text()
