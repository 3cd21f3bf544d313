"""Compilation for NVIDIA GPUs on a host without one: reports are right, impossible settings are refused."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.places import ROOT, TESTS, environment

pytest.importorskip("jax_cuda13_plugin")

from refalign_jax.config import MeshConfig
from refalign_jax.perf import hlo
from refalign_jax.perf.tables import summary
from refalign_jax.perf.topology import GPUS, topology_mesh

COMMAND = [sys.executable, str(ROOT / "tools/compile.py"), str(TESTS / "support/ahead_recipe.py")]
SIXTEEN_BIT = ("--model.dit.compute-dtype", "bfloat16")


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    known = {name: value for name, value in environment().items() if name != "XLA_FLAGS"} | variables
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=known, check=False)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The report, the program and what was printed for two blocks on four GPUs with a context of two."""
    folder = tmp_path_factory.mktemp("ahead")
    done = run("--topology", "h100:4", *SIXTEEN_BIT, "--json", str(folder / "report.json"), "--dump", str(folder))
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text()), dumped(folder), done.stdout


def test_a_training_step_for_gpus_that_are_not_there(compiled):
    report, text, printed = compiled
    assert (report["devices"], report["device"], report["platform"]) == (4, "NVIDIA H100", "gpu")
    assert report["memory_gib"]["device"] == pytest.approx(0.75 * 79.11, abs=0.01)
    assert 0 < report["memory_gib"]["arguments"] < report["memory_gib"]["total"] < 1
    assert report["collectives"].keys() >= {"all-gather", "all-to-all"}
    assert printed.strip() == summary(report)
    assert "cuDNN is not asked" in printed
    kernels = hlo.kernels(hlo.parse(text))
    assert any(name.startswith("__cudnn$fmha") and "Backward" in name for name in kernels), kernels


def test_attention_has_no_lengths_where_no_reference_is_padded(compiled, tmp_path):
    arguments = ("--synthetic.no-padded-references", "--dump", str(tmp_path))
    done = run("--topology", "h100:4", *SIXTEEN_BIT, *arguments)
    assert done.returncode == 0, done.stderr
    masks = [set(re.findall(r'"mask_type": ?"(\w+)"', text)) for text in (compiled[1], dumped(tmp_path))]
    assert masks == [{"NO_MASK", "PADDING"}, {"NO_MASK"}], "attention to the text has none in either"


def dumped(folder) -> str:
    return (folder / "optimized.hlo.txt").read_text()


def test_memory_is_compared_with_the_share_that_jax_takes():
    done = run("--topology", "h100:4", *SIXTEEN_BIT, XLA_PYTHON_CLIENT_MEM_FRACTION="0.0002")
    assert done.returncode == 1, done.stderr
    assert "fits         no" in done.stdout
    done = run("--topology", "h100:4", *SIXTEEN_BIT, XLA_PYTHON_CLIENT_MEM_FRACTION="most")
    assert done.returncode == 2
    assert done.stderr.startswith("error: XLA_PYTHON_CLIENT_MEM_FRACTION='most' is not a share of the memory")


@pytest.mark.parametrize("kind", GPUS)
def test_bytes_of_collectives_are_those_of_a_counted_program(kind):
    """Two weights are gathered together, and their gradients scattered together."""
    mesh = topology_mesh(MeshConfig(fsdp=8), f"{kind}:8")
    assert (mesh.size, mesh.devices.flat[0].device_kind) == (8, GPUS[kind].name)

    def exchange(a, b):
        whole = [jax.lax.all_gather(x, "fsdp", tiled=True) for x in (a, b)]
        return [jax.lax.psum_scatter(jnp.sin(x), "fsdp", tiled=True) for x in whole]

    split = PartitionSpec("fsdp")
    shapes = [
        jax.ShapeDtypeStruct(size, jnp.float32, sharding=NamedSharding(mesh, split))
        for size in ((256, 512), (512, 128))
    ]
    program = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=split, out_specs=split))
    moved = hlo.collectives(hlo.parse(program.lower(*shapes).compile().as_text()))
    received = 4 * (256 * 512 + 512 * 128) * 7 // 8
    assert moved.received["all-gather"] == received
    assert moved.received["reduce-scatter"] == received


def test_quantised_weights_of_sampling(tmp_path):
    """Arguments are a byte for each weight of the blocks' kernels, and no stack of them exists at full size."""
    one = ("--mesh.fsdp", "1", "--mesh.context", "1", "--data.batch-size", "1", "--step", "sample", *SIXTEEN_BIT)
    one += ("--model.dit.ffn-width", "16384")
    reports = []
    for name, options in (("whole", ()), ("int8", ("--weights-dtype", "int8"))):
        out = ("--json", str(tmp_path / f"{name}.json"), "--dump", str(tmp_path / name))
        done = run("--topology", "h100:1", *one, *options, *out)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads((tmp_path / f"{name}.json").read_text()))
    kernels, scales = 2 * (8 * 256 * 256 + 2 * 256 * 16384), 2 * (9 * 256 + 16384)
    rest = reports[0]["parameters"] - kernels
    saved = 2 * kernels - (kernels + 4 * scales) - 2 * rest  # what is not quantised is float32 instead of bfloat16
    arguments = [report["memory_gib"]["arguments"] * 2**30 for report in reports]
    assert arguments[0] - arguments[1] == pytest.approx(saved, abs=2**21)  # reports have three decimals of a GiB
    text = (tmp_path / "int8" / "optimized.hlo.txt").read_text()
    assert "s8[2,256,16384]" in text
    assert not re.search(r"(bf16|f32)\[2,256,16384\]", text)


def test_what_gpus_do_not_have_is_refused():
    for arguments, sentence in (
        (("--topology", "h100:2x2x2"), "GPUs are hosts x GPUs per host"),
        (("--topology", "h100:8", "--mesh.slices", "2"), "slices are of TPUs alone"),
        (("--topology", "h100:8", "--mesh.data", "1"), "is not the number of devices, 8"),
        (("--topology", "gh200:4"), "GPUs: a100, h100, h200, b200, gb200"),
    ):
        done = run(*arguments)
        assert done.returncode == 2, done.stdout
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr
