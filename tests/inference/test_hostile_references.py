"""References of every kind that people have: each gives the right picture, or one sentence."""

import os
import struct
import sys
import types
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from refalign_jax.data.records import Reference
from refalign_jax.data.video import write_video
from refalign_jax.inference.background import open_cut_out
from refalign_jax.inference.references import has_background, prepare_references

RED, BLUE = (200, 40, 30), (20, 60, 190)
SIZE = (32, 48)


def halves(height=64, width=96):
    """Red to the left, blue to the right."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2], image[:, width // 2 :] = RED, BLUE
    return Image.fromarray(image)


def cut_out():
    """The same in the middle of a transparent canvas of its shape, twice as large."""
    canvas = Image.new("RGBA", (192, 128), (0, 255, 0, 0))
    canvas.paste(halves(), (48, 32))
    return canvas


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    halves().transpose(Image.Transpose.ROTATE_90).save(path, "JPEG", exif=exif, quality=95)


def animated(path):
    halves().save(path, save_all=True, append_images=[Image.new("RGB", (96, 64))])


def lab(path):
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    ImageCms.applyTransform(halves(), to_lab).save(path, "TIFF")


def damaged_profile(path):
    halves().save(path, icc_profile=b"no profile")


PICTURES = {
    "plain.png": lambda path: halves().save(path),
    "turned.jpg": turned,
    "cmyk.jpg": lambda path: halves().convert("CMYK").save(path, quality=95),
    "progressive.png": lambda path: halves().save(path, "JPEG", progressive=True, quality=95),
    "palette.gif": animated,
    "pages.tiff": animated,
    "lossless.webp": lambda path: halves().save(path, lossless=True),
    "small.bmp": lambda path: halves().save(path),
    "old.tga": lambda path: halves().save(path),
    "older.pcx": lambda path: halves().save(path),
    "camera.mpo": lambda path: halves().save(path, "MPO", save_all=True, append_images=[halves()], quality=95),
    "icon.ico": lambda path: halves(64, 64).save(path, sizes=[(64, 64)]),
    "lab.tiff": lab,
    "profile.png": damaged_profile,
    "ycbcr.tiff": lambda path: halves().convert("YCbCr").save(path),
    "name with spaces \u4e2d\u6587.png": lambda path: halves().save(path),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_right_picture(tmp_path, name):
    PICTURES[name](tmp_path / name)
    (found,) = prepare_references([Reference(path=tmp_path / name)], SIZE, None)
    assert np.abs(found[16, 17].astype(int) - RED).max() < 30, found[16, 17]
    assert np.abs(found[16, 31].astype(int) - BLUE).max() < 30, found[16, 31]


@pytest.mark.parametrize("name", ["alpha.png", "alpha.webp", "palette.png", "premultiplied.tiff"])
def test_transparent_pixels_are_white(tmp_path, name):
    image = cut_out()
    if name == "palette.png":
        image = image.quantize(8)
    image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    (found,) = prepare_references([Reference(path=tmp_path / name)], SIZE, None)
    assert (found[3, 3] == 255).all()
    assert np.abs(found[16, 20].astype(int) - RED).max() < 30
    assert not has_background(Reference(path=tmp_path / name))


def test_greys_and_single_bits(tmp_path):
    grey = np.asarray(halves().convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "grey16.png")
    halves().convert("1", dither=Image.Dither.NONE).save(tmp_path / "bits.png")
    halves().convert("LA").save(tmp_path / "la.png")
    for name in ("grey16.png", "la.png"):
        (found,) = prepare_references([Reference(path=tmp_path / name)], SIZE, None)
        assert abs(int(found[16, 17, 0]) - np.asarray(halves().convert("L"))[0, 0]) <= 2, name
    (found,) = prepare_references([Reference(path=tmp_path / "bits.png")], SIZE, None)
    assert (found[16, 24] == 0).all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1), (3, 2)])
def test_sizes_at_the_edge(tmp_path, height, width):
    Image.new("RGB", (width, height), RED).save(tmp_path / "a.png")
    (found,) = prepare_references([Reference(path=tmp_path / "a.png")], SIZE, None)
    assert found.shape == (*SIZE, 3)
    assert np.abs(found.astype(int) - RED).max(-1).min() <= 2


def bomb(path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))


def truncated(path):
    halves(256, 256).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:900])


def not_finite(path):
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(path)


def video(path):
    write_video(path, np.zeros((1, 32, 32, 3), np.uint8), 8)


SENTENCES = {
    "truncated.jpg": (truncated, "can't be read as an image"),
    "empty.png": (lambda path: path.write_bytes(b""), "it is empty"),
    "text.jpg": (lambda path: path.write_text("a cat"), "is not an image in a format that is read: PNG, JPEG"),
    "phone.heic": (lambda path: path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"), "it is HEIC, which a phone"),
    "drawing.svg": (lambda path: path.write_text('<svg xmlns="http://www.w3.org/2000/svg"/>'), "it is SVG"),
    "page.pdf": (lambda path: path.write_bytes(b"%PDF-1.7\n"), "it is PDF"),
    "print.eps": (lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "PostScript"),
    "clip.mp4": (video, "it is a video"),
    "bomb.png": (bomb, "is too large for an image"),
    "folder.png": (lambda path: path.mkdir(), "is a folder; expected an image"),
    "pipe.png": (os.mkfifo, "is a FIFO, a socket or a device"),
    "link.png": (lambda path: path.symlink_to("nowhere"), "does not exist; expected an image"),
    "gone.png": (lambda path: None, "does not exist; expected an image"),
    "clear.png": (lambda path: Image.new("RGBA", (9, 9)).save(path), "shows nothing: all of it is white or transp"),
    "white.png": (lambda path: Image.new("RGB", (9, 9), "white").save(path), "shows nothing"),
    "nan.tiff": (not_finite, "its greys go from nan to nan"),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_one_sentence(tmp_path, name):
    write, message = SENTENCES[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        prepare_references([Reference(path=tmp_path / name)], SIZE, None)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_a_name_that_no_file_can_have():
    from pathlib import Path

    with pytest.raises(ValueError, match="is not a path"):
        prepare_references([Reference(path=Path("a\0b.png"))], SIZE, None)


@pytest.fixture
def rembg(monkeypatch):
    """A package that finds the left half of every picture."""
    package, sessions = types.ModuleType("rembg"), types.ModuleType("rembg.sessions")
    sessions.sessions_names = ["birefnet-general", "u2net"]
    package.sessions, package.__version__ = sessions, "2"
    package.new_session = lambda name: name
    package.calls = []

    def remove(image, session, only_mask):
        package.calls.append(session)
        matte = np.zeros(image.size[::-1], np.uint8)
        matte[:, : image.width // 2] = 255
        return Image.fromarray(matte)

    package.remove = remove
    monkeypatch.setitem(sys.modules, "rembg", package)
    monkeypatch.setitem(sys.modules, "rembg.sessions", sessions)
    return package


def test_a_background_is_removed_from_whole_pictures_alone(tmp_path, rembg):
    halves().save(tmp_path / "whole.png")
    cut_out().save(tmp_path / "cut.png")
    Image.new("L", (96, 64), 255).save(tmp_path / "mask.png")
    remover = open_cut_out("birefnet-general")
    assert remover.describe() == {"name": "rembg", "model": "birefnet-general", "version": "2"}
    whole = Reference(path=tmp_path / "whole.png")
    assert has_background(whole)
    others = [Reference(path=tmp_path / "cut.png"), Reference(path=tmp_path / "whole.png", mask=tmp_path / "mask.png")]
    first, cut, masked = prepare_references([whole, *others], SIZE, remover)
    assert rembg.calls == ["birefnet-general"]
    assert np.abs(first[16, 24].astype(int) - RED).max() <= 2  # the left half alone, in the middle
    assert (first[:, :10] == 255).all()
    assert (np.abs(masked[16, 31].astype(int) - BLUE) < 30).all()
    assert (cut[3, 3] == 255).all()


def test_a_background_that_can_not_be_removed_is_a_sentence(tmp_path, rembg, monkeypatch):
    halves().save(tmp_path / "a.png")
    references = [Reference(path=tmp_path / "a.png")]
    with pytest.raises(ValueError, match="rembg knows no model 'u3net'; choose one of birefnet-general, u2net"):
        open_cut_out("u3net")
    monkeypatch.setattr(rembg, "remove", lambda image, **_: Image.new("L", image.size))
    with pytest.raises(ValueError, match=r"a\.png: no subject is found in it"):
        prepare_references(references, SIZE, open_cut_out("u2net"))

    def no_network(name):
        raise ConnectionError("no route to github.com")

    monkeypatch.setattr(rembg, "new_session", no_network)
    with pytest.raises(ValueError, match=r"rembg can't run u2net \(ConnectionError: no route.*rembg d u2net"):
        prepare_references(references, SIZE, open_cut_out("u2net"))
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(ValueError, match=r"needs the package rembg .*pip install 'rembg\[cpu\]'"):
        open_cut_out("u2net")
