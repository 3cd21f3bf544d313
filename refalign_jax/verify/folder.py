"""Verifies a folder of values, whatever it holds."""

from __future__ import annotations

from pathlib import Path

from refalign_jax.config import DType
from refalign_jax.verify.dit import Options, check_dit
from refalign_jax.verify.encoders import CHECKS, check_encoders
from refalign_jax.verify.report import Profile, Report
from refalign_jax.verify.values import open_values


def verify(folder: Path, profile: Profile = "float32", options: Options | None = None) -> Report:
    """Computes and compares all that `folder` holds; shows progress on stderr if that is a terminal.

    Args:
      folder: values.npz and weights, and config.json where the weights don't say all, as docs/verify.md describes them.
      profile: tolerances and our compute dtype; `16bit` computes in bfloat16.
      options: of a transformer.

    Raises:
      ValueError: the folder lacks a file, or a file is not what its name says.
    """
    values, report = open_values(folder), Report(profile)
    options = options or Options()
    compute_dtype: DType = "float32" if profile == "float32" else "bfloat16"
    encoders = any((folder / f"{name}.safetensors").is_file() for name in CHECKS)
    if encoders and options.weights is None and not (folder / "weights.safetensors").is_file():
        check_encoders(values, compute_dtype, report)
    else:
        check_dit(values, compute_dtype, report, options)
    return report
