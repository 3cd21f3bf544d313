"""Decoded video frames to 8-bit RGB as an SDR display shows them.

Y'CbCr becomes R'G'B' by the matrix that the file names; a file that names none is read as BT.709 from 720 rows or 1280
columns on and as BT.601 below, and limited range unless it says full. Primaries of BT.2020 and HDR take a longer way:

    R'G'B' ──inverse transfer──▸ light in BT.2020 ──matrix──▸ light in BT.709 ──tone curve──▸ · ──transfer──▸ R'G'B'

    PQ   light from SMPTE ST 2084's EOTF, in cd/m²
    HLG  scene light from the inverse of ARIB STD-B67's OETF, then BT.2100's OOTF for a display of 1000 cd/m², gamma 1.2
    SDR  light from BT.1886's EOTF, gamma 2.4, and back by the same; no tone curve

HDR's reference white, 203 cd/m² (ITU-R BT.2408), becomes SDR's white. The tone curve keeps light x ≤ 0.75 and bends
what is brighter, k + (1 − k)(1 − exp(−(x − k)/(1 − k))) with k = 0.75, which never reaches 1. It is taken at the
largest of the three channels and scales all of them, so the hue stays. The transfer of mapped HDR is sRGB's.
"""

from __future__ import annotations

import functools

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorTrc
from jaxtyping import UInt8

from refalign_jax.types import Float

UNBIASED = 2 | 0x2000 | 0x40000
"""FFmpeg's SWS_BILINEAR, SWS_FULL_CHR_H_INT and SWS_ACCURATE_RND; its faster default is one grey level too dark."""
BICUBIC = 4 | 0x2000 | 0x40000
"""The same with FFmpeg's SWS_BICUBIC, for scaling; it widens its kernel to scale down."""
_CUT = ("yuv420p", "yuvj420p")
"""Pixel formats of which a part can be cut out."""
REFERENCE_WHITE = 203.0
"""cd/m², ITU-R BT.2408."""
KNEE = 0.75
"""Light up to which the tone curve changes nothing; 1 is white."""

_TO_BT709 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]], np.float32
)
"""Light in BT.2020's primaries to light in BT.709's, ITU-R BT.2087."""
_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)
"""Weights of BT.2020's primaries in luminance."""
_BT709, _BT601, _BT2020 = 1, 5, 9
_MATRICES = {1, 2, 3, 4, 5, 6, 7, 9}
"""Numbers of ITU-T H.273 that swscale converts: BT.709, none named (2, 3), FCC, BT.601 (5, 6), SMPTE 240M, BT.2020."""


def is_plain(frame: av.VideoFrame, crop: tuple[int, int, int, int] | None = None) -> bool:
    """Whether `to_rgb` can cut and scale a frame on the way: SDR in BT.709's primaries and, if cut, at even pixels."""
    hdr, wide = _kind(frame)
    if hdr or wide:
        return False
    even = not any(place % 2 for place in (*(crop or ()), frame.width, frame.height))
    return crop is None or (even and frame.format.name in _CUT)


def to_rgb(
    frame: av.VideoFrame, crop: tuple[int, int, int, int] | None = None, size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Converts a decoded frame to RGB as this module describes, as it is stored: not turned, pixels not made square.

    Args:
      frame: the frame.
      crop: left, top, right and bottom of the part to convert; None for all. Only where `is_plain`.
      size: columns and rows to which it is scaled by bicubic interpolation; None for none. Only where `is_plain`.

    Raises:
      ValueError: the frame's colour matrix is one that can't be converted, such as ICtCp.
    """
    coded, matrix = not frame.format.is_rgb, int(frame.colorspace)
    if coded and matrix not in _MATRICES | {0}:
        raise ValueError(f"its colours are coded by matrix {matrix} of ITU-T H.273, which can't be converted")
    hdr, wide = _kind(frame)
    source = None
    if coded and matrix in (0, 2, 3):
        large = frame.height >= 720 or frame.width >= 1280
        source = _BT2020 if wide else _BT709 if large else _BT601
    if not (hdr or wide):
        part = frame if crop is None else _cut(frame, crop)
        if size in (None, (part.width, part.height)):
            return part.to_ndarray(format="rgb24", src_colorspace=source, interpolation=UNBIASED)
        columns, rows = size
        # Planes of green, blue and red come out as rgb24 does, in less than half the time.
        return part.to_ndarray(format="gbrp", width=columns, height=rows, src_colorspace=source, interpolation=BICUBIC)
    assert crop is None, "not plain"
    assert size is None, "not plain"
    signal = frame.to_ndarray(format="gbrp16le", src_colorspace=source, interpolation=UNBIASED)  # rgb48 comes out wrong
    light = _light(int(frame.color_trc))[signal]
    if frame.color_trc == ColorTrc.ARIB_STD_B67:
        light *= 1000 / REFERENCE_WHITE * np.maximum(light @ _LUMINANCE, 0)[..., None] ** np.float32(0.2)
    if wide:
        light = light @ _TO_BT709.T
    light = np.maximum(light, 0)
    shown = _srgb(tone_map(light)) if hdr else np.minimum(light, 1) ** np.float32(1 / 2.4)
    return np.rint(shown * 255).astype(np.uint8)


def _kind(frame: av.VideoFrame) -> tuple[bool, bool]:
    """Whether a frame is HDR, and whether its primaries are BT.2020's."""
    hdr = frame.color_trc in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
    wide = frame.color_primaries == ColorPrimaries.BT2020 or (
        hdr and frame.color_primaries != ColorPrimaries.BT709 and int(frame.colorspace) != _BT709
    )
    return hdr, wide


def _cut(frame: av.VideoFrame, crop: tuple[int, int, int, int]) -> av.VideoFrame:
    """Cuts a box at even pixels out of a frame of 4:2:0."""
    left, top, right, bottom = crop
    rows, columns = frame.height, frame.width
    planes = frame.to_ndarray()
    colours = planes[rows:].reshape(2, rows // 2, columns // 2)[:, top // 2 : bottom // 2, left // 2 : right // 2]
    cut = np.concatenate([planes[:rows][top:bottom, left:right].reshape(-1), colours.reshape(-1)])
    part = av.VideoFrame.from_ndarray(cut.reshape(-1, right - left), format=frame.format.name)
    part.colorspace, part.color_range = frame.colorspace, frame.color_range
    return part


def tone_map(light: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """Bends light, 1 for white, into [0, 1] by the curve that this module describes."""
    brightest = light.max(-1, keepdims=True)
    bent = KNEE + (1 - KNEE) * -np.expm1(-(brightest - KNEE) / (1 - KNEE))
    return np.where(brightest > KNEE, light * (bent / np.maximum(brightest, KNEE)), light)


@functools.cache
def _light(transfer: int) -> Float[np.ndarray, 65536]:
    """Light of each 16-bit signal: HLG's of the scene in [0, 1], that of others on the display, 1 for white."""
    signal = np.arange(65536) / 65535
    if transfer == ColorTrc.SMPTE2084:
        root = signal ** (32 / 2523)
        light = (np.maximum(root - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * root)) ** (8192 / 1305)
        light *= 10000 / REFERENCE_WHITE
    elif transfer == ColorTrc.ARIB_STD_B67:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    else:
        light = signal**2.4
    return light.astype(np.float32)


def _srgb(light: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """The signal of light in [0, 1], IEC 61966-2-1."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** np.float32(1 / 2.4) - 0.055)
