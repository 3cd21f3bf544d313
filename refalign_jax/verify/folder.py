"""Recognises what a folder of values holds and verifies it."""

from __future__ import annotations

import json
from pathlib import Path

from refalign_jax.config import DType
from refalign_jax.verify.dit import DiTCheck
from refalign_jax.verify.encoders import FILES, EncodersCheck
from refalign_jax.verify.report import Profile, Report


def verify(folder: Path, profile: Profile = "float32") -> Report:
    """Computes and compares all that `folder` holds.

    Args:
      folder: config.json, values.npz and weights; see docs/verify.md.
      profile: tolerances and our compute dtype; `16bit` computes in bfloat16.

    Raises:
      ValueError: the folder lacks a file, or a file is not what its name says.
    """
    if not folder.is_dir():
        raise ValueError(f"The folder {folder} does not exist.")
    for name in ("config.json", "values.npz"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no folder of values: it lacks {name}.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is not JSON: {error}.") from error
    compute_dtype: DType = "float32" if profile == "float32" else "bfloat16"
    report = Report(profile)
    if (folder / "weights.safetensors").is_file():
        DiTCheck(folder, config, compute_dtype, report).run()
    elif any((folder / name).is_file() for name in FILES):
        EncodersCheck(folder, config, compute_dtype, report).run()
    else:
        raise ValueError(f"{folder} lacks weights.safetensors (of a transformer) and {', '.join(FILES)} (of encoders).")
    return report
