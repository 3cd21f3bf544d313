"""The checks to run once on an NVIDIA GPU: numbers, kernels, speed.

Memory of 1.3B on one GPU with batch 1, float32 master weights and no moving average: parameters, two moments and
gradients, 4 x 5.7 GB; 16-bit kernels, 2.9 GB; the residual stream of 30 blocks and 37,440 tokens in float32, 6.9 GB.
Together 33 GB, and what the remat policy retains in addition: 6.9 GB for `attention`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refalign_jax.config import AttentionKernel, Config, Mode, Plan, RematPolicy
from refalign_jax.models.attention import attention
from refalign_jax.perf import benchmark
from refalign_jax.perf.progress import progress
from refalign_jax.types import Array, Float
from refalign_jax.verify.folder import verify

TOKENS = 4160
"""Number of tokens at which the kernels are compared: 64 more than a multiple of 128, like the 37,440 of training. A
fault of cuDNN's backward pass on Hopper was reported for such numbers of keys."""

CUDNN = "__cudnn$fmha"
"""Prefix of the custom calls of cuDNN's fused attention; those of its backward pass contain "Backward"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """One bar: what was found, and whether it passed."""

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
      plan: how often to measure.
      policies: remat policies, tried in turn, each with attention compiled with and without lengths; those that need
        too much memory are reported as such.
      kernels: two kernels of attention to compare in bfloat16; the second is the reference.

    Returns:
      All figures, and the verdicts.
    """
    verdicts = [*_numbers(golden), compare_kernels(kernels)]
    trained: dict[str, Any] = {}
    for policy, padded in itertools.product(policies, (True, False)):
        dit = dataclasses.replace(config.model.dit, remat=policy)
        model = dataclasses.replace(config.model, dit=dit)
        synthetic = dataclasses.replace(config.synthetic, padded_references=padded)
        name = policy if padded else f"{policy}, no padded references"
        trained[name] = _measured(dataclasses.replace(config, model=model, synthetic=synthetic), "train", plan)
    ran = {policy: result for policy, result in trained.items() if "seconds" in result}
    verdicts += [_cudnn(name, result["kernels"]) for name, result in ran.items()]
    best = max(ran, key=lambda name: ran[name]["tflops_per_device"], default=None)
    mfu = ran[best]["mfu"] if best else None
    found = f"{mfu:.1%} with remat {best}" if mfu else "peak not known, or nothing ran"
    verdicts.append(Verdict(bar="train step: MFU of at least 45%", found=found, passed=bool(mfu and mfu >= 0.45)))
    sampled = _measured(config, "sample", plan)
    return {"train": trained, "sample": sampled, "verdicts": [dataclasses.asdict(v) for v in verdicts]}, verdicts


def _cudnn(setting: str, kernels: Mapping[str, int]) -> Verdict:
    """Checks that both passes of a training step call cuDNN's attention."""
    calls = {call: count for call, count in kernels.items() if call.startswith(CUDNN)}
    backward = any("Backward" in call for call in calls)
    passed = backward and any("Backward" not in call for call in calls)
    found = ", ".join(f"{count} {call}" for call, count in calls.items()) or "no such call"
    return Verdict(bar=f"cuDNN forward and backward, remat {setting}", found=found, passed=passed)


def _measured(config: Config, mode: Mode, plan: Plan) -> dict[str, Any]:
    """Returns the figures of one setting, or why there are none."""
    try:
        return benchmark.measure({"a": config}, mode, plan)["a"]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"failed": f"{str(error).splitlines()[0]:.300}"}


def _numbers(golden: Sequence[Path]) -> Iterator[Verdict]:
    """Compares float32 with XLA's attention with the values of other frameworks."""
    for folder in golden:
        with jax.default_matmul_precision("highest"):
            report = verify(folder)
        worst = max(report.rows, key=lambda row: row.relative / row.tolerance)
        found = f"{len(report.rows)} values, worst {worst.relative:.1e} of {worst.tolerance:.0e} ({worst.name})"
        yield Verdict(bar=f"float32 as {folder.name}", found=found, passed=report.passed)


def compare_kernels(kernels: tuple[AttentionKernel, AttentionKernel]) -> Verdict:
    """Checks that two kernels agree in bfloat16."""
    bar = f"bfloat16 {kernels[0]} as {kernels[1]} at {TOKENS:,} tokens, at most 2e-2"
    try:
        with progress("comparing the attention kernels"):
            forward, backward = attention_difference(kernels, TOKENS)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        message = (str(error).strip() or repr(error)).splitlines()[0]
        return Verdict(bar=bar, found=f"a kernel does not run on this device: {message:.300}", passed=False)
    found = f"output {forward:.1e}, worst gradient {backward:.1e}"
    return Verdict(bar=bar, found=found, passed=max(forward, backward) <= 2e-2)


def attention_difference(
    kernels: tuple[AttentionKernel, AttentionKernel], tokens: int, heads: int = 12, head_width: int = 128
) -> tuple[float, float]:
    """Compares two kernels in bfloat16.

    The scores of every fourth query are far below those of the others, about -270 at a head width of 128, so that its
    log of the sum of exponentials is far below -88, where exp becomes 0 in float32.

    Args:
      kernels: a and b.
      tokens: number of queries, and of keys, of which the last eighth is padding.
      heads: N.
      head_width: K.

    Returns:
      ‖a − b‖ / ‖b‖ of their outputs, and the largest of their gradients.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (jax.random.normal(key, (1, tokens, heads, head_width), jnp.bfloat16) for key in keys)
    low = (jnp.arange(tokens) % 4 == 0)[:, None, None]
    q, k = jnp.where(low, -24, q).astype(q.dtype), k + 1
    lengths = jnp.array([tokens - tokens // 8])

    def loss(inputs: tuple[Array, Array, Array], kernel: AttentionKernel) -> tuple[Array, Array]:
        out = attention(*inputs, lengths, kernel)
        return jnp.sum(out.astype(jnp.float32) * weight), out

    def both(kernel: AttentionKernel) -> tuple[Array, ...]:
        gradients, out = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)((q, k, v), kernel)
        return (out, *gradients)

    a, b = map(both, kernels)
    forward, *backward = (_relative(x, y) for x, y in zip(a, b, strict=True))
    return forward, max(backward)


def _relative(a: Float[Array, "*sizes"], b: Float[Array, "*sizes"]) -> float:
    x, y = (np.asarray(value, np.float64) for value in (a, b))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))
