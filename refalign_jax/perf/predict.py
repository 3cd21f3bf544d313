"""Step time and MFU on paper: a compiled program's report, and what share of each peak is assumed to be reached.

    products     FLOPs outside of attention / peak
    attention    FLOPs between queries, keys and values / peak
    memory       bytes of element-wise passes / bandwidth of the memory
    links        bytes received by collectives / bandwidth of the links, or of the network between hosts of GPUs

Each is divided by its assumed share. A step takes the sum of the first three, and of the links what is not hidden
behind them. The range of the prediction is that of the shares.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from refalign_jax.devices import chip

NETWORK_GBPS = 50.0
"""Between hosts of GPUs, 10^9 bytes a second and GPU in one direction: one 400 Gbit/s adapter per GPU (DGX H100)."""

PARTS = ("products", "attention", "memory", "links")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
    """What share of each peak a program is assumed to reach.

    Attributes:
      products: large matrix products, of the peak in bfloat16.
      attention: kernels of attention, forward and backward together, of the same.
      memory: element-wise passes, of the bandwidth of the memory.
      links: collectives, of the bandwidth in one direction.
      hidden: share of the time of collectives during which the device also computes.
    """

    products: float
    attention: float
    memory: float
    links: float
    hidden: float


CAUTIOUS = Shares(products=0.6, attention=0.35, memory=0.7, links=0.6, hidden=0.0)
HOPEFUL = Shares(products=0.8, attention=0.6, memory=0.9, links=0.85, hidden=0.9)


def predict(report: Mapping[str, Any], shares: Shares) -> dict[str, float]:
    """Returns the seconds of each part of a training step, of the whole step, and its MFU between 0 and 1.

    Args:
      report: of `ahead.compile_ahead`.
      shares: what is assumed.

    Raises:
      ValueError: the report lacks what a prediction needs, since its program does not fit or it is an old one.
    """
    device = chip(report["device"])
    if device is None or report["step"] != "train" or not {"passes", "collectives"} <= report.keys():
        raise ValueError(
            f"The report on {report['topology']} is not of a training step, or lacks collectives and passes over "
            "memory; compile the training step again, for devices on which it fits."
        )
    work = report["tflops"]
    seconds = {
        "products": (work["hardware_a_device"] - work["attention_a_device"]) / device.tflops / shares.products,
        "attention": work["attention_a_device"] / device.tflops / shares.attention,
        "memory": report["passes"]["elementwise_gb"] / device.hbm_gbps / shares.memory,
        "links": _link_seconds(report, device.link_gbps / 2) / shares.links,
    }
    step = sum(seconds[part] for part in PARTS[:3]) + (1 - shares.hidden) * seconds["links"]
    mfu = work["model"] / report["devices"] / device.tflops / step
    return seconds | {"step": step, "mfu": mfu}


def _link_seconds(report: Mapping[str, Any], link_gbps: float) -> float:
    """Seconds of a step's collectives at the peak of what carries them.

    Between hosts of GPUs that is the network, for all but all-to-all: the mesh keeps the context axis inside a host.
    """
    hosts = report["platform"] == "gpu" and "x" in report["topology"]
    total = 0.0
    for kind, moved in report["collectives"].items():
        total += moved["gb"] / (NETWORK_GBPS if hosts and kind != "all-to-all" else link_gbps)
    return total


def table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Returns predictions as a Markdown table, one report per row; times and MFU from hopeful to cautious."""
    head = ["step", "batch, latents, references", "mesh, remat", *PARTS, "step", "MFU"]
    rows = [head, ["---"] * len(head)]
    for report in reports:
        low, high = predict(report, HOPEFUL), predict(report, CAUTIOUS)
        mesh = ", ".join(f"{name} {size}" for name, size in report["mesh"].items() if size > 1)
        grid = "x".join(map(str, report["latent_grid"]))
        rows.append(
            [
                f"{report['parameters'] / 1e9:.1f}e9 on {report['topology']}",
                f"{report['batch']}, {grid}, {report['references']}",
                f"{mesh}, `{report['remat']}`",
                *(f"{low[part]:.1f} to {high[part]:.1f} s" for part in (*PARTS, "step")),
                f"{100 * high['mfu']:.0f} to {100 * low['mfu']:.0f}%",
            ]
        )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    for name, shares in (("hopeful", HOPEFUL), ("cautious", CAUTIOUS)):
        listed = ", ".join(f"{field} {value:g}" for field, value in dataclasses.asdict(shares).items())
        lines.append(f"{name}: {listed}")
    return "\n".join(lines)
