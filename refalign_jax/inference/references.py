"""References as the model sees them: the subject on white, in the size of the video."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from refalign_jax.data.images import is_cut_out, read_image
from refalign_jax.data.records import Reference
from refalign_jax.data.references import load_reference, put_on_white
from refalign_jax.inference.background import CutOut

_OPAQUE = 128
"""Opacity from which on a pixel belongs to the subject's extent."""


def prepare_references(
    references: Sequence[Reference], size: tuple[int, int], cut_out: CutOut | None
) -> UInt8[np.ndarray, "R h w 3"]:
    """Reads references and puts them on white.

    A background is removed from those that have neither a mask nor transparent pixels, if `cut_out` is given.

    Args:
      references: the files and regions.
      size: h and w.
      cut_out: removes backgrounds; None for not at all.

    Returns:
      RGB.

    Raises:
      ValueError: one can't be read, shows nothing, or no subject is found in it.
    """
    images = [_prepare(reference, *size, cut_out) for reference in references]
    return np.array(images, np.uint8).reshape(len(images), *size, 3)


def _prepare(reference: Reference, height: int, width: int, cut_out: CutOut | None) -> UInt8[np.ndarray, "h w 3"]:
    """Reads one reference."""
    if cut_out is not None and is_whole(reference):
        image = read_image(reference.path)
        opacity = cut_out.matte(image)
        rows, columns = (np.flatnonzero((opacity >= _OPAQUE).any(axis)) for axis in (1, 0))
        if not len(rows):
            raise ValueError(f"{reference.path}: no subject is found in it; give a mask, or leave its background.")
        share = opacity[..., None].astype(np.float32) / 255
        on_white = np.rint(image * share + 255 * (1 - share)).astype(np.uint8)
        cut = on_white[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        found = put_on_white(cut, np.ones(cut.shape[:2], bool), height, width).pixels
    else:
        found = load_reference(dataclasses.replace(reference, own_clip=False), height, width).pixels
    if (found == 255).all():
        raise ValueError(f"{reference.path} shows nothing: all of it is white or transparent.")
    return found


def is_whole(reference: Reference) -> bool:
    """Whether a reference is a picture with its background: without mask, regions and transparent pixels.

    Raises:
      ValueError: it can't be read.
    """
    parts = (reference.mask, reference.frame, reference.crop, reference.box)
    return all(part is None for part in parts) and not is_cut_out(reference.path)


def has_background(reference: Reference) -> bool:
    """Whether most of the border of a whole picture is not white; errors as in `is_whole`."""
    if not is_whole(reference):
        return False
    image = read_image(reference.path)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    return bool((border.min(-1) < 240).mean() > 0.5)
