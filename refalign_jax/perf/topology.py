"""Devices that need not be present: TPU slices and NVIDIA GPUs, as their compilers know them.

libtpu compiles for a TPU slice by name. XLA compiles for an NVIDIA GPU from a description of it, which `GPUS` holds.
JAX's CUDA plugin contains that compiler. Beside it cuDNN's library is needed, whose version JAX asks for; a GPU is not.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jax.experimental import topologies
from jax.sharding import Mesh

from refalign_jax.config import MeshConfig
from refalign_jax.devices import GIB, Chip, chip, memory_fraction
from refalign_jax.sharding import make_mesh

EXAMPLES = "v5p:4x4x4, tpu7x:2x2x1 or h100:8"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What XLA's compiler needs to know of an NVIDIA GPU.

    Attributes:
      name: as JAX's `device_kind` reads.
      capability: CUDA compute capability, major and minor.
      cores: streaming multiprocessors.
      fpus_per_core: float32 units per multiprocessor.
      memory: bytes of device memory that the driver offers.
      bandwidth: of that memory, bytes a second.
      l2: bytes of the L2 cache.
      clock_ghz: the highest clock of the multiprocessors.
      shared_per_core: bytes of shared memory per multiprocessor.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    memory: int
    bandwidth: int
    l2: int
    clock_ghz: float
    shared_per_core: int

    @property
    def text(self) -> str:
        """The description in the text format of XLA's GpuTargetConfigProto."""
        major, minor = self.capability
        accelerated = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
        fields = {
            "threads_per_warp": 32,
            "threads_per_block_limit": 1024,
            "threads_per_core_limit": 2048,
            "thread_dim_limit_x": 1024,
            "thread_dim_limit_y": 1024,
            "thread_dim_limit_z": 64,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
            "registers_per_core_limit": 2**16,
            "registers_per_block_limit": 2**16,
            "shared_memory_per_block": 48 * 2**10,
            "shared_memory_per_block_optin": self.shared_per_core - 2**10,
            "shared_memory_per_core": self.shared_per_core,
            "core_count": self.cores,
            "fpus_per_core": self.fpus_per_core,
            "clock_rate_ghz": self.clock_ghz,
            "l2_cache_size": self.l2,
            "memory_bandwidth": self.bandwidth,
            "device_memory_size": self.memory,
        }
        return "\n".join(
            [
                "gpu_device_info {",
                *(f"  {name}: {value}" for name, value in fields.items()),
                f"  cuda_compute_capability {{ major: {major} minor: {minor}{accelerated} }}",
                "}",
                'platform_name: "CUDA"',
                "dnn_version_info { major: 9 minor: 10 }",
                f'device_description_str: "{self.name}"',
            ]
        )


GPUS: Mapping[str, Gpu] = {
    "a100": Gpu(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        fpus_per_core=64,
        memory=85_100_068_864,
        bandwidth=2_039_040_000_000,
        l2=40 * 2**20,
        clock_ghz=1.41,
        shared_per_core=164 * 2**10,
    ),
    "h100": Gpu(
        name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        cores=132,
        fpus_per_core=128,
        memory=84_942_979_072,
        bandwidth=3_352_320_000_000,
        l2=50 * 2**20,
        clock_ghz=1.98,
        shared_per_core=228 * 2**10,
    ),
    "h200": Gpu(
        name="NVIDIA H200",
        capability=(9, 0),
        cores=132,
        fpus_per_core=128,
        memory=151_397_597_184,
        bandwidth=4_800_000_000_000,
        l2=50 * 2**20,
        clock_ghz=1.98,
        shared_per_core=228 * 2**10,
    ),
    "b200": Gpu(
        name="NVIDIA B200",
        capability=(10, 0),
        cores=148,
        fpus_per_core=128,
        memory=191_514_411_008,
        bandwidth=7_672_320_000_000,
        l2=132_644_864,
        clock_ghz=1.965,
        shared_per_core=228 * 2**10,
    ),
    "gb200": Gpu(
        name="NVIDIA GB200",
        capability=(10, 0),
        cores=152,
        fpus_per_core=128,
        memory=197_897_748_480,
        bandwidth=7_928_064_000_000,
        l2=135_528_448,
        clock_ghz=2.062,
        shared_per_core=228 * 2**10,
    ),
}
"""GPUs that can be compiled for, SXM boards. Source of the figures: the descriptions that XLA's compiler is tested with
(openxla/xla, xla/backends/gpu/target_config/specs, read in November 2026). It has none of GH200."""


def topology_mesh(config: MeshConfig, topology: str) -> Mesh:
    """Returns the configured mesh over devices that need not exist.

    Args:
      config: the mesh; of a TPU slice, `config.slices` of them are used.
      topology: a TPU slice such as v5p:4x4x4, v5e:16x16, v6e:8x8, tpu7x:2x2x1, or GPUs such as h100:8 (one host) and
        h100:4x8 (4 hosts of 8). The variables in `devices.NO_TPU` must be in the environment before JAX is imported, so
        that JAX does not look for devices.

    Raises:
      ValueError: the compiler is missing, it does not support the topology, or the mesh does not fit its devices.
    """
    if not re.fullmatch(r"[^:]+:[1-9]\d*(x[1-9]\d*)*", topology):
        raise ValueError(f"--topology {topology!r} can't be used; give one such as {EXAMPLES}.")
    kind, _, sizes = topology.partition(":")
    described = _gpus(config, topology, kind, sizes) if kind in GPUS else _tpus(config, topology)
    return make_mesh(config, list(described.devices))


def _tpus(config: MeshConfig, topology: str) -> Any:
    """A TPU slice, or several."""
    more = {"num_slices": config.slices} if config.slices > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    except Exception as error:  # libtpu is missing, or refuses the topology with one of several exceptions
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--topology {topology!r} can't be used ({reason:.200}); give one such as {EXAMPLES}, with libtpu "
            f"installed for TPUs (pip install libtpu). GPUs: {', '.join(GPUS)}."
        ) from error


def _gpus(config: MeshConfig, topology: str, kind: str, sizes: str) -> Any:
    """GPUs of one or several hosts; XLA's own name is partitions x hosts x GPUs per host."""
    counts = sizes.split("x")
    if len(counts) > 2:
        raise ValueError(f"--topology {topology!r} can't be used; GPUs are hosts x GPUs per host, as in {kind}:4x8.")
    if config.slices > 1:
        raise ValueError(f"mesh.slices={config.slices} can't be used with {topology}; slices are of TPUs alone.")
    hosts, per_host = ("1", *counts)[-2:]
    try:
        return topologies.get_topology_desc(
            platform="cuda", target_config=GPUS[kind].text, topology=f"1x{hosts}x{per_host}"
        )
    except Exception as error:  # the plugin is missing or of another version
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--topology {topology!r} can't be used ({reason:.200}); it needs JAX's CUDA plugin of jax's own version: "
            "pip install -e '.[ahead-gpu]'."
        ) from error


def known_chip(mesh: Mesh, topology: str) -> Chip:
    """Returns the table's entry for the devices of a mesh.

    Raises:
      ValueError: the table has none.
    """
    kind = mesh.devices.flat[0].device_kind
    found = chip(kind)
    if found is None:
        raise ValueError(
            f"--topology {topology!r} has devices of kind {kind!r}, whose peak, memory and bandwidth are not in CHIPS "
            "of refalign_jax/devices.py; add them there."
        )
    return found


def is_gpu(mesh: Mesh) -> bool:
    """Whether a mesh is of GPUs."""
    return bool(mesh.devices.flat[0].platform in ("gpu", "cuda"))


def usable_gib(mesh: Mesh, known: Chip) -> float:
    """Returns the memory of one device that a program may use, 2^30 bytes.

    A TPU's compiler refuses what needs more. A GPU's does not, so that JAX's share of the memory is the limit.

    Raises:
      ValueError: see `devices.memory_fraction`.
    """
    if not is_gpu(mesh):
        return known.hbm_gib
    named = next((gpu for gpu in GPUS.values() if gpu.name == mesh.devices.flat[0].device_kind), None)
    return round(memory_fraction() * (named.memory / GIB if named else known.hbm_gib), 2)
