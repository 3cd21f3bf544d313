"""Searches among meshes and remat policies by compiling: all of a recipe's, or just enough to suggest the best fit.

`sweep` compiles every mesh that divides the recipe's batch. `suggest` chooses the batch too and compiles few: a sample
is split over as few devices as it fits on, since that takes the fewest collectives, and on that mesh the policy that
recomputes least is chosen. Its batch is one sample per data-parallel group; more are for gradient accumulation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

from refalign_jax.config import Config, DiTConfig, MeshConfig, RematPolicy
from refalign_jax.perf.ahead import BOUNDS, Step, compile_ahead
from refalign_jax.perf.topology import GPUS, topology_mesh

POLICIES: tuple[RematPolicy, ...] = get_args(RematPolicy)
"""From the one that recomputes nothing and needs the most memory to the one that retains nothing."""

RINGS = (1, 2, 4, 8)
"""Sizes of the ring axis that are suggested."""

Report = dict[str, Any]


def num_devices(config: Config, topology: str) -> int:
    """Returns the number of devices of a topology, over all slices of the recipe.

    Raises:
      ValueError: see `topology.topology_mesh`.
    """
    any_mesh = dataclasses.replace(config.mesh, data=0, fsdp=1, context=1, ring=1, tensor=1)
    return topology_mesh(any_mesh, topology).size


def meshes(config: Config, devices: int, rings: Sequence[int] = (1,)) -> Iterator[MeshConfig]:
    """Yields every mesh over which the heads can be split, those that split a sample least first.

    Args:
      config: gives the heads and the slices.
      devices: number of devices.
      rings: sizes of the ring axis, which the heads do not limit.
    """
    heads, slices = config.model.dit.num_heads, config.mesh.slices
    sizes = [(c * t, r, t) for c in range(1, heads + 1) for t in range(1, heads + 1) for r in rings]
    fitting = [size for size in sizes if heads % size[0] == 0]
    for parts, ring, tensor in sorted(fitting, key=lambda size: (size[0] * size[1], *size[1:])):
        groups = devices // (parts * ring)
        if devices % (parts * ring) == 0 and groups and groups % slices == 0:
            yield dataclasses.replace(
                config.mesh, data=slices, fsdp=groups // slices, context=parts // tensor, ring=ring, tensor=tensor
            )


def candidates(config: Config, devices: int) -> Iterator[Config]:
    """Yields recipes of every mesh that fits devices, batch and heads, each with every remat policy.

    The policies that recompute least come first.
    """
    batch = config.data.batch_size // config.optimizer.accumulation
    for mesh in meshes(config, devices):
        if batch % (mesh.data * mesh.fsdp) == 0:
            for remat in POLICIES:
                yield with_policy(dataclasses.replace(config, mesh=mesh), remat)


def sweep(config: Config, topology: str, step: Step = "train") -> Iterator[Report]:
    """Compiles the candidates and yields each report; for each mesh, up to the first policy that fits."""
    fitting: set[MeshConfig] = set()
    for candidate in candidates(config, num_devices(config, topology)):
        if candidate.mesh in fitting:
            continue
        report = compile_ahead(candidate, topology, step)
        if report["fits"]:
            fitting.add(candidate.mesh)
        yield report


def ranked(reports: list[Report]) -> list[Report]:
    """Returns the reports of what fits, the one with the lowest bound on its time first."""
    fitting = [report for report in reports if report["fits"]]
    return sorted(fitting, key=lambda r: max(r["bound_seconds"][name] for name in BOUNDS))


def suggest(
    config: Config, topology: str, compiled: Callable[[Config, str], Report] = compile_ahead
) -> Iterator[Report]:
    """Compiles the training step until the best fit is known; yields each report, that of the best fit last.

    Args:
      config: the recipe; its mesh, batch, accumulation and remat policy are replaced by those that are chosen.
      topology: see `topology.topology_mesh`.
      compiled: compiles a recipe for a topology.

    Raises:
      ValueError: no mesh fits, even if nothing is retained.
    """
    for mesh in meshes(config, num_devices(config, topology), (1,) if topology.partition(":")[0] in GPUS else RINGS):
        candidate = dataclasses.replace(
            config,
            mesh=mesh,
            data=dataclasses.replace(config.data, batch_size=mesh.data * mesh.fsdp),
            optimizer=dataclasses.replace(config.optimizer, accumulation=1),
        )
        best = compiled(with_policy(candidate, POLICIES[-1]), topology)
        yield best
        if best["fits"]:
            yield from _least_recomputation(candidate, topology, compiled, best)
            return
    raise ValueError(f"{topology} does not hold the step on any mesh, even with remat `full`; name more devices.")


def _least_recomputation(
    config: Config, topology: str, compiled: Callable[[Config, str], Report], best: Report
) -> Iterator[Report]:
    """Finds the first policy that fits by bisection, since memory falls from policy to policy; yields it last."""
    last, failing, fitting = best, -1, len(POLICIES) - 1
    while fitting - failing > 1:
        middle = (fitting + failing) // 2
        last = compiled(with_policy(config, POLICIES[middle]), topology)
        yield last
        if last["fits"]:
            fitting, best = middle, last
        else:
            failing = middle
    if last is not best:
        yield best


def with_policy(config: Config, remat: RematPolicy) -> Config:
    """Returns the recipe with another remat policy, without offloading."""
    dit: DiTConfig = dataclasses.replace(config.model.dit, remat=remat, offload=False)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dit=dit))


def options(report: Report) -> str:
    """Returns the command-line options of a recipe that give what a report compiled."""
    mesh = " ".join(f"--mesh.{name} {size}" for name, size in report["mesh"].items())
    slices = f" --mesh.slices {report['slices']}" if report["slices"] > 1 else ""
    return f"{mesh}{slices} --data.batch-size {report['batch']} --model.dit.remat {report['remat']}"
