"""Removal of the background of a picture behind one small interface, so that a subject comes on white.

The model was trained with subjects cut out. The one implementation is that of rembg (`pip install -e
'.[background]'`), which runs BiRefNet and others by ONNX Runtime and fetches their weights on first use.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from refalign_jax.atomic import first_line


class CutOut(Protocol):
    """Finds the subject of a picture."""

    def describe(self) -> dict[str, Any]:
        """Returns JSON that identifies it."""
        ...

    def matte(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
        """Computes how opaque the subject is in each pixel, 0 to 255.

        Raises:
          ValueError: it can't run.
        """
        ...


def open_cut_out(model: str) -> CutOut | None:
    """Opens a model of rembg by its name, such as birefnet-general, isnet-general-use or u2net; None for an empty name.

    Raises:
      ValueError: rembg is not installed, or knows no such model.
    """
    return Rembg(model) if model else None


class Rembg:
    """A model of the package rembg; its weights are read, or fetched, at the first picture.

    Args:
      model: its name.

    Raises:
      ValueError: the package is not installed, or knows no such model.
    """

    def __init__(self, model: str) -> None:
        try:
            import rembg
            from rembg.sessions import sessions_names
        except ImportError as error:
            raise ValueError(
                f"--remove-background {model} needs the package rembg ({first_line(error)}): pip install "
                "'rembg[cpu]'. Without it, give references that are cut out, or masks."
            ) from error
        if model not in sessions_names:
            raise ValueError(f"rembg knows no model {model!r}; choose one of {', '.join(sessions_names)}.")
        self._rembg: Any = rembg
        self._model, self._session = model, None

    def describe(self) -> dict[str, Any]:
        """Returns JSON that identifies the model."""
        return {"name": "rembg", "model": self._model, "version": str(getattr(self._rembg, "__version__", ""))}

    def matte(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
        """Computes the matte as `CutOut.matte` specifies."""
        try:
            if self._session is None:
                self._session = self._rembg.new_session(self._model)
            found = self._rembg.remove(Image.fromarray(image), session=self._session, only_mask=True)
        except Exception as error:  # of ONNX Runtime, of the network, of the package
            raise ValueError(
                f"rembg can't run {self._model} ({type(error).__name__}: {first_line(error)}); where there is no "
                f"network, put its weights into ~/.u2net first: rembg d {self._model}."
            ) from error
        return np.asarray(found.convert("L").resize(image.shape[1::-1]))
