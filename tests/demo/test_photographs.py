"""The demo's photographs and how they are cut out, and your own in their place."""

import numpy as np
import pytest
from PIL import Image

from refalign_jax.demo import photo, photographs
from refalign_jax.demo.photo import cut_photograph, sample_photograph
from refalign_jax.demo.photographs import SUBJECTS, View, background, cut_out, lay, recolour


def test_the_photographs_are_installed_and_subjects_fill_their_squares():
    """A package that no longer ships its photographs is noticed here."""
    assert len(SUBJECTS) == 16
    assert len({subject.outline for subject in SUBJECTS.values()}) == 12
    for name, subject in SUBJECTS.items():
        width, height = Image.open(photographs.FILES[subject.photograph]).size
        corners = np.array(subject.corners())
        assert (corners >= 0).all(), name
        assert (corners < (width, height)).all(), name
        pixels = np.asarray(cut_out(name))
        alpha = pixels[..., 3] > 128
        assert 0.15 < alpha.mean() < 0.85, name
        assert max(np.ptp(np.argwhere(alpha), axis=0)) >= photographs.STORED - 3, name


def test_look_alikes_differ_in_colour_alone():
    grey = {name: np.asarray(cut_out(name))[..., :3] @ (0.299, 0.587, 0.114) for name in ("cat", "grey cat", "cup")}
    assert np.abs(grey["cat"] - grey["grey cat"]).mean() < 3
    assert np.abs(grey["cat"] - grey["cup"]).mean() > 20
    pixels = np.random.default_rng(0).integers(60, 190, (4, 4, 3), np.uint8)
    assert np.ptp(recolour(pixels, None), axis=-1).max() <= 1
    np.testing.assert_allclose(recolour(pixels, 360), pixels, atol=1)


def test_a_view_mirrors_turns_shrinks_and_lights():
    white = np.full((96, 96, 3), 255, np.uint8)
    cat = cut_out("cat")

    def drawn(**view):
        return lay(cat, View(**{"mirrored": False} | view), (48, 48), 64, white).astype(float)

    plain = drawn()
    assert np.abs(drawn(mirrored=True)[:, ::-1] - plain).mean() < 1
    turned = np.asarray(Image.fromarray(plain.astype(np.uint8)).rotate(12, fillcolor=(255,) * 3)).astype(float)
    assert np.abs(drawn(turn=12.0) - turned).mean() < np.abs(drawn(turn=-12.0) - turned).mean() / 3
    assert (drawn(scale=0.5) < 250).any(-1).sum() < 0.35 * (plain < 250).any(-1).sum()
    inside = (plain < 150).all(-1)
    np.testing.assert_allclose(drawn(light=1.2)[inside].mean() / plain[inside].mean(), 1.2, atol=0.02)
    assert white.min() == 255


def test_backgrounds_are_smooth():
    for name in photographs.BACKGROUNDS:
        pixels = background(name, 96).astype(float)
        assert np.abs(np.diff(pixels, axis=1)).max() < 20, name


def test_a_photograph_is_cut_along_white_or_as_a_disc():
    ground = np.full((80, 120, 3), 255, np.uint8)
    ground[20:60, 30:100] = 90
    ground[35:45, 50:60] = 255  # a white part inside
    alpha = np.asarray(cut_photograph(ground))[..., 3]
    assert alpha[28].min() == 255  # the whole width, and the white part too
    assert alpha[:8].max() == alpha[-8:].max() == 0
    disc = np.asarray(cut_photograph(np.full((80, 120, 3), 90, np.uint8)))[..., 3]
    assert disc[28, 28] == 255
    assert disc[0, 0] == 0
    np.testing.assert_allclose((disc > 128).mean(), np.pi / 4, atol=0.03)


def test_a_photograph_needs_a_trained_run_and_an_image(tmp_path):
    image = tmp_path / "me.png"
    Image.new("RGB", (40, 30), (90, 80, 70)).save(image)
    with pytest.raises(ValueError, match=r"holds no finished run of the demo; run the demo without --photo first"):
        sample_photograph(image, tmp_path / "seed-0")
    image.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"me\.png is not"):
        sample_photograph(image, tmp_path / "seed-0")
    assert not (tmp_path / "photo").exists()
    assert len({scene.caption() for scene in photo.SCENES}) == 4
