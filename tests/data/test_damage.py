"""Damaged images and videos: each is read or refused in one sentence that begins with its path."""

import io

import numpy as np
import pytest
from PIL import Image
from support.footage import photograph
from support.forms import encode

from refalign_jax.data.images import read_image, read_mask
from refalign_jax.data.video import probe, read_frames


def damaged(data, rng):
    """Cut off, with changed bytes anywhere or in the head, or with some bytes missing."""
    changed, place = bytearray(data), int(rng.integers(len(data)))
    match rng.integers(4):
        case 0:
            del changed[place:]
        case 1:
            for place in rng.integers(len(data), size=rng.integers(1, 8)):
                changed[place] = rng.integers(256)
        case 2:
            place = rng.integers(min(len(data) - 4, 600))
            changed[place : place + 4] = rng.bytes(4)
        case _:
            del changed[place : place + rng.integers(1, 80)]
    return bytes(changed)


def check(read, path):
    said = f"{path}."
    try:
        read(path)
    except ValueError as error:
        said = str(error)
    assert said.startswith(str(path))
    assert said.endswith(".")
    assert "\n" not in said


FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "AVIF", "JPEG2000", "16", "float"]


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it mends
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_images(tmp_path, kind):
    picture, whole = Image.fromarray(photograph("cat")).resize((40, 30)), io.BytesIO()
    if kind == "16":
        Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)).save(whole, "PPM")
    elif kind == "float":
        Image.fromarray(np.arange(1200, dtype=np.float32).reshape(30, 40)).save(whole, "TIFF")
    else:
        picture.save(whole, kind)
    rng = np.random.default_rng(FORMATS.index(kind))
    for _ in range(40):
        (tmp_path / "x").write_bytes(damaged(whole.getvalue(), rng))
        check(read_image, tmp_path / "x")
        check(read_mask, tmp_path / "x")


VIDEOS = [
    ("x.mp4", "libx264"),
    ("x.mkv", "libx264"),
    ("x.webm", "libvpx-vp9"),
    ("x.avi", "mpeg4"),
    ("x.ts", "libx264"),
    ("x.mpg", "mpeg2video"),
]


@pytest.mark.parametrize(("name", "codec"), VIDEOS)
def test_damaged_videos(tmp_path, name, codec):
    encode(tmp_path / name, range(12), codec)
    whole = (tmp_path / name).read_bytes()
    rng = np.random.default_rng(VIDEOS.index((name, codec)))
    for _ in range(25):
        (tmp_path / name).write_bytes(damaged(whole, rng))
        check(lambda path: read_frames(path, range(probe(path).num_frames)), tmp_path / name)
