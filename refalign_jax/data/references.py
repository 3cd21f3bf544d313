"""A subject cut out of an image and put on white, as the DiT and the VFM see references.

The cut-out is scaled to fit height x width, keeping its aspect, and centred; everything else is white. References cut
from the clip that they condition are augmented, so that copying them does not lower the loss:

    source ──flip, rotation and shear, perspective──▸ · ──scale to fit, centre──▸ · ──scale, shift──▸ canvas

one homography, applied once. Because the scale to fit comes after the turn, a turned subject stays whole, except for
what a scale of 1.1 and a shift of 5% push over the edge. Brightness and colour are changed before the subject is laid
on white, so the white stays white.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFilter

from refalign_jax.config import AugmentConfig
from refalign_jax.data.clip_frames import Still, read_still
from refalign_jax.data.images import read_image, read_mask
from refalign_jax.data.records import Reference, RunLengths
from refalign_jax.data.stored import File
from refalign_jax.data.video import Box, cut_out, make_square, to_float
from refalign_jax.encoders.interface import VideoCodec
from refalign_jax.types import Bool, Float

WHITE_FROM = 250
"""Where no mask is given, pixels at least this bright in every channel show no subject; 255 is white."""

_MARGIN = 2
"""White pixels around a cut-out while it is warped, so that its border is interpolated towards white."""


class OnWhite(NamedTuple):
    """A reference on its canvas.

    Attributes:
      pixels: RGB.
      subject: true where the subject is.
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    subject: Bool[np.ndarray, "h w"]


def load_reference(
    reference: Reference,
    height: int,
    width: int,
    *,
    augment: AugmentConfig | None = None,
    rng: np.random.Generator | None = None,
    still: Still | None = None,
) -> OnWhite:
    """Reads a reference and puts it on white.

    Args:
      reference: the files and regions; it is augmented where it was cut from the clip that it conditions.
      height: rows of the canvas.
      width: columns of the canvas.
      augment: how to augment it; None for not at all.
      rng: draws the augmentation; required with `augment`.
      still: the frame that the reference is cut from, where it has been read already.

    Returns:
      Pixels and subject. Without a mask, the subject is what the image shows beside white.

    Raises:
      ValueError: a file can't be read, the mask has another size than the image or is empty, or a box reaches outside.
    """
    path, name = reference.path, str(reference.path)
    if still is None and reference.frame is not None:
        still = read_still(path, reference.frame)
    image, aspect = (read_image(path), 1.0) if still is None else still
    image = cut_out(image, reference.crop, name)
    box = _scaled(reference.box, reference.box_size, image)
    subject = cut_subject(image, _read_mask(reference.mask), box, name)
    cut, inside = (make_square(part, aspect) for part in subject)
    laid = put_on_white(cut, inside, height, width, augment if reference.own_clip else None, rng)
    if reference.mask is None:
        laid = laid._replace(subject=laid.subject & (laid.pixels < WHITE_FROM).any(-1))
    return laid


def _read_mask(mask: File | np.ndarray | RunLengths | None) -> Bool[np.ndarray, "a b"] | None:
    """Reads the mask of a reference in whatever form it is given."""
    if mask is None or isinstance(mask, np.ndarray):
        return mask
    return mask.decode() if isinstance(mask, RunLengths) else read_mask(mask)


def _scaled(box: Box | None, size: tuple[int, int] | None, image: np.ndarray) -> Box | None:
    """Scales a box from a picture of a size, width and height, to another picture; none of its pixels is cut off."""
    if box is None or size is None:
        return box
    rows, columns = image.shape[:2]
    x, y = columns / size[0], rows / size[1]
    left, top, right, bottom = box
    return (
        math.floor(left * x),
        math.floor(top * y),
        min(math.ceil(right * x), columns),
        min(math.ceil(bottom * y), rows),
    )


def encode_references(images: UInt8[np.ndarray, "R h w 3"], codec: VideoCodec) -> Float[np.ndarray, "R H W C"]:
    """Encodes references, RGB on white, each as a video of one frame; R may be 0.

    Returns:
      Normalised latents, float32.
    """
    if not len(images):
        _, h, w, _ = images.shape
        return np.empty((0, h // codec.stride, w // codec.stride, codec.channels), np.float32)
    return codec.encode(to_float(images)[:, None])[:, 0]


def cut_subject(
    image: UInt8[np.ndarray, "a b 3"], mask: Bool[np.ndarray, "a b"] | None, box: Box | None, what: str = "the image"
) -> tuple[UInt8[np.ndarray, "c d 3"], Bool[np.ndarray, "c d"]]:
    """Cuts the rectangle around a subject out of an image.

    Args:
      image: RGB.
      mask: true on the subject; None for all pixels.
      box: the rectangle; None for the extent of the mask.
      what: the image's name, for messages.

    Returns:
      The pixels of the rectangle, and which of them are the subject.

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
        extent = slice(used_rows[0], used_rows[-1] + 1), slice(used_columns[0], used_columns[-1] + 1)
        cut, inside = cut[extent], inside[extent]
    return cut, inside


def put_on_white(
    cut: UInt8[np.ndarray, "c d 3"],
    inside: Bool[np.ndarray, "c d"],
    height: int,
    width: int,
    augment: AugmentConfig | None = None,
    rng: np.random.Generator | None = None,
) -> OnWhite:
    """Fits a subject into a white canvas; arguments as `cut_subject` returns them and `load_reference` takes them."""
    if augment is not None:
        assert rng is not None, "augmentation needs a generator"
        cut = _recolour(cut, augment, rng)
    cut = np.where(inside[..., None], cut, np.uint8(255))
    scale = min(height / cut.shape[0], width / cut.shape[1])
    size = (max(round(cut.shape[1] * scale), 1), max(round(cut.shape[0] * scale), 1))
    homography = None
    if augment is not None:
        assert rng is not None
        corners = _MARGIN + np.array([(0, 0), (size[0], 0), (0, size[1]), size], np.float64)
        homography = _homography(corners, height, width, augment, rng)
    layers = (cut, (255, 255, 255)), (np.uint8(255) * inside, 0)  # Lanczos would ring into the white
    fitted = [(Image.fromarray(layer).resize(size, Image.Resampling.BICUBIC), fill) for layer, fill in layers]
    pixels, subject = (_lay(image, fill, height, width, homography) for image, fill in fitted)
    if augment is not None and augment.blur:
        assert rng is not None
        blurred = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(rng.uniform(0, augment.blur)))
        pixels = np.where((subject >= 128)[..., None], np.asarray(blurred), pixels)  # white stays white
    return OnWhite(pixels, subject >= 128)


def _lay(
    fitted: Image.Image,
    fill: int | tuple[int, int, int],
    height: int,
    width: int,
    homography: Float[np.ndarray, "3 3"] | None,
) -> UInt8[np.ndarray, "h w *channels"]:
    """Lays an image on a canvas of one colour: in the middle, or where a map from its pixels, with a margin, puts it.

    Args:
      fitted: the image.
      fill: colour of the canvas.
      height: rows of the canvas.
      width: columns of the canvas.
      homography: the map; None for the middle.
    """
    if homography is None:
        canvas = Image.new(fitted.mode, (width, height), fill)
        canvas.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
        return np.asarray(canvas)
    framed = Image.new(fitted.mode, (fitted.width + 2 * _MARGIN, fitted.height + 2 * _MARGIN), fill)
    framed.paste(fitted, (_MARGIN, _MARGIN))
    inverse = np.linalg.inv(homography)
    return np.asarray(
        framed.transform(
            (width, height),
            Image.Transform.PERSPECTIVE,
            tuple((inverse / inverse[2, 2]).reshape(-1)[:8].tolist()),
            Image.Resampling.BICUBIC,
            fillcolor=fill,
        )
    )


def _recolour(
    pixels: UInt8[np.ndarray, "a b 3"], config: AugmentConfig, rng: np.random.Generator
) -> UInt8[np.ndarray, "a b 3"]:
    """Multiplies the brightness by a random factor, then adds a random offset to each channel."""
    factor = rng.uniform(*config.brightness)
    offset = 255 * rng.uniform(-config.colour, config.colour, 3)
    table = np.clip(np.rint(np.arange(256)[:, None] * factor + offset), 0, 255).astype(np.uint8)
    return np.stack([table[:, channel][pixels[..., channel]] for channel in range(3)], axis=-1)


def _homography(
    corners: Float[np.ndarray, "4 2"], height: int, width: int, config: AugmentConfig, rng: np.random.Generator
) -> Float[np.ndarray, "3 3"]:
    """Draws the map from (x, y) in the cut-out to (x, y) on the canvas.

    Args:
      corners: the cut-out's left top, right top, left bottom and right bottom.
      height: rows of the canvas.
      width: columns of the canvas.
      config: the ranges to draw from.
      rng: the generator.
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
    """Returns the homography that maps four points to four others; no three of them lie on a line."""
    rows, values = [], []
    for (x, y), (u, v) in zip(source.tolist(), target.tolist(), strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.append(np.linalg.solve(np.array(rows), np.array(values)), 1.0).reshape(3, 3)


def _apply(homography: Float[np.ndarray, "3 3"], points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
    """Maps points (x, y)."""
    mapped = np.column_stack([points, np.ones(len(points))]) @ homography.T
    return mapped[:, :2] / mapped[:, 2:]
