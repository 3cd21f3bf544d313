"""Images and masks of every form to pixels, and files that are none."""

import os
import re

import numpy as np
import pytest
from PIL import Image
from support.footage import photograph

from refalign_jax.data.images import read_image, read_mask


def test_image_is_turned_by_its_exif(tmp_path):
    image = Image.fromarray(photograph("cat"))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    image.save(tmp_path / "cat.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "cat.png"), np.rot90(photograph("cat"), -1))


def test_images_of_every_mode(tmp_path):
    grey = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
    for mode in ("L", "P", "RGB", "CMYK"):
        Image.fromarray(grey).convert(mode).save(tmp_path / f"{mode}.tif")
        np.testing.assert_allclose(read_image(tmp_path / f"{mode}.tif"), grey[..., None].repeat(3, 2), atol=1)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    np.testing.assert_array_equal(read_image(tmp_path / "16.png")[..., 1], grey)
    clear = np.concatenate([photograph("cat"), np.full((96, 128, 1), 255, np.uint8)], -1)
    clear[:40, :, 3] = 0
    Image.fromarray(clear).save(tmp_path / "clear.png")
    read = read_image(tmp_path / "clear.png")
    assert (read[:40] == 255).all()
    np.testing.assert_array_equal(read[40:], photograph("cat")[40:])


def test_masks_of_every_kind(tmp_path):
    expected = np.zeros((20, 30), bool)
    expected[4:10, 5:25] = True
    bright = Image.fromarray((expected * 255).astype(np.uint8))
    labels = Image.fromarray(expected.astype(np.uint8))
    palette = labels.copy()
    palette.putpalette([0, 0, 0, 128, 0, 0])
    alpha = Image.new("RGBA", (30, 20), (255, 255, 255, 255))
    alpha.putalpha(bright)
    for name, image in {"bright": bright, "bits": Image.fromarray(expected), "labels": labels, "alpha": alpha}.items():
        image.save(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(read_mask(tmp_path / f"{name}.png"), expected, err_msg=name)
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "palette.png"), expected)
    Image.new("L", (30, 20)).save(tmp_path / "black.png")
    assert not read_mask(tmp_path / "black.png").any()


def test_files_that_are_no_images(tmp_path):
    Image.fromarray(photograph("cat")).save(tmp_path / "cat.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "cat.png").read_bytes()[:9000])
    (tmp_path / "text.png").write_text("not an image")
    for name, message in [
        ("none", "does not exist"),
        ("text", "in a format that is read: PNG, JPEG"),
        ("half", "truncated"),
    ]:
        for read, what in ((read_image, "an image"), (read_mask, "a mask")):
            with pytest.raises(ValueError, match=rf"{name}\.png .*{message}") as caught:
                read(tmp_path / f"{name}.png")
            assert what in str(caught.value)
            assert re.fullmatch(r"[^\n]+\.", str(caught.value))


def test_greys_of_16_and_32_bits_keep_their_values(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.pgm")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.tif")
    for kind, name in ((np.int32, "whole"), (np.float32, "floating")):
        Image.fromarray(grey.astype(kind)).save(tmp_path / f"{name}.tif")
        Image.fromarray(grey.astype(kind) * 257).save(tmp_path / f"{name} of 16 bits.tif")
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "one.tif")
    Image.fromarray(grey.astype(np.uint16) // 8 * 257).save(tmp_path / "dark.pgm")
    for path in sorted(tmp_path.iterdir()):
        expected = grey // 8 if path.stem == "dark" else grey
        np.testing.assert_array_equal(read_image(path), expected[..., None].repeat(3, 2), err_msg=path.name)


@pytest.mark.parametrize("low", [-1, 65536, np.nan, np.inf])
def test_greys_outside_every_range_are_refused(tmp_path, low):
    Image.fromarray(np.array([[0, low]], np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(
        ValueError, match=r"x\.tif can't be read as an image: its greys go from .*must lie in 0 to 1, 255"
    ):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_masks_of_16_and_32_bits_are_not_clipped(tmp_path, kind):
    values = np.array([[0, 300, 499, 500, 1000]], kind)
    Image.fromarray(values).save(tmp_path / "ids.tif")
    assert read_mask(tmp_path / "ids.tif").tolist() == [[False, False, False, True, True]]
    matte = photograph("cat")[..., 0]
    Image.fromarray(matte).save(tmp_path / "8.png")
    Image.fromarray(matte.astype(kind) * 257).save(tmp_path / "wide.tif")
    np.testing.assert_array_equal(read_mask(tmp_path / "wide.tif"), read_mask(tmp_path / "8.png"))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.float32])
def test_a_map_of_several_objects_is_no_mask(tmp_path, kind):
    """Which of them is the subject is not known; half of the largest number means nothing."""
    values = np.zeros((8, 8), kind)
    values[1:4, 1:4], values[5:8, 3:8] = 30, 100
    Image.fromarray(values).save(tmp_path / "ids.tif")
    with pytest.raises(ValueError, match=r"ids\.tif can't be read as a mask: it holds the values 30, 100, each over"):
        read_mask(tmp_path / "ids.tif")
    colours = Image.fromarray((values.astype(np.uint8) > 0) + (values.astype(np.uint8) > 50).astype(np.uint8), "P")
    colours.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    colours.save(tmp_path / "colours.png")
    with pytest.raises(ValueError, match=r"colours\.png can't be read as a mask: it holds the values 1, 2, each over"):
        read_mask(tmp_path / "colours.png")
    values[0, 0] = 10  # an edge's value: a matte
    Image.fromarray(values).save(tmp_path / "matte.tif")
    np.testing.assert_array_equal(read_mask(tmp_path / "matte.tif"), values == 100)
    values[values == 30], values[0, 0] = 60, 0  # both are at least half as bright as the brightest
    Image.fromarray(values).save(tmp_path / "levels.tif")
    np.testing.assert_array_equal(read_mask(tmp_path / "levels.tif"), values > 0)


def test_a_mask_that_is_not_finite_is_refused(tmp_path):
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x\.tif can't be read as a mask: it holds values that are not finite\."):
        read_mask(tmp_path / "x.tif")


def test_formats_that_start_another_program_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    Image.fromarray(photograph("cat")).save(tmp_path / "cat.eps")
    (tmp_path / "cat.eps").rename(tmp_path / "cat.png")
    with pytest.raises(ValueError, match=r"cat\.png is not an image in a format that is read: PNG, "):
        read_image(tmp_path / "cat.png")


def test_the_first_picture_of_several_is_read(tmp_path):
    pictures = [Image.fromarray(photograph(name)) for name in ("cat", "coffee")]
    for suffix in ("png", "tif", "gif"):
        pictures[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=pictures[1:])
        assert np.abs(read_image(tmp_path / f"x.{suffix}").astype(int) - photograph("cat")).mean() < 8


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    Image.new("L", (200, 100)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    for read, what in ((read_image, "an image"), (read_mask, "a mask")):
        with pytest.raises(ValueError, match=rf"x\.png is too large for {what}; at most 10000 pixels are read\."):
            read(tmp_path / "x.png")


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path / "pipe", "is a FIFO, a socket or a device; expected an image"),
        ("/dev/zero", "is a FIFO, a socket or a device; expected an image"),
        (tmp_path, "is a folder; expected an image"),
        (tmp_path / ("n" * 300), "can't be read as an image: File name too long"),
        (tmp_path / "pipe" / "x", "does not exist; expected an image"),
    ]:
        with pytest.raises(ValueError, match=re.escape(f"{path} {message}.")):
            read_image(path)
