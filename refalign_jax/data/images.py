"""Image files to pixels and masks. Values of 16 and 32 bits, whole or floating, are scaled and never clipped."""

from __future__ import annotations

import contextlib
import io
import os
import struct
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from refalign_jax.data.files import check_file
from refalign_jax.data.stored import Stored
from refalign_jax.types import Bool, Float

ImageFile = str | os.PathLike[str] | Stored
"""An image: a path, or one that lies at a URL or within an archive."""

COMMON = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "AVIF", "JPEG2000")
FORMATS = (
    *COMMON,
    *("BLP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "ICNS", "ICO", "IM", "MSP", "PCD", "PCX", "PIXAR"),
    *("PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA", "XBM", "XPM"),
)
"""The formats that are read; Pillow decodes them in this process, whereas an EPS would start Ghostscript."""

_WIDE = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
"""Pillow's modes of one channel of 16 or 32 bits; its own conversion would clip them at 255."""

_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
)
"""What Pillow's decoders raise on damaged files; AVIF's, for one, a RuntimeError."""


@contextlib.contextmanager
def _image(path: ImageFile, what: str) -> Iterator[tuple[Image.Image, str]]:
    """Opens an image and turns it upright by its EXIF; yields it and its format. Faults become one sentence."""
    if not isinstance(path, Stored):
        check_file(path, what)
    try:
        with Image.open(io.BytesIO(path.read()) if isinstance(path, Stored) else path, formats=FORMATS) as file:
            yield ImageOps.exif_transpose(file), str(file.format)
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{path} is not {what} in a format that is read: {', '.join(COMMON)} and more{_name_format(path)}."
        ) from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ValueError(f"{path} is too large for {what}; at most {most} pixels are read.") from error
    except _FAULTS as error:
        raise ValueError(f"{path} can't be read as {what}: {str(error).rstrip('.')}.") from error


def _name_format(path: ImageFile) -> str:
    """What a file is whose format is known but not read, for a sentence; empty where that is not known."""
    try:
        if isinstance(path, Stored):
            start = path.read()[:16]
        else:
            with open(path, "rb") as file:
                start = file.read(16)
    except OSError:
        return ""
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
        return "; it is HEIC, which a phone can export as JPEG"
    if start[4:8] == b"ftyp" or start[:4] == b"\x1aE\xdf\xa3":
        return "; it is a video"
    for begin, name in ((b"%!PS", "PostScript"), (b"%PDF", "PDF"), (b"<svg", "SVG"), (b"<?xml", "XML or SVG")):
        if start.startswith(begin):
            return f"; it is {name}"
    return "" if start else "; it is empty"


def _to_srgb(image: Image.Image) -> Image.Image:
    """Converts colours by the image's own profile, where it has one; CMYK and LAB cannot be converted well without."""
    profile = image.info.get("icc_profile")
    if image.mode == "LAB" and not profile:
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    if not profile or image.mode not in ("RGB", "CMYK", "L", "LAB"):
        return image
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(given):
            return image
        turned = ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image  # a damaged profile, or one of another kind of image; most viewers ignore these too
    return image if turned is None else turned


def is_cut_out(path: ImageFile) -> bool:
    """Whether an image has transparent pixels, as a subject that has been cut out; errors as in `read_image`."""
    with _image(path, "an image") as (image, _):
        return image.has_transparency_data and bool(np.asarray(image.convert("RGBA"))[..., 3].min() < 255)


def read_image(path: ImageFile) -> UInt8[np.ndarray, "h w 3"]:
    """Reads the first picture of an image file, turned upright by its EXIF; transparent pixels become white.

    Colours are converted to sRGB by the file's profile, if it has another one.

    Greys of 16 bits lie in [0, 65535], and so do all of a PGM of more than 8 bits. Other whole greys lie in [0, 255]
    or, where one is larger, in [0, 65535]; floating ones lie in [0, 1] or in one of these two ranges.

    Raises:
      ValueError: no such file, not a whole image, one of too many pixels, or greys outside these ranges.
    """
    with _image(path, "an image") as (image, format):
        if image.mode in _WIDE:
            image = Image.fromarray(_to_bytes(np.asarray(image), image.mode.startswith("I;16") or format == "PPM"))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return np.asarray(_to_srgb(image).convert("RGB"))


def _to_bytes(greys: np.ndarray, sixteen_bits: bool) -> UInt8[np.ndarray, "h w"]:
    """Scales greys to [0, 255].

    Raises:
      ValueError: greys that are not finite, below 0 or above 65535.
    """
    if greys.dtype.itemsize == 2:
        return (greys // 257).astype(np.uint8)
    low, high = greys.min(), greys.max()
    if not (low >= 0 and high <= 65535):
        raise ValueError(f"its greys go from {low:g} to {high:g}; they must lie in 0 to 1, 255 or 65535")
    wide = sixteen_bits or high > 255
    if greys.dtype.kind != "f":
        return (greys // 257 if wide else greys).astype(np.uint8)
    top = 1 if high <= 1 else 65535 if wide else 255
    return np.rint(greys.astype(np.float64) * (255 / top)).astype(np.uint8)


def read_mask(path: ImageFile) -> Bool[np.ndarray, "h w"]:
    """Reads a mask, true on the subject.

    The subject is the pixels at least half as bright as the brightest one or, where opacity varies, half as opaque as
    the most opaque one. So masks of 0 and 1, of 0 and 255, and of two colours of a palette are all read as intended,
    whatever their bits. A black mask is empty. A map in which each object has a number or a colour of its own does not
    show which of them is the subject and is refused.

    Raises:
      ValueError: no such file, not a whole image, one of too many pixels, values that are not finite, or such a map.
    """
    with _image(path, "a mask") as (image, _):
        if image.mode in _WIDE:
            level = numbers = np.asarray(image).astype(np.float64)
            if not np.isfinite(level).all():
                raise ValueError("it holds values that are not finite")
        else:
            values = np.asarray(image.convert("RGBA"))
            opacity, brightness = values[..., 3], values[..., :3].max(-1)
            level = (opacity if opacity.min() < 255 else brightness).astype(np.float64)
            coloured = image.mode == "P" and bool(np.ptp(values[..., :3], axis=-1).any())
            numbers = np.where(level > 0, np.asarray(image), 0).astype(np.float64) if coloured else level
        found = _numbers_of_objects(numbers) if numbers is not level or 2 * _least(level) < level.max() else []
        if found:
            raise ValueError(
                f"it holds the values {', '.join(f'{number:g}' for number in found[:4])}, each over an area, as a map "
                "of several objects does; a mask has one value on the subject and 0 elsewhere"
            )
    return (level > 0) & (2 * level >= level.max())


def _least(level: Float[np.ndarray, "h w"]) -> float:
    """The smallest value above 0; infinite where there is none."""
    return float(np.min(level, where=level > 0, initial=np.inf))


def _numbers_of_objects(values: Float[np.ndarray, "h w"]) -> list[float]:
    """The values above 0 if there are several and each fills a square of 2x2 pixels; otherwise none.

    A matte has values between the extremes, which lie along its edge.
    """
    corner = values[1:, 1:]
    square = (corner == values[:-1, 1:]) & (corner == values[1:, :-1]) & (corner == values[:-1, :-1])
    areas = np.unique(corner[square & (corner > 0)])
    kinds = np.unique(values[values > 0])
    return kinds.tolist() if 2 <= len(kinds) == len(areas) else []
