"""What the templates of the report display: charts, images, videos, and the sections that hold them."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from markupsafe import Markup
from PIL import Image

from refalign_jax.data.video import read_frames

LARGEST_IMAGE = 1600
"""Pixels of an image's longer side; larger images are scaled down."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart, drawn once for a light page and once for a dark one."""

    name: str
    """Name of its PNG file, without the extension."""
    title: str
    alt: str
    """A text description, for readers who can't see the chart."""
    light: bytes
    """PNG."""
    dark: bytes
    """PNG."""
    size: tuple[int, int]
    """Width and height in pixels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Still:
    """An image."""

    png: bytes
    alt: str
    """A text description, for readers who can't see the image."""
    size: tuple[int, int]
    """Width and height in pixels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """A video that the page plays."""

    mp4: bytes
    poster: bytes
    """PNG of its first frame, shown until it plays."""
    label: str
    """A text description, for readers who can't see the video."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the page, rendered, and the charts in it."""

    html: Markup
    charts: tuple[Chart, ...] = ()


def still(pixels: UInt8[np.ndarray, "h w _"], alt: str) -> Still:
    """Encodes an image, RGB or RGBA, no larger than `LARGEST_IMAGE`."""
    image = Image.fromarray(pixels)
    image.thumbnail((LARGEST_IMAGE, LARGEST_IMAGE))
    file = io.BytesIO()
    image.save(file, format="png")
    return Still(png=file.getvalue(), alt=alt, size=image.size)


def clip(path: Path, label: str) -> Clip:
    """Reads an MP4."""
    (first,) = read_frames(path, [0])
    return Clip(mp4=path.read_bytes(), poster=still(first, label).png, label=label)
