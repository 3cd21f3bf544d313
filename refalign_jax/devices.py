"""What accelerators can do, and the XLA flags that each platform wants: the one place for both.

    LIBTPU_INIT_ARGS="$(python -m refalign_jax.devices tpu)" python tools/train.py …
    XLA_FLAGS="$(python -m refalign_jax.devices gpu)" python tools/train.py …

Peaks are dense bfloat16. Bandwidths are both directions together where the vendor says so. Figures are of one device as
JAX counts them, which is a chip, except for TPU7x (Ironwood), whose chips are two devices each. Sources, read in
November 2026: Google's pages on TPU v4, v5e, v5p, v6e and TPU7x under "TPU system architecture"; NVIDIA's data sheets
of A100, H100, H200, HGX B200 and GB200 NVL72 (SXM unless named otherwise). A TPU's usable HBM is what its compiler
allows, which is less than what is built in.
"""

from __future__ import annotations

import dataclasses
import os
import sys

GIB = 2**30

XLA_FLAGS: dict[str, dict[str, str]] = {
    # From MaxDiffusion's guide to Wan2.1 on v5p ("Optimization", LIBTPU_INIT_ARGS), those that bear on this program:
    # room on the chip for the attention kernel's tiles, and collectives that run beside products. The first is from
    # MaxText's library of flags (DISABLE_COLLECTIVE_MATMUL): cut into windows to overlap with its reduce-scatter, the
    # gradient of a kernel reads the activations once a window, 16 times over 16 chips.
    "tpu": {
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
        "xla_tpu_scoped_vmem_limit_kib": "65536",
        "xla_tpu_enable_async_all_to_all": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
        "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
        "xla_tpu_data_parallel_opt_different_sized_ops": "true",
    },
    # From JAX's "GPU performance tips" and NVIDIA's JAX-Toolbox page of the same name: overlap, and collectives
    # combined into large ones.
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": "true",
        "xla_gpu_all_gather_combine_threshold_bytes": "1073741824",
        "xla_gpu_reduce_scatter_combine_threshold_bytes": "1073741824",
        "xla_gpu_all_reduce_combine_threshold_bytes": "1073741824",
    },
}
"""Flags by platform. None was measured here; tools/compile.py --flags shows how the TPU's change a program."""

NO_TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Environment in which libtpu compiles on a host without a TPU, and doesn't look for one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device of an accelerator.

    Attributes:
      kind: how JAX's `device_kind` begins.
      tflops: peak in bfloat16, 10^12 operations a second.
      hbm_gib: memory that a program may use, 2^30 bytes.
      hbm_gbps: bandwidth of that memory, 10^9 bytes a second.
      link_gbps: of the links to other chips (ICI or NVLink), both directions, 10^9 bytes a second.
      devices_per_chip: how many devices a chip is.
    """

    kind: str
    tflops: float
    hbm_gib: float
    hbm_gbps: float
    link_gbps: float
    devices_per_chip: int = 1


CHIPS: tuple[Chip, ...] = (
    Chip(kind="TPU v4", tflops=275, hbm_gib=30.75, hbm_gbps=1228, link_gbps=600),
    Chip(kind="TPU v5 lite", tflops=197, hbm_gib=15.75, hbm_gbps=819, link_gbps=400),
    Chip(kind="TPU v5e", tflops=197, hbm_gib=15.75, hbm_gbps=819, link_gbps=400),
    Chip(kind="TPU v5", tflops=459, hbm_gib=95.74, hbm_gbps=2765, link_gbps=1200),
    Chip(kind="TPU v6 lite", tflops=918, hbm_gib=31.25, hbm_gbps=1640, link_gbps=800),
    Chip(kind="TPU v6e", tflops=918, hbm_gib=31.25, hbm_gbps=1640, link_gbps=800),
    Chip(kind="TPU7x", tflops=1153.5, hbm_gib=94.75, hbm_gbps=3690, link_gbps=600, devices_per_chip=2),
    Chip(kind="NVIDIA A100", tflops=312, hbm_gib=80, hbm_gbps=2039, link_gbps=600),
    Chip(kind="NVIDIA H100 PCIe", tflops=756, hbm_gib=80, hbm_gbps=2000, link_gbps=600),
    Chip(kind="NVIDIA H100 NVL", tflops=835, hbm_gib=94, hbm_gbps=3900, link_gbps=600),
    Chip(kind="NVIDIA H100", tflops=989, hbm_gib=80, hbm_gbps=3350, link_gbps=900),
    Chip(kind="NVIDIA H200", tflops=989, hbm_gib=141, hbm_gbps=4800, link_gbps=900),
    Chip(kind="NVIDIA B200", tflops=2250, hbm_gib=178, hbm_gbps=7670, link_gbps=1800),
    Chip(kind="NVIDIA GB200", tflops=2500, hbm_gib=184, hbm_gbps=7930, link_gbps=1800),
)
"""First match."""


def chip(device_kind: str) -> Chip | None:
    """What is known of a device by its `device_kind`; None where it isn't in the table."""
    return next((entry for entry in CHIPS if device_kind.startswith(entry.kind)), None)


def peak_flops(device_kind: str) -> float | None:
    """Operations a second of one device in bfloat16; None where the table doesn't know it."""
    known = chip(device_kind)
    return None if known is None else known.tflops * 1e12


MEMORY_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
"""Environment variable with the share of a GPU's memory that JAX takes."""


def memory_fraction() -> float:
    """Returns the share of a GPU's memory that JAX takes, 0.75 unless the environment says otherwise.

    Source of the default: JAX's page "GPU memory allocation".

    Raises:
      ValueError: the variable is not a share; the CUDA plugin would fail to start, with another message.
    """
    given = os.environ.get(MEMORY_FRACTION, "0.75")
    try:
        fraction = float(given)
    except ValueError:
        fraction = -1.0
    if not 0 < fraction <= 1:
        raise ValueError(f"{MEMORY_FRACTION}={given!r} is not a share of the memory; give one such as 0.92.")
    return fraction


def check_backend() -> None:
    """Starts JAX's devices, so that what is wrong with them isn't taken for a fault of what is done next.

    Raises:
      OSError: they can't be started.
    """
    import jax  # flags are printed without it

    try:
        jax.devices()
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise OSError(
            f"JAX finds no device to compute on ({reason:.300}); check its driver, or set JAX_PLATFORMS=cpu."
        ) from error


def flag_line(platform: str) -> str:
    """The flags of a platform, `tpu` or `gpu`, as the environment takes them.

    Raises:
      ValueError: another platform.
    """
    if platform not in XLA_FLAGS:
        raise ValueError(f"{platform!r} has no flags; choose one of {', '.join(XLA_FLAGS)}.")
    return " ".join(f"--{name}={value}" for name, value in XLA_FLAGS[platform].items())


if __name__ == "__main__":
    print(flag_line(sys.argv[1] if len(sys.argv) == 2 else ""))
