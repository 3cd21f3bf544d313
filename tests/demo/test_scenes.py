"""The demo's clips: what they show, what their captions say, and how their references differ from them."""

import collections

import numpy as np
import pytest

from refalign_jax.data.images import read_image
from refalign_jax.data.video import read_frames
from refalign_jax.demo import scenes as demo
from refalign_jax.demo.photographs import SUBJECTS, View, background

SCENES = demo.draw_scenes(200, seed=0)
ACTOR = demo.Actor("cat", "upper", 1, "right", View(mirrored=True, turn=10.0, scale=0.8, light=1.1))


def test_scenes_are_a_function_of_the_seed_and_show_every_subject():
    assert len(set(SCENES)) == 200
    assert demo.draw_scenes(50, seed=0) == SCENES[:50]
    assert demo.draw_scenes(50, seed=1) != SCENES[:50]
    counts = collections.Counter(actor.subject for scene in SCENES for actor in scene.actors)
    assert counts.keys() == SUBJECTS.keys()
    assert min(counts.values()) >= 8
    assert 70 < sum(len(scene.actors) == 2 for scene in SCENES) < 130
    few = demo.draw_scenes(50, seed=0, subjects=("cat", "cup"))
    assert {actor.subject for scene in few for actor in scene.actors} == {"cat", "cup"}


def test_actors_stay_inside_and_apart():
    for scene in SCENES:
        for number in range(demo.LATENT_FRAMES):
            covered = np.zeros((demo.GRID * demo.CELL,) * 2, int)
            for actor in scene.actors:
                covered[demo.region(actor, number)] += 1
            assert covered.max() == 1
            assert covered.sum() == len(scene.actors) * (demo.SIZE * demo.CELL) ** 2


def test_a_caption_says_where_how_and_over_what_but_not_who():
    second = demo.Actor("cup", "lower", 3, "left", View(mirrored=True))
    caption = demo.Scene((ACTOR, second), "wood").caption()
    assert caption == (
        "Something starts upper-mid-left and moves right, something else starts lower-right and drifts leftwards, "
        "over the wood."
    )
    words = {word for name in SUBJECTS for word in name.split()} - {"a", "with"}
    for scene in SCENES:
        assert not words & set(scene.caption().lower().replace(",", " ").split())


def test_captions_differ_even_without_their_order():
    """For the encoder knows no order."""
    bags = collections.defaultdict(set)
    for scene in demo.draw_scenes(1000, seed=2):
        ways = tuple((actor.half, actor.column, actor.move) for actor in scene.actors)
        words = scene.caption().lower().replace(",", "").split()
        bags[tuple(sorted(words))].add((ways, scene.background))
    assert max(len(meanings) for meanings in bags.values()) == 1


def test_a_reference_shows_another_side_than_the_clip():
    for scene in SCENES:
        for actor in scene.actors:
            shown = actor.reference
            assert shown.mirrored
            assert abs(shown.turn) <= 15
            assert 0.75 <= shown.scale <= 0.95
            assert 0.8 <= shown.light <= 1.2
    white = np.full((96, 96, 3), 255, np.uint8)
    one = demo.reference(ACTOR)
    there = demo.region(ACTOR, 0)
    outside = np.ones((96, 96), bool)
    outside[there] = False
    assert (one[outside] == 255).all()
    assert (one[there] != 255).any(-1).mean() > 0.2
    clip = demo.draw(ACTOR, 0, white)[there].astype(float)
    assert np.abs(clip - one[there]).mean() > 10


def test_clips_show_the_subjects_where_the_scene_says(tmp_path):
    """And files keep them: half of H.264's colour is gone, but hardly a level of brightness."""
    scene = next(scene for scene in SCENES if len(scene.actors) == 2 and scene.actors[0].move != "still")
    (record,) = demo.write_clips(tmp_path, [scene])
    frames = demo.frames(scene)
    assert frames.shape == (demo.NUM_FRAMES, 96, 96, 3)
    empty = background(scene.background, 96)
    for number in range(demo.NUM_FRAMES):
        differs = (frames[number] != empty).any(-1)
        for actor in scene.actors:
            there = demo.region(actor, (number + 3) // 4)
            assert differs[there].mean() > 0.15
            differs[there] = False
        assert not differs.any()
    read = read_frames(record.video, range(demo.NUM_FRAMES))
    assert np.abs(read.mean(-1) - frames.mean(-1)).mean() < 2
    assert demo.read_scene(record.metadata["scene"]) == scene
    assert [reference.subject for reference in record.references] == [actor.subject for actor in scene.actors]
    for reference, actor in zip(record.references, scene.actors, strict=True):
        np.testing.assert_array_equal(read_image(reference.path), demo.reference(actor))


def test_clips_that_are_there_are_not_written_again(tmp_path):
    demo.write_clips(tmp_path, SCENES[:2])
    (tmp_path / "clips" / "00001.mp4").write_bytes(b"kept")
    records = demo.write_clips(tmp_path, SCENES[:3])
    assert [record.id for record in records] == ["00000", "00001", "00002"]
    assert (tmp_path / "clips" / "00001.mp4").read_bytes() == b"kept"


@pytest.mark.parametrize("number", [0, 100_001])
def test_numbers_of_clips_that_make_no_sense(number):
    with pytest.raises(ValueError, match=rf"can't draw {number} clips; ask for 1 to 100000"):
        demo.draw_scenes(number, seed=0)
