"""The table of accelerators."""

import os
import subprocess
import sys

import pytest

from refalign_jax.devices import chip, flag_line, peak_flops


def test_devices_are_known_by_their_kind():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("cpu") is None
    known = chip("TPU v6 lite")
    assert known is not None
    assert known.hbm_gib == 31.25


def test_flags_as_the_environment_takes_them():
    assert "--xla_tpu_scoped_vmem_limit_kib=65536" in flag_line("tpu").split()
    with pytest.raises(ValueError, match="choose one of tpu, gpu"):
        flag_line("cpu")


def test_xla_knows_the_gpu_flags():
    """An unknown flag ends the process."""
    for flags, code in ((flag_line("gpu"), True), ("--xla_gpu_no_such_flag=true", False)):
        environment = {**os.environ, "XLA_FLAGS": flags}
        done = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True)
        assert (done.returncode == 0) is code, flags
