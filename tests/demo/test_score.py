"""The classifier and the similarity: right on true clips, low on what a failed model would give."""

import dataclasses

import numpy as np

from refalign_jax.data.video import to_float, to_pixels
from refalign_jax.demo import scenes as demo
from refalign_jax.demo import score
from refalign_jax.encoders.dct import DCTCodec

SCENES = demo.draw_scenes(40, seed=3)
CODEC = DCTCodec(demo.CELL // 2, 32)


def through_codec(scene):
    return to_pixels(CODEC.decode(CODEC.encode(to_float(demo.frames(scene))[None]))[0])


def test_true_clips_are_named_right():
    verdicts = [score.judge(clip := through_codec(scene), clip, scene) for scene in SCENES]
    assert all(v.recognised == v.recognised_in_truth == v.requested for sample in verdicts for v in sample)
    np.testing.assert_allclose([v.ssim for sample in verdicts for v in sample], 1)


def test_scrambled_patches_are_not_similar():
    """The right nine cells in a wrong order: the SSIM is far below the bar of 0.5, and so is that of noise."""
    scene = next(scene for scene in SCENES if len(scene.actors) == 1)
    truth, (actor,) = through_codec(scene), scene.actors
    scrambled, rng = truth.copy(), np.random.default_rng(0)
    for number, frame in enumerate(scrambled):
        region = demo.region(actor, (number + 3) // 4)
        cells = frame[region].reshape(3, 16, 3, 16, 3).swapaxes(1, 2).reshape(9, 16, 16, 3)
        shuffled = cells[np.roll(np.arange(9), 1 + rng.integers(8))].reshape(3, 3, 16, 16, 3).swapaxes(1, 2)
        frame[region] = shuffled.reshape(48, 48, 3)
    for wrong in (scrambled, rng.integers(0, 256, truth.shape, np.uint8)):
        assert score.judge(wrong, truth, scene)[0].ssim < 0.3


def test_another_subject_or_place_is_wrong():
    first, second = demo.Actor("cat", "upper", 0, "still"), demo.Actor("rocket", "lower", 3, "left")
    asked = demo.Scene((first, second), "leaves")
    swapped = demo.Scene(
        (dataclasses.replace(first, subject="rocket"), dataclasses.replace(second, subject="cat")), "leaves"
    )
    verdicts = score.judge(through_codec(swapped), through_codec(asked), asked)
    assert [(v.requested, v.recognised, v.recognised_in_truth) for v in verdicts] == [
        ("cat", "rocket", "cat"),
        ("rocket", "cat", "rocket"),
    ]
    assert max(v.ssim for v in verdicts) < 0.3


def test_the_sum_counts_one_and_two_subjects_apart():
    def verdict(requested, recognised, ssim):
        return score.Verdict(requested=requested, recognised=recognised, recognised_in_truth=requested, ssim=ssim)

    found = score.evaluation(
        [
            [verdict("cat", "cat", 0.8)],
            [verdict("cat", "coin", 0.2), verdict("rocket", "rocket", 0.5)],
            [verdict("coin", "coin", 0.5), verdict("rocket", "cat", 0.0)],
        ]
    )
    numbers = found["numbers"]
    assert numbers["right subject"] == 0.6
    assert numbers["right subject, one requested"] == 1
    assert numbers["right subject, two requested"] == 0.5
    assert numbers["right subject in the true clips"] == 1
    np.testing.assert_allclose(numbers["SSIM to the true clip over the subject"], 0.4)
    one, two = found["confusions"]
    place = {name: number for number, name in enumerate(one["labels"])}
    assert np.array(one["matrix"]).sum() == 1
    matrix = np.array(two["matrix"])
    assert matrix.sum() == 4
    assert matrix[place["cat"], place["coin"]] == matrix[place["rocket"], place["cat"]] == 1
    alone = score.evaluation([[verdict("cat", "cat", 0.8)]])
    assert len(alone["confusions"]) == 1
    assert "right subject, two requested" not in alone["numbers"]
