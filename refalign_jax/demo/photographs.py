"""The demo's photographs: subjects cut out of them along polygons, some of them in a second colour, and backgrounds.

All photographs are inside the wheels of scikit-image, scikit-learn and Matplotlib; nothing is downloaded. Their
licences, as those packages state them:

    astronaut, rocket                public domain (NASA; SpaceX)
    camera, chelsea, coffee          CC0 (Lav Varshney; Stefan van der Walt; Rachel Michetti)
    coins                            no known copyright restrictions (Brooklyn Museum)
    motorcycle_left                  CC0 (Daniel Scharstein, Middlebury stereo benchmark)
    china, flower                    CC BY 2.0 (flickr.com/photos/danielbuechele, flickr.com/photos/vultilion)
    grace_hopper                     public domain (United States Navy)

The polygons were drawn by hand, some of them along the result of a segmentation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import skimage
import sklearn.datasets
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFilter
from skimage.color import rgb2yiq, yiq2rgb

from refalign_jax.data.video import Box

_SKIMAGE = Path(skimage.__file__).parent / "data"
_SKLEARN = Path(sklearn.datasets.__file__).parent / "images"
_MATPLOTLIB = Path(matplotlib.get_data_path()) / "sample_data"

FILES: Mapping[str, Path] = {
    "astronaut": _SKIMAGE / "astronaut.png",
    "camera": _SKIMAGE / "camera.png",
    "chelsea": _SKIMAGE / "chelsea.png",
    "china": _SKLEARN / "china.jpg",
    "coffee": _SKIMAGE / "coffee.png",
    "coins": _SKIMAGE / "coins.png",
    "flower": _SKLEARN / "flower.jpg",
    "grace_hopper": _MATPLOTLIB / "grace_hopper.jpg",
    "motorcycle": _SKIMAGE / "motorcycle_left.png",
    "rocket": _SKIMAGE / "rocket.jpg",
}
"""Where the photographs are, by name."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A subject in a photograph."""

    photograph: str
    """One of `FILES`."""
    outline: str
    """Corners of a polygon around it, `x,y` in pixels."""
    hue: float | None = None
    """Angle in degrees by which its colours are turned in YIQ; None for grey."""

    def corners(self) -> list[tuple[int, int]]:
        """The corners of the outline, (x, y)."""
        return [(int(x), int(y)) for x, y in (corner.split(",") for corner in self.outline.split())]


_CAT = """41,0 32,40 30,102 16,118 14,136 5,150 6,286 27,297 126,299 151,277 212,271 223,274 273,265 308,266 330,260
    330,206 343,185 341,167 361,148 355,76 371,58 377,28 399,0"""
_CUP = """269,18 218,35 185,67 147,86 112,117 88,152 82,170 75,238 88,273 107,306 159,354 189,370 236,385 317,385
    358,376 393,361 442,322 464,290 472,270 479,238 478,209 458,155 417,109 423,82 419,70 383,58 364,41 337,27 299,18"""
_DAHLIA = """322,86 308,86 283,98 249,99 234,111 214,117 205,134 188,149 189,169 177,174 178,194 169,208 174,238 172,262
    202,316 212,324 227,326 235,340 248,350 265,348 290,359 335,357 395,331 426,287 443,244 444,211 431,183 431,163
    421,140 410,133 409,125 399,115 388,113 376,101 334,93"""
_MOTORCYCLE = """95,200 110,195 145,197 150,155 185,160 230,165 300,188 345,190 362,174 400,163 400,150 365,165 360,158
    395,120 420,118 445,138 465,115 478,90 492,85 510,78 532,95 527,106 550,120 575,125 575,140 562,150 560,178 545,192
    556,232 578,250 602,258 642,290 645,300 670,340 685,390 680,430 660,450 630,447 600,430 570,390 550,360 530,330
    514,300 497,275 484,310 466,350 440,375 350,380 342,400 336,432 320,432 330,385 308,367 270,352 264,365 250,382
    225,397 190,391 150,366 125,330 121,290 130,260 152,238 100,222"""

SUBJECTS: Mapping[str, Subject] = {
    "astronaut": Subject(
        "astronaut",
        """205,15 240,20 275,45 292,75 290,110 275,128 262,165 285,190 298,220 330,253 352,300 358,345 330,355 300,380
        283,420 276,470 276,511 20,511 25,440 30,350 40,290 65,250 110,215 112,185 130,160 160,150 183,145 180,125
        163,105 152,85 155,55 175,30""",
        0,
    ),
    "cat": Subject("chelsea", _CAT, 0),
    "coin with a head": Subject(
        "coins",
        """172,233 183,235 192,242 198,252 199,262 195,273 187,282 176,287 165,286 155,281
        147,272 145,261 147,250 153,241 162,235""",
        None,
    ),
    "coin with two figures": Subject(
        "coins",
        """336,15 346,18 355,24 362,33 364,45 361,56 354,65 345,71 334,72 323,69 313,62 307,53 306,42 308,32 314,23
        324,17""",
        None,
    ),
    "cup": Subject("coffee", _CUP, 0),
    "dahlia": Subject("flower", _DAHLIA, 0),
    "helmet": Subject(
        "astronaut",
        """283,511 280,470 283,440 300,395 330,364 370,346 410,345 450,363 482,395 497,440 505,470 508,511""",
        0,
    ),
    "motorcycle": Subject("motorcycle", _MOTORCYCLE, 0),
    "officer": Subject(
        "grace_hopper",
        """240,25 290,45 330,85 365,90 370,140 362,180 372,205 365,260 340,290 330,310 370,345 430,375 490,400 511,430
        511,599 4,599 20,470 42,400 110,368 190,350 200,315 190,290 165,270 160,220 165,180 155,145 150,110 175,75
        195,40""",
        0,
    ),
    "pagoda": Subject(
        "china",
        """200,30 193,33 197,47 193,63 181,75 141,85 118,100 97,109 95,130 116,140 118,152 106,167 85,170 86,185 98,190
        98,229 92,232 93,244 64,263 64,273 81,279 81,308 71,328 97,336 143,329 162,342 156,356 178,364 208,364 217,384
        284,380 354,358 364,343 348,307 340,303 339,266 350,258 328,238 319,224 318,186 328,178 293,159 294,139 318,125
        318,119 289,110 235,81 217,65 214,34""",
        0,
    ),
    "photographer": Subject(
        "camera",
        """205,65 240,80 262,100 270,130 258,141 322,138 323,170 331,185 330,205 315,225 300,235 303,270 280,290 240,311
        205,300 170,350 143,385 148,440 148,511 0,511 0,270 40,200 60,150 100,128 130,118 155,105 165,80 185,67""",
        None,
    ),
    "shuttle": Subject(
        "astronaut",
        """424,0 408,0 398,24 397,50 389,81 388,99 378,115 378,183 362,203 362,222 376,225 380,229 379,238 389,244
        400,242 406,249 412,237 426,238 431,235 447,234 453,230 455,67 448,56 445,40 435,28""",
        0,
    ),
    "grey cat": Subject("chelsea", _CAT, None),
    "green cup": Subject("coffee", _CUP, 220),
    "violet dahlia": Subject("flower", _DAHLIA, 90),
    "blue motorcycle": Subject("motorcycle", _MOTORCYCLE, 110),
}
"""Twelve subjects as photographed, then four of them in another colour."""

UNSEEN = ("pagoda", "officer", "coin with two figures")
"""The subjects that an open set leaves out of training, in this order: one like no other, one that is a person as two
others are, one that looks much like another."""

BACKGROUNDS: Mapping[str, tuple[str, Box]] = {
    "dusk": ("rocket", (240, 0, 420, 180)),
    "lake": ("china", (400, 30, 640, 270)),
    "leaves": ("flower", (0, 0, 170, 170)),
    "studio": ("astronaut", (298, 30, 358, 90)),
    "wood": ("coffee", (470, 150, 600, 280)),
}
"""The photograph of each background, and the square in it that fills the frame, out of focus."""

STORED = 56
"""Side in pixels of `cut_out`: so little above that of a subject in a clip that `lay` needs no filter."""

_FOCUS = 0.05
"""Radius of the blur of backgrounds, as a share of the frame's side."""


@functools.cache
def background(name: str, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """A background at `side` x `side` pixels, out of focus. The array is cached: do not write to it."""
    photograph, box = BACKGROUNDS[name]
    square = _read(photograph).crop(box).resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(square.filter(ImageFilter.GaussianBlur(_FOCUS * side)))


@functools.cache
def cut_out(name: str) -> Image.Image:
    """A subject on a transparent square, as large as the square allows; RGBA."""
    subject = SUBJECTS[name]
    photograph, corners = _read(subject.photograph), subject.corners()
    (left, top), (right, bottom) = np.min(corners, 0).tolist(), np.max(corners, 0).tolist()
    mask = Image.new("L", photograph.size)
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    pixels = np.asarray(photograph.crop((left, top, right + 1, bottom + 1)))
    alpha = np.asarray(mask.crop((left, top, right + 1, bottom + 1)))
    coloured = recolour(pixels, subject.hue) if subject.hue != 0 else pixels
    whole = np.dstack([coloured, alpha])
    side = max(whole.shape[:2])
    rows, columns = side - whole.shape[0], side - whole.shape[1]
    padding = ((rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0))
    square = Image.fromarray(np.pad(whole, padding))
    return square.resize((STORED, STORED), Image.Resampling.LANCZOS)


def recolour(pixels: UInt8[np.ndarray, "h w 3"], hue: float | None) -> UInt8[np.ndarray, "h w 3"]:
    """Turns the hue in YIQ by an angle in degrees, at the same luma; None removes the colour."""
    yiq = rgb2yiq(pixels)
    angle = np.deg2rad(hue or 0)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * (hue is not None)
    yiq[..., 1:] = yiq[..., 1:] @ turn.T
    return np.clip(np.rint(yiq2rgb(yiq) * 255), 0, 255).astype(np.uint8)


def _read(name: str) -> Image.Image:
    return Image.open(FILES[name]).convert("RGB")


@dataclasses.dataclass(frozen=True)
class View:
    """How a subject is shown."""

    mirrored: bool
    turn: float = 0.0
    """Degrees, counterclockwise."""
    scale: float = 1.0
    """Longer side of its box, relative to the side of the square that it is put into."""
    light: float = 1.0
    """Factor of its brightness."""


def lay(
    subject: Image.Image, view: View, centre: tuple[float, float], side: int, canvas: UInt8[np.ndarray, "h w 3"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Lays a cut-out on a canvas.

    Args:
      subject: RGBA, a square.
      view: how it is shown.
      centre: row and column of the square's centre on the canvas, in pixels.
      side: of the square into which it is put, in pixels.
      canvas: RGB; not changed.
    """
    angle = np.deg2rad(view.turn)
    per_pixel = subject.width / (side * view.scale)  # pixels of the cut-out for each of the canvas
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * per_pixel
    if view.mirrored:
        turn[0] = -turn[0]
    offset = subject.width / 2 - turn @ np.array([centre[1], centre[0]])
    height, width = canvas.shape[:2]
    placed = subject.transform(
        (width, height),
        Image.Transform.AFFINE,
        (*turn[0], offset[0], *turn[1], offset[1]),
        Image.Resampling.BICUBIC,
        fillcolor=(0, 0, 0, 0),
    )
    pixels = np.asarray(placed).astype(np.float32)
    alpha = pixels[..., 3:] / 255
    lit = np.minimum(pixels[..., :3] * view.light, 255)
    return np.rint(lit * alpha + canvas * (1 - alpha)).astype(np.uint8)
