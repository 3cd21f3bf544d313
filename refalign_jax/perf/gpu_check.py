"""Every check that an NVIDIA GPU has to stand, in one run: numbers, kernels, speed.

Memory of 1.3B on one GPU, batch 1, float32 master weights, no moving average: parameters, two moments and gradients,
4 x 5.7 GB; 16-bit kernels, 2.9 GB; the residual stream of 30 blocks and 37,440 tokens in float32, 6.9 GB: 33 GB, and
what the remat policy keeps beside that, for `attention` 6.9 GB.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from refalign_jax.config import AttentionKernel, Config, Plan, RematPolicy
from refalign_jax.perf import benchmark
from refalign_jax.verify.folder import verify

TOKENS = 4096
"""At which the kernels are compared."""

CUDNN = "__cudnn$fmha"
"""How the custom calls of cuDNN's fused attention begin; those of its backward pass hold "Backward"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """One bar: what was found, and whether it stands."""

    bar: str
    found: str
    passed: bool


def check(
    config: Config,
    golden: Sequence[Path],
    plan: Plan,
    policies: Sequence[RematPolicy] = ("full", "attention", "narrow"),
    kernels: tuple[AttentionKernel, AttentionKernel] = ("cudnn", "xla"),
) -> tuple[dict[str, Any], list[Verdict]]:
    """Runs all checks.

    Args:
      config: what is trained and sampled.
      golden: folders of another framework's values.
      plan: how often is measured.
      policies: of remat, tried in turn; one that needs too much memory is told as such.
      kernels: of attention, compared in bfloat16, the second being the reference.

    Returns:
      All figures, and the verdicts.
    """
    verdicts = [*_numbers(golden), _kernels(kernels)]
    trained: dict[str, Any] = {}
    for policy in policies:
        dit = dataclasses.replace(config.model.dit, remat=policy)
        setting = dataclasses.replace(config, model=dataclasses.replace(config.model, dit=dit))
        trained[policy] = _measured(setting, "train", plan)
    ran = {policy: result for policy, result in trained.items() if "seconds" in result}
    for name, result in ran.items():
        calls = {call: n for call, n in result["kernels"].items() if call.startswith(CUDNN)}
        backward = any("Backward" in call for call in calls)
        passed = backward and any("Backward" not in call for call in calls)
        found = ", ".join(f"{n} {call}" for call, n in calls.items()) or "no such call"
        verdicts.append(Verdict(bar=f"cuDNN forward and backward, remat {name}", found=found, passed=passed))
    best = max(ran, key=lambda name: ran[name]["tflops_per_device"], default=None)
    mfu = ran[best]["mfu"] if best else None
    found = f"{mfu:.1%} with remat {best}" if mfu else "peak not known, or nothing ran"
    verdicts.append(Verdict(bar="train step: MFU of at least 45%", found=found, passed=bool(mfu and mfu >= 0.45)))
    sampled = _measured(config, "sample", plan)
    return {"train": trained, "sample": sampled, "verdicts": [dataclasses.asdict(v) for v in verdicts]}, verdicts


def _measured(config: Config, mode: benchmark.Mode, plan: Plan) -> dict[str, Any]:
    """Figures of one setting, or why there are none."""
    try:
        return benchmark.measure({"a": config}, mode, plan)["a"]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"failed": f"{str(error).splitlines()[0]:.300}"}


def _numbers(golden: Sequence[Path]) -> Iterator[Verdict]:
    """float32 with XLA's attention, against the values of other frameworks."""
    for folder in golden:
        with jax.default_matmul_precision("highest"):
            report = verify(folder)
        worst = max(report.rows, key=lambda row: row.relative / row.tolerance)
        found = f"{len(report.rows)} values, worst {worst.relative:.1e} of {worst.tolerance:.0e} ({worst.name})"
        yield Verdict(bar=f"float32 as {folder.name}", found=found, passed=report.passed)


def _kernels(kernels: tuple[AttentionKernel, AttentionKernel]) -> Verdict:
    """Two kernels beside each other."""
    bar = f"bfloat16 {kernels[0]} as {kernels[1]} at {TOKENS:,} tokens, at most 2e-2"
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
        forward, backward = benchmark.attention_difference(kernels, TOKENS)
        found = f"output {forward:.1e}, worst gradient {backward:.1e}"
        return Verdict(bar=bar, found=found, passed=max(forward, backward) <= 2e-2)
    return Verdict(bar=bar, found="a kernel that doesn't run here", passed=False)
