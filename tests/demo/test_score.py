"""The classifier, the pose and the similarity: right on true clips, low on what a failed model would give."""

import dataclasses

import numpy as np

from refalign_jax.data.video import to_float, to_pixels
from refalign_jax.demo import scenes as demo
from refalign_jax.demo import score
from refalign_jax.demo.photographs import SUBJECTS, View
from refalign_jax.encoders.dct import DCTCodec

SCENES = demo.draw_scenes(24, seed=3)
CODEC = DCTCodec(demo.CELL // 2, 24)


def coded(frames):
    return to_pixels(CODEC.decode(CODEC.encode(to_float(frames)[None]))[0])


def test_true_clips_are_named_right_and_copy_no_pose():
    for scene in SCENES:
        clip = coded(demo.frames(scene))
        assert score.background_error(clip, clip, scene) == 0
        for verdict in score.judge(clip, clip, scene):
            assert verdict.recognised == verdict.recognised_in_truth == verdict.requested
            assert not verdict.copied
            assert not verdict.copied_in_truth
            np.testing.assert_allclose(verdict.ssim, 1)


def test_a_copied_pose_is_noticed():
    """The reference's view where the other one was asked for, at the light of the clip or of the reference."""
    for scene in SCENES[:8]:
        shots = []
        for number in range(demo.NUM_FRAMES):
            shot = demo.background(scene.background, 96)
            for actor in scene.actors:
                shot = demo.draw(actor, score.latent_frame(number), shot, actor.reference)
            shots.append(shot)
        verdicts = score.judge(coded(np.stack(shots)), coded(demo.frames(scene)), scene)
        assert all(verdict.copied and not verdict.copied_in_truth for verdict in verdicts)


def test_scrambled_patches_are_not_similar():
    """The right nine cells in a wrong order: the SSIM is far below the bar of 0.5, and so is that of noise."""
    actor = demo.Actor("cat", "upper", 1, "still", View(mirrored=True))
    scene = demo.Scene((actor,), "leaves")
    truth = coded(demo.frames(scene))
    scrambled, rng = truth.copy(), np.random.default_rng(0)
    for number, frame in enumerate(scrambled):
        region = demo.region(actor, score.latent_frame(number))
        cells = frame[region].reshape(3, 16, 3, 16, 3).swapaxes(1, 2).reshape(9, 16, 16, 3)
        shuffled = cells[np.roll(np.arange(9), 1 + rng.integers(8))].reshape(3, 3, 16, 16, 3).swapaxes(1, 2)
        frame[region] = shuffled.reshape(48, 48, 3)
    for wrong in (scrambled, rng.integers(0, 256, truth.shape, np.uint8)):
        assert score.judge(wrong, truth, scene)[0].ssim < 0.3


def test_another_subject_or_place_is_wrong():
    first = demo.Actor("cat", "upper", 0, "still", View(mirrored=True))
    second = demo.Actor("shuttle", "lower", 3, "left", View(mirrored=True))
    asked = demo.Scene((first, second), "leaves")
    swapped = demo.Scene(
        (dataclasses.replace(first, subject="shuttle"), dataclasses.replace(second, subject="grey cat")), "leaves"
    )
    verdicts = score.judge(coded(demo.frames(swapped)), coded(demo.frames(asked)), asked)
    assert [(v.requested, v.recognised, v.recognised_in_truth) for v in verdicts] == [
        ("cat", "shuttle", "cat"),
        ("shuttle", "grey cat", "shuttle"),
    ]
    assert max(v.ssim for v in verdicts) < 0.5


def test_the_background_is_compared_outside_the_subjects():
    actor = demo.Actor("cat", "upper", 1, "right", View(mirrored=True))
    scene = demo.Scene((actor,), "leaves")
    truth = demo.frames(scene)
    other = demo.frames(demo.Scene((dataclasses.replace(actor, subject="cup"),), "leaves"))
    assert score.background_error(other, truth, scene) == 0
    lighter = np.clip(truth.astype(int) + 10, 0, 255).astype(np.uint8)
    np.testing.assert_allclose(score.background_error(lighter, truth, scene), 10)


def test_the_sum_counts_one_and_two_subjects_apart():
    def verdict(requested, recognised, ssim, copied=False):
        return score.Verdict(
            requested=requested,
            recognised=recognised,
            recognised_in_truth=requested,
            copied=copied,
            copied_in_truth=False,
            ssim=ssim,
        )

    def judged(*verdicts):
        return score.Judged(verdicts=verdicts, background_error=4.0 * len(verdicts))

    found = score.evaluation(
        [
            judged(verdict("cat", "cat", 0.8)),
            judged(verdict("cat", "cup", 0.2), verdict("shuttle", "shuttle", 0.5)),
            judged(verdict("cup", "cup", 0.5), verdict("shuttle", "shuttle", 0.0, copied=True)),
        ]
    )
    numbers = found["numbers"]
    assert numbers["right subject"] == 0.8
    assert numbers["right subject, one requested"] == 1
    assert numbers["right subject, two requested"] == 0.75
    assert numbers["both subjects right, two requested"] == 0.5
    assert numbers["right subject by chance"] == 1 / len(SUBJECTS)
    assert numbers["right subject in the true clips"] == 1
    assert numbers["pose copied from the reference"] == 0.2
    np.testing.assert_allclose(numbers["SSIM to the true clip over the subject"], 0.4)
    np.testing.assert_allclose(numbers["background's difference from the true clip, of 255"], 20 / 3)
    one, two = found["confusions"]
    place = {name: number for number, name in enumerate(one["labels"])}
    assert np.array(one["matrix"]).sum() == 1
    matrix = np.array(two["matrix"])
    assert matrix.sum() == 4
    assert matrix[place["cat"], place["cup"]] == 1
    assert matrix[place["shuttle"], place["shuttle"]] == 2
    alone = score.evaluation([judged(verdict("cat", "cat", 0.8))])
    assert len(alone["confusions"]) == 1
    assert "right subject, two requested" not in alone["numbers"]
