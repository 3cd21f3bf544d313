"""Compilation for TPU topologies on a host without a TPU: reports are right, impossible settings are refused."""

import json
import math
import subprocess
import sys

import pytest
from support.places import ROOT, TESTS, environment

pytest.importorskip("libtpu")

from refalign_jax.perf import hlo
from refalign_jax.perf.tables import summary, table

COMMAND = [sys.executable, str(ROOT / "tools/compile.py"), str(TESTS / "support/ahead_recipe.py")]


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


def test_a_training_step_for_a_slice_that_is_not_there(compiled):
    report, _, printed = compiled
    assert (report["devices"], report["device"], report["fits"]) == (4, "TPU v5 lite", True)
    assert report["mesh"] == {"data": 1, "fsdp": 2, "context": 2, "ring": 1, "tensor": 1}
    assert 0 < report["memory_gib"]["arguments"] < report["memory_gib"]["total"] < 1
    assert report["collectives"].keys() >= {"all-gather", "all-to-all"}
    assert printed.strip() == summary(report)


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


def test_what_does_not_fit_is_reported_with_what_it_needs(tmp_path):
    big = ("--synthetic.latent-grid", "41", "96", "96", "--data.batch-size", "64", "--model.dit.remat", "none")
    done = run("--topology", "v5e:2x2", *big, "--json", str(tmp_path / "report.json"))
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["fits"]
    assert report["memory_gib"]["total"] > report["memory_gib"]["device"]
    assert "fits         no" in done.stdout
    assert "does not fit" in table([report])


def test_a_sweep_ranks_the_meshes_that_fit(tmp_path):
    done = run("--topology", "v5e:2x2", "--sweep", "--json", str(tmp_path / "reports.json"))
    assert done.returncode == 0, done.stderr
    reports = json.loads((tmp_path / "reports.json").read_text())
    sizes = [tuple(report["mesh"][name] for name in ("fsdp", "context", "tensor")) for report in reports]
    assert sizes == [(2, 2, 1), (2, 1, 2)], "two examples and two heads leave no others"
    assert {report["remat"] for report in reports} == {"none"}, "the first policy fits"
    assert "2 fit; the fastest by its bounds first:" in done.stdout
    assert run("--table", str(tmp_path / "reports.json")).stdout.strip() == table(reports)


def test_what_does_not_fit_each_other_is_refused_before_compiling():
    (of_training,) = (ROOT / "benchmarks").glob("*-cpu-train.json")
    for arguments, sentence in (
        (("--topology", "v9:1x1"), "can't be used"),
        (("--topology", "v5e:2x4", "--mesh.data", "1"), "is not the number of devices, 8"),
        (("--topology", "v5e:2x2", "--mesh.fsdp", "1", "--mesh.context", "4"), "num_heads=2 is not divisible"),
        ((), "Name a topology"),
        (("--table", "benchmarks/none.json"), "benchmarks/none.json does not exist"),
        (("--table", str(of_training)), "it lacks devices, memory_gib, tiles, topology"),
    ):
        done = run(*arguments)
        assert done.returncode == 2, done.stdout
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr
