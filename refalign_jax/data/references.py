"""A subject cut out of an image and put on white, as the DiT and the VFM see references.

The cut-out is scaled to fit height x width with its aspect kept and centred; everything else is white. References cut
from the clip that they condition are altered, so that copying them is no way to a low loss:

    source ──flip, rotation and shear, perspective──▸ · ──scale to fit, centre──▸ · ──scale, shift──▸ canvas

one homography, applied once. So a turned subject is still whole, but for what scale 1.1 and shift 5% push over the
edge. Brightness and colour change before the subject is laid on white, and the white stays white.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from refalign_jax.config import AugmentConfig
from refalign_jax.data.video import Box, cut_out
from refalign_jax.types import Bool, Float

_MARGIN = 2
"""White pixels around a cut-out while it is warped, so that its border is interpolated towards white."""


def prepare_reference(
    image: UInt8[np.ndarray, "a b 3"],
    height: int,
    width: int,
    *,
    mask: Bool[np.ndarray, "a b"] | None = None,
    box: Box | None = None,
    augment: AugmentConfig | None = None,
    rng: np.random.Generator | None = None,
    what: str = "the image",
) -> UInt8[np.ndarray, "h w 3"]:
    """Puts a subject on a white canvas.

    Args:
      image: RGB.
      height: rows of the canvas.
      width: columns of the canvas.
      mask: true on the subject; None takes all of it.
      box: where the subject is; by default where the mask is, else the whole image.
      augment: how to alter it; None not at all.
      rng: draws the alterations; needed with `augment` alone.
      what: the image's name, for messages.

    Returns:
      RGB.

    Raises:
      ValueError: the mask has another size than the image or is empty, or the box reaches outside.
    """
    rows, columns = image.shape[:2]
    if mask is not None and mask.shape != (rows, columns):
        raise ValueError(f"The mask of {what} is {mask.shape[1]}x{mask.shape[0]}, the image {columns}x{rows}.")
    cut = cut_out(image, box, what)
    inside = np.ones(cut.shape[:2], bool) if mask is None else cut_out(mask, box, what)
    if not inside.any():
        raise ValueError(f"The mask of {what} is empty{'' if box is None else ' inside the box'}.")
    if box is None:
        used_rows, used_columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
        around = slice(used_rows[0], used_rows[-1] + 1), slice(used_columns[0], used_columns[-1] + 1)
        cut, inside = cut[around], inside[around]
    if augment is not None:
        assert rng is not None, "alterations need a generator"
        cut = _recolour(cut, augment, rng)
    cut = np.where(inside[..., None], cut, np.uint8(255))
    scale = min(height / cut.shape[0], width / cut.shape[1])
    size = (max(round(cut.shape[1] * scale), 1), max(round(cut.shape[0] * scale), 1))
    fitted = Image.fromarray(cut).resize(size, Image.Resampling.BICUBIC)  # Lanczos would ring into the white
    canvas = Image.new("RGB", (width, height), (255, 255, 255))
    if augment is None:
        canvas.paste(fitted, ((width - size[0]) // 2, (height - size[1]) // 2))
        return np.asarray(canvas)
    assert rng is not None
    framed = Image.new("RGB", (size[0] + 2 * _MARGIN, size[1] + 2 * _MARGIN), (255, 255, 255))
    framed.paste(fitted, (_MARGIN, _MARGIN))
    corners = _MARGIN + np.array([(0, 0), (size[0], 0), (0, size[1]), size], np.float64)
    inverse = np.linalg.inv(_homography(corners, height, width, augment, rng))
    return np.asarray(
        framed.transform(
            (width, height),
            Image.Transform.PERSPECTIVE,
            tuple((inverse / inverse[2, 2]).reshape(-1)[:8].tolist()),
            Image.Resampling.BICUBIC,
            fillcolor=(255, 255, 255),
        )
    )


def _recolour(
    pixels: UInt8[np.ndarray, "a b 3"], config: AugmentConfig, rng: np.random.Generator
) -> UInt8[np.ndarray, "a b 3"]:
    """Changes the brightness by a factor, then each channel by an offset."""
    factor = rng.uniform(*config.brightness)
    offset = 255 * rng.uniform(-config.colour, config.colour, 3)
    return np.clip(np.rint(pixels * factor + offset), 0, 255).astype(np.uint8)


def _homography(
    corners: Float[np.ndarray, "4 2"], height: int, width: int, config: AugmentConfig, rng: np.random.Generator
) -> Float[np.ndarray, "3 3"]:
    """Draws the map from the cut-out's (x, y) to the canvas's.

    Args:
      corners: of the cut-out: left top, right top, left bottom, right bottom.
      height: rows of the canvas.
      width: columns of the canvas.
      config: ranges.
      rng: draws.
    """
    flip = -1.0 if rng.random() < config.flip else 1.0
    angle = math.radians(rng.uniform(-config.rotation, config.rotation))
    shear = math.tan(math.radians(rng.uniform(-config.shear, config.shear)))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = turn @ np.array([[1, shear], [0, 1]]) @ np.diag([flip, 1])
    middle, half = corners.mean(0), (corners[3] - corners[0]) / 2
    placed = np.eye(3)
    placed[:2, :2], placed[:2, 2] = linear, -linear @ middle
    inwards = rng.random((4, 2)) * config.perspective * (rng.random() < config.perspective_probability)
    outwards = np.array([(-1, -1), (1, -1), (-1, 1), (1, 1)])
    bent = placed @ _solve(corners, middle + outwards * half * (1 - inwards))

    moved = _apply(bent, corners)
    low, high = moved.min(0), moved.max(0)
    canvas = np.array([width, height], np.float64)
    scale = (canvas / (high - low)).min() * rng.uniform(*config.scale)
    shift = canvas * rng.uniform(-config.shift, config.shift, 2)
    fit = np.diag([scale, scale, 1.0])
    fit[:2, 2] = canvas / 2 + shift - scale * (low + high) / 2
    return fit @ bent


def _solve(source: Float[np.ndarray, "4 2"], target: Float[np.ndarray, "4 2"]) -> Float[np.ndarray, "3 3"]:
    """The homography that takes four points to four others, of which no three lie on a line."""
    rows, values = [], []
    for (x, y), (u, v) in zip(source.tolist(), target.tolist(), strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.append(np.linalg.solve(np.array(rows), np.array(values)), 1.0).reshape(3, 3)


def _apply(homography: Float[np.ndarray, "3 3"], points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
    """Maps points (x, y)."""
    mapped = np.column_stack([points, np.ones(len(points))]) @ homography.T
    return mapped[:, :2] / mapped[:, 2:]
