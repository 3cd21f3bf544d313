"""The table of accelerators."""

from refalign_jax.devices import chip, peak_flops


def test_devices_are_known_by_their_kind():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("cpu") is None
    known = chip("TPU v6 lite")
    assert known is not None
    assert known.hbm_gib == 31.25
