"""Subjects on white: fitted, centred, masked, altered."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from support.footage import photograph

from refalign_jax.config import AugmentConfig
from refalign_jax.data.records import Reference
from refalign_jax.data.references import cut_subject, load_reference, put_on_white

STILL = AugmentConfig(
    flip=0,
    rotation=0,
    shear=0,
    perspective=0,
    perspective_probability=0,
    shift=0,
    scale=(1, 1),
    brightness=(1, 1),
    colour=0,
)


def on_white(image, height, width, *, mask=None, box=None, augment=None, rng=None, what="the image"):
    return put_on_white(*cut_subject(image, mask, box, what), height, width, augment, rng).pixels


def block(height=40, width=60, colour=(200, 30, 60)):
    """A box of one colour that fills the image."""
    return np.full((height, width, 3), colour, np.uint8)


def extent(image):
    """Rows and columns of what is not white: first and last + 1."""
    subject = (image < 250).any(-1)
    rows, columns = np.flatnonzero(subject.any(1)), np.flatnonzero(subject.any(0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def augmented(image, seed, mask=None, **changes):
    config = dataclasses.replace(STILL, **changes)
    return on_white(image, 64, 96, mask=mask, augment=config, rng=np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((40, 60), (0, 64, 0, 96)), ((20, 80), (20, 44, 0, 96)), ((80, 40), (0, 64, 32, 64)), ((9, 9), (0, 64, 16, 80))],
)
def test_subject_is_fitted_and_centred(shape, expected):
    out = on_white(block(*shape), 64, 96)
    assert (out.shape, out.dtype) == ((64, 96, 3), np.uint8)
    assert extent(out) == expected
    top, bottom, left, right = expected
    assert (out[top:bottom, left:right] == (200, 30, 60)).all()
    assert (out[:top] == 255).all()
    assert (out[:, right:] == 255).all()


def test_mask_cuts_out_and_its_bounds_are_fitted():
    image, mask = photograph("cat"), np.zeros((96, 128), bool)
    mask[30:62, 20:52] = True
    mask[46:, 36:] &= False
    out = on_white(image, 64, 96, mask=mask)
    assert extent(out)[:2] == (0, 64)
    assert (out[35:, 51:] == 255).all()  # the quarter that is not the subject
    assert (out[:, :16] == 255).all()
    box = on_white(image, 64, 96, box=(20, 30, 52, 62))
    assert np.abs(out[2:30, 18:46].astype(int) - box[2:30, 18:46]).max() <= 1
    both = on_white(image, 64, 96, mask=mask, box=(10, 30, 74, 62))
    np.testing.assert_allclose(extent(both)[2:], (15, 63), atol=1)  # the box is fitted; the mask is in 10 to 42 of 64


def test_what_does_not_fit_is_told():
    image = photograph("cat")
    with pytest.raises(ValueError, match=r"The mask of cat\.png is 96x128, the image 128x96\."):
        on_white(image, 64, 96, mask=np.ones((128, 96), bool), what="cat.png")
    with pytest.raises(ValueError, match=r"The mask of cat\.png is empty\."):
        on_white(image, 64, 96, mask=np.zeros((96, 128), bool), what="cat.png")
    corner = np.zeros((96, 128), bool)
    corner[0, 0] = True
    with pytest.raises(ValueError, match=r"is empty inside the box\."):
        on_white(image, 64, 96, mask=corner, box=(5, 5, 9, 9))
    with pytest.raises(ValueError, match=r"right 129, bottom 9 does not fit"):
        on_white(image, 64, 96, box=(5, 5, 129, 9))


def test_no_alteration_changes_nothing():
    image = photograph("cat", 64, 96)
    np.testing.assert_array_equal(on_white(image, 64, 96), image)
    np.testing.assert_allclose(augmented(image, 0).astype(int), image, atol=1)


def test_alterations_come_from_the_generator_alone():
    config = AugmentConfig()
    images = [
        on_white(photograph("cat"), 64, 96, augment=config, rng=np.random.default_rng(seed)) for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(images[0], images[1])
    assert np.abs(images[0].astype(int) - images[2]).mean() > 5


def test_flip_happens_half_of_the_time_and_mirrors():
    plain = augmented(photograph("cat"), 0).astype(int)
    flips = 0
    for seed in range(60):
        out = augmented(photograph("cat"), seed, flip=0.5)
        mirrored = np.abs(out - plain[:, ::-1]).mean() < np.abs(out - plain).mean()
        assert np.abs(out - (plain[:, ::-1] if mirrored else plain)).mean() < 3
        flips += mirrored
    assert 18 <= flips <= 42


@pytest.mark.parametrize(
    "changes", [{"rotation": 45}, {"shear": 10}, {"perspective": 0.3, "perspective_probability": 1}]
)
def test_a_bent_subject_is_whole_and_touches_the_canvas(changes):
    shapes = set()
    for seed in range(12):
        out = augmented(block(), seed, **changes)
        top, bottom, left, right = extent(out)
        assert (top <= 1 and bottom >= 63) or (left <= 1 and right >= 95)
        assert abs(top + bottom - 64) <= 2
        assert abs(left + right - 96) <= 2
        shapes.add((top, bottom, left, right, int((out < 250).any(-1).sum())))
    assert len(shapes) > 6


def test_angle_of_rotation_is_in_range_and_both_ways():
    angles = []
    for seed in range(80):
        out = augmented(block(10, 200), seed, rotation=45)
        y, x = np.nonzero((out < 250).any(-1))
        angles.append(np.degrees(np.arctan(np.polyfit(x, y, 1)[0])))
    assert max(np.abs(angles)) <= 46
    assert min(angles) < -30
    assert max(angles) > 30


def test_scale_and_shift_stay_in_their_ranges():
    sizes, middles = [], []
    for seed in range(60):
        out = augmented(block(40, 30), seed, scale=(0.9, 1.1), shift=0.05)
        _, _, left, right = extent(out)
        sizes.append((right - left) / 48)
        middles.append((left + right) / 2 / 96 - 0.5)
    assert 0.88 <= min(sizes) < 0.94
    assert 1.06 < max(sizes) <= 1.13
    assert -0.06 <= min(middles) < -0.03
    assert 0.03 < max(middles) <= 0.06


def test_perspective_happens_as_often_as_asked():
    plain = augmented(block(), 0).astype(int)
    same = sum(
        np.abs(augmented(block(), seed, perspective=0.3, perspective_probability=0.5) - plain).mean() < 2
        for seed in range(60)
    )
    assert 18 <= same <= 42


def test_blur_is_drawn_and_leaves_the_white_alone():
    image, mask = photograph("cat"), np.zeros((96, 128), bool)
    mask[10:80, 20:100] = True
    sharp = augmented(image, 0, mask)
    detail = [np.abs(np.diff(augmented(image, seed, mask, blur=4.0).astype(int), axis=0)).mean() for seed in range(8)]
    assert len({*detail}) == 8
    assert max(detail) < np.abs(np.diff(sharp.astype(int), axis=0)).mean()
    blurred = augmented(image, 3, mask, blur=4.0)
    assert (blurred[(sharp == 255).all(-1)] == 255).all()
    with pytest.raises(ValueError, match=r"AugmentConfig\.blur=-1 must be at least 0"):
        AugmentConfig(blur=-1)


def test_brightness_and_colour_leave_the_white_alone():
    mask = np.zeros((96, 128), bool)
    mask[30:60, 40:70] = True
    grey = np.full((96, 128, 3), 100, np.uint8)
    values = []
    for seed in range(60):
        out = augmented(grey, seed, mask=mask, brightness=(0.9, 1.1), colour=0.05)
        assert (out[:, :10] == 255).all()
        assert (out[:, -10:] == 255).all()
        values.append(out[32, 48].astype(float))
    values = np.array(values)
    assert 75 < values.min() < 86
    assert 114 < values.max() < 125
    assert np.ptp(values, axis=1).max() > 8  # channels by themselves
    assert np.ptp(values, axis=1).max() <= 26


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": 1.5}, r"AugmentConfig.flip=1.5 must be at least 0 and at most 1"),
        ({"rotation": 200}, r"AugmentConfig.rotation=200 must be at least 0 and at most 180"),
        ({"scale": (1.2, 0.8)}, r"AugmentConfig.scale=\(1.2, 0.8\) must ascend"),
        ({"brightness": (0, 1)}, r"AugmentConfig.brightness=\(0, 1\) must be positive"),
    ],
)
def test_ranges_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**changes)


def test_where_the_subject_is_on_the_canvas():
    mask = np.zeros((40, 60), bool)
    mask[10:30, 10:30] = True
    mask[20:30, 20:30] = False
    laid = put_on_white(*cut_subject(block(), mask, None), 64, 96)
    assert extent(laid.pixels) == (0, 64, 16, 80)
    expected = np.zeros((64, 96), bool)
    expected[:, 16:80] = True
    expected[32:, 48:] = False
    assert (laid.subject != expected).mean() < 0.01
    for seed in range(5):
        rng = np.random.default_rng(seed)
        turned = put_on_white(*cut_subject(block(), mask, None), 64, 96, AugmentConfig(), rng)
        dark = (turned.pixels < 200).any(-1)
        assert (turned.subject != dark).mean() < 0.02  # mask and pixels are warped alike
        assert 0.1 < turned.subject.mean() < 0.9


def test_without_a_mask_the_subject_is_what_is_not_white(tmp_path):
    image = np.full((64, 96, 3), 255, np.uint8)
    image[16:48, 32:64] = (200, 30, 60)
    image[20:30, 40:50] = 252  # as JPEG might leave it
    Image.fromarray(image).save(tmp_path / "image.png")
    laid = load_reference(Reference(path=tmp_path / "image.png"), 64, 96)
    np.testing.assert_array_equal(laid.pixels, image)
    np.testing.assert_array_equal(laid.subject, (image < 250).any(-1))
    mask = np.zeros((64, 96), bool)
    mask[:20] = True
    white = load_reference(Reference(path=tmp_path / "image.png", mask=mask, box=(0, 0, 96, 64)), 64, 96)
    np.testing.assert_array_equal(white.subject, mask)  # a mask counts, whatever the colour
