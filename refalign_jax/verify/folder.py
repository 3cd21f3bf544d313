"""Verifies a folder of values, whatever it holds."""

from __future__ import annotations

from pathlib import Path

from refalign_jax.config import DType
from refalign_jax.verify.dit import check_dit
from refalign_jax.verify.encoders import CHECKS, check_encoders
from refalign_jax.verify.report import Profile, Report
from refalign_jax.verify.values import open_values


def verify(folder: Path, profile: Profile = "float32") -> Report:
    """Computes and compares all that `folder` holds; shows progress on stderr if that is a terminal.

    Args:
      folder: config.json, values.npz and weights, as docs/verify.md describes them.
      profile: tolerances and our compute dtype; `16bit` computes in bfloat16.

    Raises:
      ValueError: the folder lacks a file, or a file is not what its name says.
    """
    values, report = open_values(folder), Report(profile)
    compute_dtype: DType = "float32" if profile == "float32" else "bfloat16"
    weights = [f"{name}.safetensors" for name in CHECKS]
    if (folder / "weights.safetensors").is_file():
        check_dit(values, compute_dtype, report)
    elif any((folder / name).is_file() for name in weights):
        check_encoders(values, compute_dtype, report)
    else:
        raise ValueError(
            f"{folder} lacks weights.safetensors (of a transformer) and {', '.join(weights)} (of encoders)."
        )
    return report
