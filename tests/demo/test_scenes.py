"""The demo's clips: what they show, what their captions say, and that they can be copied from the references."""

import collections

import numpy as np
import pytest

from refalign_jax.data.images import read_image
from refalign_jax.data.video import read_frames, to_float
from refalign_jax.demo import scenes as demo
from refalign_jax.encoders.dct import DCTCodec

SCENES = demo.draw_scenes(200, seed=0)


def test_scenes_are_distinct_and_a_function_of_the_seed():
    assert len({scene.caption() for scene in SCENES}) == len(set(SCENES)) == 200
    assert demo.draw_scenes(50, seed=0) == SCENES[:50]
    assert demo.draw_scenes(50, seed=1) != SCENES[:50]
    counts = collections.Counter(actor.subject for scene in SCENES for actor in scene.actors)
    assert counts.keys() == demo.SUBJECTS.keys()
    assert min(counts.values()) >= 10
    assert 70 < sum(len(scene.actors) == 2 for scene in SCENES) < 130


def test_actors_stay_inside_and_apart():
    for scene in SCENES:
        for number in range(demo.LATENT_FRAMES):
            covered = np.zeros((demo.GRID * demo.CELL,) * 2, int)
            for actor in scene.actors:
                covered[demo.region(actor, number)] += 1
            assert covered.max() == 1
            assert covered.sum() == len(scene.actors) * (demo.SIZE * demo.CELL) ** 2


def test_a_caption_says_who_where_how_and_over_what():
    first, second = demo.Actor("cat", "upper", 1, "right"), demo.Actor("coin", "lower", 3, "left")
    caption = demo.Scene((first, second), "wood").caption()
    assert caption == (
        "The cat starts upper-mid-left and moves right, the coin starts lower-right and drifts leftwards, "
        "over the wood."
    )


def test_captions_differ_even_without_their_order():
    """For the encoder knows no order. Who of two is meant, their references' order tells."""
    bags = collections.defaultdict(set)
    for scene in demo.draw_scenes(1000, seed=2):
        ways = tuple((actor.half, actor.column, actor.move) for actor in scene.actors)
        names = tuple(sorted(actor.subject for actor in scene.actors))
        bags[tuple(sorted(scene.caption().lower().replace(",", "").split()))].add((ways, names, scene.background))
    assert max(len(meanings) for meanings in bags.values()) == 1


def test_clips_show_the_photographs_where_the_scene_says(tmp_path):
    """And files keep them: half of H.264's colour is gone, but hardly a level of brightness."""
    scene = next(scene for scene in SCENES if len(scene.actors) == 2 and scene.actors[0].move != "still")
    (record,) = demo.write_clips(tmp_path, [scene])
    frames = demo.frames(scene)
    assert frames.shape == (demo.NUM_FRAMES, 96, 96, 3)
    for number in range(demo.NUM_FRAMES):
        for actor in scene.actors:
            shown = frames[number][demo.region(actor, (number + 3) // 4)]
            np.testing.assert_array_equal(shown, demo.photograph(actor.subject, 48))
    read = read_frames(record.video, range(demo.NUM_FRAMES))
    assert np.abs(read.mean(-1) - frames.mean(-1)).mean() < 2
    assert demo.read_scene(record.metadata["scene"]) == scene
    assert [reference.subject for reference in record.references] == [actor.subject for actor in scene.actors]
    for reference, actor in zip(record.references, scene.actors, strict=True):
        image = read_image(reference.path)
        np.testing.assert_array_equal(image, demo.reference(actor))
        assert (image != 255).any(-1).sum() <= 48 * 48


def test_clips_that_are_there_are_not_written_again(tmp_path):
    demo.write_clips(tmp_path, SCENES[:2])
    (tmp_path / "clips" / "00001.mp4").write_bytes(b"kept")
    records = demo.write_clips(tmp_path, SCENES[:3])
    assert [record.id for record in records] == ["00000", "00001", "00002"]
    assert (tmp_path / "clips" / "00001.mp4").read_bytes() == b"kept"


def test_tokens_of_a_reference_are_those_of_the_clip():
    codec = DCTCodec(demo.CELL // 2, 32)
    scene = SCENES[0]
    actor = scene.actors[0]
    clip = codec.encode(to_float(demo.frames(scene)[None, :1]))[0, 0]
    reference = codec.encode(to_float(demo.reference(actor))[None, None])[0, 0]
    row, column = (2 * cell for cell in actor.cell(0))
    covered = slice(row, row + 2 * demo.SIZE), slice(column, column + 2 * demo.SIZE)
    np.testing.assert_allclose(clip[covered], reference[covered], atol=1e-5)


@pytest.mark.parametrize("number", [0, 10_001])
def test_numbers_of_clips_that_make_no_sense(number):
    with pytest.raises(ValueError, match=rf"can't draw {number} clips; ask for 1 to 10000"):
        demo.draw_scenes(number, seed=0)
