"""Phantom-Data as a source: the oddities of its rows, boxes that can't be right, and references of other clips."""

import json
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.footage import SUBJECTS, panned
from support.published import TINY, reference, write_phantom

from refalign_jax.config import PhantomConfig
from refalign_jax.data.clips import Clip, load_clip
from refalign_jax.data.records import Record, Skipped
from refalign_jax.data.sources import phantom
from refalign_jax.data.sources.phantom import open_phantom, shrunk
from refalign_jax.data.video import read_frames, write_video

VIDS = {name: f"uuid-{name}_1.0_2.5" for name in SUBJECTS}
SIZES = dict.fromkeys(VIDS.values(), (96, 64))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for name, vid in VIDS.items():
        write_video(folder / f"{vid}.mp4", panned(name), fps=8)
    return folder


def opened(folder, rows, videos, sizes=SIZES, **changes):
    named = changes.pop("named", "video_id")
    annotations, metadata = write_phantom(folder, rows, sizes, named)
    config = PhantomConfig(videos=str(videos), metadata=str(metadata), **changes)
    return open_phantom(str(annotations), config, folder / "tables")


def row(**phrases):
    """A row on the cat whose phrases have these references."""
    found = {phrase: {"obj_from_tgt_video": [], "refer_result": result} for phrase, result in phrases.items()}
    return VIDS["cat"], "A cat and a cup.", found


CUP = reference(VIDS["coffee"], [10.0, 8.0, 60.0, 56.0])


@pytest.mark.parametrize("named", ["video_id", "vid"])
@pytest.mark.parametrize(
    "result",
    [
        [[CUP]],
        [CUP],
        [[CUP | {"bbox_loc": CUP["bbox_loc"][0]}]],
        [[CUP | {"bbox_loc": [CUP["bbox_loc"]]}]],
        [[CUP | {"frame_idx": 0.25}]],
    ],
    ids=["as published", "a list", "a bare box", "a box nested once more", "a number"],
)
def test_every_form_of_a_reference_is_read(tmp_path, videos, named, result):
    source = opened(tmp_path, [row(cup=result)], videos, named=named)
    (entry,) = [pickle.loads(pickle.dumps(entry)) for entry in source]
    record = entry.read()
    assert record.id == VIDS["cat"]
    assert record.prompt == "A cat and a cup."
    (found,) = record.references
    assert (found.subject, found.frame, found.own_clip) == ("cup", 0.25, False)
    clip = load_clip(record, TINY)
    assert isinstance(clip, Clip)
    (frame,) = read_frames(videos / f"{VIDS['coffee']}.mp4", [3])  # 0.25 of 12
    truth = frame[8:56, 10:60].mean((0, 1))
    np.testing.assert_allclose(clip.references[0][2:30, 10:38].mean((0, 1)), truth, atol=4)


def test_a_row_whose_pairs_are_no_text_is_read_too(tmp_path, videos):
    source = opened(tmp_path, [row(cup=[[CUP]])], videos)
    (entry,) = source
    plain = phantom.PhantomEntry(entry.id, entry.caption, json.loads(entry.pairs), source)
    assert [r.subject for r in plain.read().references] == ["cup"]


def test_boxes_count_pixels_of_the_shrunk_frame(tmp_path, videos):
    """The clip is 96x64; its metadata say 1536x1024, shrunk to 768x512: an eighth of the box's numbers."""
    big = CUP | {"bbox_loc": [[80.0, 64.0, 480.0, 448.0]]}
    one = opened(tmp_path, [row(cup=[[big]])], videos, dict.fromkeys(SIZES, (1536, 1024)))
    clip = load_clip(next(iter(one)).read(), TINY)
    (tmp_path / "b").mkdir()
    plain = opened(tmp_path / "b", [row(cup=[[CUP]])], videos)
    np.testing.assert_array_equal(clip.references, load_clip(next(iter(plain)).read(), TINY).references)


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_frames_are_shrunk_and_never_enlarged(width, height):
    columns, rows = shrunk(width, height)
    assert max(columns, rows) == min(max(width, height), 768)
    assert columns <= width
    assert rows <= height
    if max(width, height) <= 768:
        assert (columns, rows) == (width, height)
    assert shrunk(1920, 1080) == (768, 432)
    assert shrunk(1080, 1920) == (432, 768)


DROPPED = [
    (reference(VIDS["coffee"], [10, 8, 98.1, 56]), phantom.BEYOND),
    (reference(VIDS["coffee"], [10, 8, 60, 66]), phantom.BEYOND),
    (reference(VIDS["coffee"], [-3, 8, 60, 60]), phantom.BEYOND),
    (reference(VIDS["coffee"], [60, 8, 10, 60]), phantom.BEYOND),
    (reference(VIDS["coffee"], [10, 8, float("nan"), 60]), phantom.NOT_A_BOX),
    (reference(VIDS["coffee"], [10, 8, 60]), phantom.NOT_A_BOX),
    (reference(VIDS["coffee"], [10, 8, 60, 60], "soon"), phantom.NOT_A_BOX),
    (reference(VIDS["coffee"], [10, 8, 60, 60], 1.5), phantom.NOT_A_BOX),
    (reference("unknown_0_1", [10, 8, 60, 60]), phantom.NO_SIZE),
    (reference("gone_0_1", [10, 8, 60, 60]), phantom.CLIP_GONE),
    ({"vid": "x"}, phantom.NOT_A_BOX),
    (None, phantom.NOT_A_BOX),
]


@pytest.mark.parametrize(("wrong", "reason"), DROPPED, ids=range(len(DROPPED)))
def test_a_reference_that_can_not_be_used_is_dropped_with_its_reason(tmp_path, videos, wrong, reason):
    sizes = SIZES | {"gone_0_1": (96, 64)}
    rows = [row(cat=[[wrong]], cup=[[CUP]]), (VIDS["coffee"], "A cup.", row(cat=[[wrong]])[2])]
    both, alone = (entry.read() for entry in opened(tmp_path, rows, videos, sizes))
    assert [r.subject for r in both.references] == ["cup"]
    assert [(entry.subject, entry.reason) for entry in both.dropped] == [("cat", reason)]
    assert isinstance(alone, Skipped)
    assert alone.reason == phantom.NO_REFERENCE
    assert reason in alone.detail


def test_the_next_box_of_a_phrase_and_overlaps(tmp_path, videos):
    inner = reference(VIDS["coffee"], [12.0, 10.0, 50.0, 50.0])
    beyond = reference(VIDS["coffee"], [10, 8, 200, 56])
    (record,) = (entry.read() for entry in opened(tmp_path, [row(mug=[[beyond, CUP]], cup=[[inner]])], videos))
    assert [r.subject for r in record.references] == ["mug"]
    assert [(e.subject, e.reason) for e in record.dropped] == [("mug", phantom.BEYOND), ("cup", phantom.OVERLAPS)]
    elsewhere = inner | {"frame_idx": "0.5"}
    (record,) = (entry.read() for entry in opened(tmp_path, [row(mug=[[CUP]], cup=[[elsewhere]])], videos))
    assert [r.subject for r in record.references] == ["mug", "cup"]


ROWS = [
    ((VIDS["cat"], "", row(cup=[[CUP]])[2]), phantom.NO_CAPTION),
    ((VIDS["cat"], "A cat.", "{"), phantom.NOT_IN_FORM),
    ((VIDS["cat"], "A cat.", "[1]"), phantom.NOT_IN_FORM),
    ((VIDS["cat"], "A cat.", '{"cup": 1}'), phantom.NOT_IN_FORM),
    ((VIDS["cat"], "A cat.", "null"), phantom.NOT_IN_FORM),
    ((VIDS["cat"], "A cat.", "{}"), phantom.NO_REFERENCE),
    (("none_0_1", "A cat.", row(cup=[[CUP]])[2]), phantom.NO_VIDEO),
]


def test_each_faulty_row_has_its_reason_and_touches_no_other(tmp_path, videos):
    rows = [part for wrong, _ in ROWS for part in (wrong, (VIDS["coffee"], "A cup.", row(cup=[[CUP]])[2]))]
    found = [entry.read() for entry in opened(tmp_path, rows, videos)]
    assert [entry.reason for entry in found[::2]] == [reason for _, reason in ROWS]
    assert all(entry.detail.endswith(".") for entry in found[::2])
    assert all(isinstance(entry, Record) for entry in found[1::2])


def test_clips_in_folders_by_a_pattern(tmp_path, videos):
    (tmp_path / "v" / "uuid-cat").mkdir(parents=True)
    (tmp_path / "v" / "uuid-coffee").mkdir()
    for name in ("cat", "coffee"):
        data = (videos / f"{VIDS[name]}.mp4").read_bytes()
        (tmp_path / "v" / f"uuid-{name}" / "1.0.mkv").write_bytes(data)
    (record,) = opened(tmp_path, [row(cup=[[CUP]])], tmp_path / "v", pattern="{uuid}/{start}.mkv")
    assert record.read().video == tmp_path / "v" / "uuid-cat" / "1.0.mkv"
    for pattern in ("clip.mp4", "{name}.mp4", "{"):
        with pytest.raises(ValueError, match=r"PhantomConfig\.pattern="):
            PhantomConfig(videos="v", metadata="m", pattern=pattern)


def test_files_that_are_something_else(tmp_path, videos):
    annotations, metadata = write_phantom(tmp_path, [row(cup=[[CUP]])], SIZES)
    config = PhantomConfig(videos=str(videos), metadata=str(metadata))
    with pytest.raises(ValueError, match=r"metadata\.parquet has no column video_caption; expected Phantom-Data's ann"):
        open_phantom(str(metadata), config, tmp_path / "t")
    wrong = PhantomConfig(videos=str(videos), metadata=str(annotations))
    with pytest.raises(ValueError, match=r"annotations\.parquet has no column vid; expected Phantom-Data's metadata"):
        open_phantom(str(annotations), wrong, tmp_path / "t")
    (tmp_path / "x.parquet").write_text("no parquet, but long enough to be looked into")
    with pytest.raises(ValueError, match=r"x\.parquet is not a parquet file that can be read"):
        open_phantom(str(tmp_path / "x.parquet"), config, tmp_path / "t")


def test_the_number_of_rows_is_known(tmp_path, videos):
    table = pyarrow.table({"video_id": ["a"] * 700, "video_caption": ["b"] * 700, "cross_pair": ["{}"] * 700})
    _, metadata = write_phantom(tmp_path, [row(cup=[[CUP]])], SIZES)
    pyarrow.parquet.write_table(table, tmp_path / "many.parquet")
    source = open_phantom(
        str(tmp_path / "many.parquet"), PhantomConfig(videos=str(videos), metadata=str(metadata)), tmp_path / "t"
    )
    assert source.__length_hint__() == 700
    assert sum(1 for _ in source) == 700
