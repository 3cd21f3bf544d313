"""OpenS2V-5M as a source: what is chosen, from which clip, and one reason for every fault."""

import dataclasses
import json
import pickle
import zipfile

import numpy as np
import pytest
from support.published import COLUMNS, ROWS, TINY, opens2v_record, rle, write_opens2v, write_split_tar, write_videos

from refalign_jax.config import OpenS2VConfig
from refalign_jax.data.clips import Clip, load_clip
from refalign_jax.data.records import Record, Skipped
from refalign_jax.data.sources import opens2v
from refalign_jax.data.sources.opens2v import open_opens2v


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("videos"))


def opened(folder, records, videos, **changes):
    seed = changes.pop("seed", 0)
    return open_opens2v(
        str(write_opens2v(folder, records)), OpenS2VConfig(videos=str(videos), **changes), folder / "tables", seed
    )


def read(source):
    return [found if isinstance(found, Skipped) else found.read() for found in source]


MASKS = (
    ("park", (0, 0, 96, 64), 4.8, 0.3),
    ("grass", (10, 20, 90, 64), 4.6, 0.3),  # inside the park
    ("person", (20, 4, 60, 60), 4.9, 0.2),  # inside the park too
    ("dog", (0, 0, 5, 5), 5.0, 0.9),  # too small
    ("cat", (60, 0, 96, 64), 4.4, 0.59),  # scores too low
)


def test_the_largest_come_first_and_overlaps_are_dropped(tmp_path, videos):
    (record,) = read(opened(tmp_path, {"k": opens2v_record(masks=MASKS)}, videos))
    assert record.id == "total_part1/k"
    assert [reference.subject for reference in record.references] == ["park (1)"]
    assert [(entry.subject, entry.reason) for entry in record.dropped] == [
        ("dog (4)", "too small"),
        ("cat (5)", "scores too low"),
        ("grass (2)", "overlaps a larger one"),
        ("person (3)", "overlaps a larger one"),
    ]
    assert record.crop == (0, 0, COLUMNS, ROWS)
    assert record.frames == (0, 12)
    assert record.prompt == 'A "cat" {walks} \\ away.\n'
    assert record.references[0].why == "area 1.00, aesthetic 4.80, GME 0.30"
    (record,) = read(opened(tmp_path, {"k": opens2v_record(masks=MASKS[1:])}, videos, max_overlap=0.81, min_area=0.0))
    assert [reference.subject for reference in record.references] == ["grass (1)", "person (2)", "dog (3)"]
    chosen = [reference.mask.decode() for reference in record.references]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        shared = (chosen[first] & chosen[second]).sum()
        assert shared < 0.81 * min(chosen[first].sum(), chosen[second].sum())


@pytest.mark.parametrize(
    ("aesthetic", "gme", "used"), [(4.5, 0.0, True), (0.0, 0.6, True), (4.49, 0.59, False), (None, 0.6, True)]
)
def test_either_score_is_enough(tmp_path, videos, aesthetic, gme, used):
    found = read(opened(tmp_path, {"k": opens2v_record(masks=[("cat", (0, 0, 50, 50), aesthetic, gme)])}, videos))
    assert isinstance(found[0], Record) == used


def test_the_clip_is_cropped_and_cut_and_its_references_lie_on_white(tmp_path, videos):
    crop = [16, 80, 8, 56]
    record = opens2v_record(masks=[("cat", (0, 0, 40, 48), 5, 0)], crop=crop, face_cut=[2, 11])
    record["annotation"]["mask_annotation"]["2"]["1"] = rle((8, 8, 40, 40), (48, 64))
    (found,) = read(opened(tmp_path, {"k": record}, videos))
    config = dataclasses.replace(TINY, height=48, width=64)
    clip = load_clip(found, config)
    assert isinstance(clip, Clip)
    assert 2 <= clip.metadata["frames"][0] <= clip.metadata["frames"][-1] < 11
    plain = load_clip(dataclasses.replace(found, references=()), config)
    np.testing.assert_array_equal(plain.video, clip.video)
    not_own = dataclasses.replace(found.references[0], own_clip=False)
    laid = load_clip(dataclasses.replace(found, references=(not_own,)), config).references[0]
    assert (laid[:, :8] == 255).all()  # a square of 32 fits 48x64 as 48x48
    assert (laid[:, 10:54] < 250).any(-1).mean() > 0.9
    assert clip.metadata["dropped"] if found.dropped else "dropped" not in clip.metadata


VERSIONS = {"v1.1": {}, "v1.0": {"cap": ["Another caption."]}}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("form", ["json", "compact", "zip", "tar"])
def test_every_form_gives_the_same_records(tmp_path, videos, version, form):
    records = {f"k{n}": opens2v_record(**VERSIONS[version]) for n in range(3)}
    expected = read(opened(tmp_path, records, videos))
    (tmp_path / "other").mkdir()
    path = write_opens2v(tmp_path / "other", records, indent=None if form == "compact" else 4)
    place = videos
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "other" / "total_part1.json.zip", "w", zipfile.ZIP_DEFLATED) as packed:
            packed.write(path, "total_part1.json")
        path.unlink()
    if form == "tar":
        place = tmp_path / "other"
        write_split_tar(place / "total_part1", sorted(videos.iterdir()))
    source = open_opens2v(str(tmp_path / "other"), OpenS2VConfig(videos=str(place)), tmp_path / "tables2", 0)
    found = [pickle.loads(pickle.dumps(entry)).read() for entry in source]
    assert [record.id for record in found] == [f"total_part1/k{n}" for n in range(3)]
    for record, wanted in zip(found, expected, strict=True):
        one, other = load_clip(record, TINY), load_clip(wanted, TINY)
        np.testing.assert_array_equal(one.video, other.video)
        np.testing.assert_array_equal(one.references, other.references)
        assert one.metadata == other.metadata


def faulty(tmp_path):
    """Records with one fault each, by the reason that is expected."""
    write_videos(tmp_path / "videos")
    whole = (tmp_path / "videos" / "cat.mp4").read_bytes()
    (tmp_path / "videos" / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "videos" / "text.mp4").write_text("no video")
    size = opens2v_record()
    size["annotation"]["mask_annotation"]["2"]["1"] = rle((0, 0, 20, 20), (60, 96))
    broken = opens2v_record()
    broken["annotation"]["mask_annotation"]["2"]["1"]["counts"] = "o"
    short = opens2v_record()
    short["annotation"]["mask_annotation"]["2"]["1"]["counts"] = "`1"
    bare = opens2v_record()
    del bare["annotation"]
    return [
        ("cut", opens2v_record("cut.mp4"), "the video can't be read"),
        ("missing", opens2v_record("none.mp4"), "the video is not there"),
        ("text", opens2v_record("text.mp4"), "the video can't be read"),
        ("mask size", size, "a mask has another size than the frame"),
        ("mask", broken, "a mask can't be decoded"),
        ("mask runs", short, "a mask can't be decoded"),
        ("crop", opens2v_record(crop=[0, 97, 0, 64]), "the crop lies outside of the frame"),
        ("crop of another size", opens2v_record(crop=[0, 98, 0, 64], resolution=None), "a mask has another size"),
        ("caption", opens2v_record(face_cap_qwen=" "), "the caption is empty"),
        ("no caption", opens2v_record(face_cap_qwen=None), "the caption is empty"),
        ("no mask", opens2v_record(masks=()), "no reference is left"),
        ("no usable mask", opens2v_record(masks=[("cat", (0, 0, 50, 50), 1.0, 0.1)]), "no reference is left"),
        ("no annotation", bare, "the record is not in the form of OpenS2V-5M"),
        ("no path", opens2v_record(path=None), "the record is not in the form of OpenS2V-5M"),
        ("frames", opens2v_record(face_cut=[5, 5]), "the record is not in the form of OpenS2V-5M"),
        ("few frames", opens2v_record(face_cut=[0, 4]), "fewer than 5 frames"),
        ("no object", [1], "the record is not in the form of OpenS2V-5M"),
    ]


def test_each_fault_leaves_out_its_record_alone_with_its_reason(tmp_path):
    rows = faulty(tmp_path)
    records = {}
    for number, (name, record, _) in enumerate(rows):
        records[name] = record
        records[f"good {number}"] = opens2v_record()
    source = opened(tmp_path, records, tmp_path / "videos")
    wanted = {f"total_part1/{name}": reason for name, _, reason in rows}
    for entry in source:
        found = entry.read()
        result = load_clip(found, TINY) if isinstance(found, Record) else found
        if entry.id in wanted:
            assert isinstance(result, Skipped), entry.id
            assert result.reason.startswith(wanted[entry.id]), (entry.id, result)
            assert result.detail.endswith(".")
            assert "\n" not in result.detail
        else:
            assert isinstance(result, Clip), result


def test_a_json_file_cut_in_the_middle_keeps_what_comes_before(tmp_path, videos):
    path = write_opens2v(tmp_path, {f"k{n}": opens2v_record() for n in range(3)})
    text = path.read_text()
    path.write_text(text[: text.index('"k2"') + 300])
    found = read(open_opens2v(str(path), OpenS2VConfig(videos=str(videos)), tmp_path / "tables", 0))
    assert [type(entry) for entry in found] == [Record, Record, Skipped]
    assert found[2].reason == "the rest of a JSON file is cut off or damaged"
    assert found[2].detail == f"{path} ends in the middle; the 2 entries before are used."


def pair(own, other, classes=("1", "1"), text=0.9, image=0.9):
    return {
        "cur_id": f"total_part1/{own}",
        "aft_id": f"total_part1/{other}",
        "cur_class_id": classes[0],
        "aft_class_id": classes[1],
        "cur_class_name": "cat",
        "aft_class_name": "cat",
        "text_similarity": text,
        "image_similarity": image,
        "cur_frame_idx": 2,
        "aft_frame_idx": 2,
    }


def cross(tmp_path, videos, rows, **changes):
    records = {
        "film_part1_a": opens2v_record("cat.mp4"),
        "film_part2_b": opens2v_record("coffee.mp4"),
        "film_part3_c": opens2v_record("astronaut.mp4"),
    }
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    settings = {"pairs": str(tmp_path / "pairs.json"), "cross_probability": 1.0} | changes
    return {record.id.split("_")[-1]: record for record in read(opened(tmp_path, records, videos, **settings))}


A, B, C = "film_part1_a", "film_part2_b", "film_part3_c"


def test_references_come_from_the_other_clip_of_a_pair(tmp_path, videos):
    found = cross(tmp_path, videos, [pair(A, B), pair(C, B, text=0.59), pair(C, B, image=0.6)])
    assert found["a"].references[0].path == videos / "coffee.mp4"
    assert found["b"].references[0].path == videos / "cat.mp4"  # either clip of a pair
    assert found["c"].references[0].path == videos / "astronaut.mp4"  # its pairs are not alike enough
    assert [len(record.references) for record in found.values()] == [1, 1, 2]  # the sky has no pair
    assert [record.references[0].own_clip for record in found.values()] == [False, False, True]
    assert found["a"].metadata["references_from"] == f"total_part1/{B}"
    clip = load_clip(found["a"], TINY)
    assert isinstance(clip, Clip)


def test_a_pair_that_names_an_unknown_clip_has_its_reason(tmp_path, videos):
    found = cross(tmp_path, videos, [pair(A, "film_part9_x"), pair(B, C)])
    assert isinstance(found["a"], Skipped)
    assert found["a"].reason == opens2v.UNKNOWN_PAIR
    assert found["a"].detail.endswith("is paired with total_part1/film_part9_x.")
    assert isinstance(found["b"], Record)
    assert isinstance(found["c"], Record)


@pytest.mark.parametrize("form", ["folder", "tar", "clusters"])
def test_pairs_by_cluster(tmp_path, videos, form):
    (tmp_path / "p").mkdir()
    name = "other" if form == "clusters" else "film"
    (tmp_path / "p" / f"{name}.json").write_text(json.dumps([pair(A, B)]))
    (tmp_path / "clusters.json").write_text(json.dumps({name: [f"total_part1/{A}", f"total_part1/{B}"]}))
    place = tmp_path / "p"
    if form == "tar":
        place = write_split_tar(tmp_path / "tars", [tmp_path / "p" / "film.json"], 1)[0].parent
    clusters = str(tmp_path / "clusters.json") if form == "clusters" else ""
    found = cross(tmp_path, videos, [], pairs=str(place), clusters=clusters)
    assert found["a"].references[0].path == videos / "coffee.mp4"
    assert found["c"].references[0].path == videos / "astronaut.mp4"


def test_pairs_find_their_clips_in_a_zip_too(tmp_path, videos):
    path = write_opens2v(tmp_path, {A: opens2v_record("cat.mp4"), B: opens2v_record("coffee.mp4")})
    with zipfile.ZipFile(tmp_path / "total_part1.json.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.write(path, path.name)
    (tmp_path / "pairs.json").write_text(json.dumps([pair(A, B)]))
    config = OpenS2VConfig(videos=str(videos), pairs=str(tmp_path / "pairs.json"), cross_probability=1.0)
    source = open_opens2v(str(tmp_path / "total_part1.json.zip"), config, tmp_path / "tables", 0)
    assert [record.references[0].path.name for record in read(source)] == ["coffee.mp4", "cat.mp4"]


def test_the_share_of_cross_clips_is_drawn_by_seed_and_id(tmp_path, videos):
    records = {f"film_part{n}_x": opens2v_record() for n in range(300)}
    pairs = [pair(f"film_part{n}_x", f"film_part{n + 1}_x") for n in range(0, 300, 2)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))

    def drawn(seed):
        source = opened(tmp_path, records, videos, pairs=str(tmp_path / "pairs.json"), seed=seed)
        return [record.metadata["references_from"] != record.id for record in read(source)]

    assert 0.15 < np.mean(drawn(0)) < 0.31
    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_a_file_of_pairs_in_another_form_is_named(tmp_path, videos):
    source = opened(tmp_path, {A: opens2v_record()}, videos, pairs=str(tmp_path / "pairs.json"), cross_probability=1.0)
    (tmp_path / "pairs.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"pairs\.json is not a file of pairs: TypeError"):
        read(source)


def test_what_is_named_must_be_there(tmp_path, videos):
    config = OpenS2VConfig(videos=str(videos))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no JSON file; name OpenS2V-5M's mask_and_bbox files"):
        open_opens2v(str(tmp_path / "empty"), config, tmp_path, 0)
    with pytest.raises(ValueError, match=r"none\.json does not exist\.$"):
        open_opens2v(str(tmp_path / "none.json"), config, tmp_path, 0)
    with pytest.raises(ValueError, match=r"OpenS2VConfig\.videos is empty"):
        OpenS2VConfig(videos="")
