"""What `ahead` and its tables compute without the TPU's compiler."""

import dataclasses
import json
import math

import pytest
from support.places import ROOT

from refalign_jax.config import Config, DataConfig, MeshConfig, ModelConfig, wan_14b
from refalign_jax.devices import chip
from refalign_jax.initial import model_shapes
from refalign_jax.perf import hlo
from refalign_jax.perf.ahead import bounds, needed_gib
from refalign_jax.perf.search import POLICIES, candidates, meshes, options, ranked, suggest
from refalign_jax.perf.tables import parameter_table, table
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
