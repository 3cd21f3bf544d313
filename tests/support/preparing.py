"""200 records in the form of OpenS2V-5M, one in ten faulty, and their preparation in processes that can be killed."""

import json
import multiprocessing
import zlib
from pathlib import Path

import skimage.feature  # noqa: F401  # imported before processes are forked
from grain.sources import ArrayRecordDataSource

from refalign_jax.config import OpenS2VConfig
from refalign_jax.data.manifest import read_manifest
from refalign_jax.data.prepare import prepare
from refalign_jax.data.sources.opens2v import open_opens2v
from support.footage import SUBJECTS
from support.published import TINY, opens2v_record, rle, write_opens2v, write_videos

COUNT = 200
REASONS = {
    "cut.mp4": "the video can't be read",
    "none.mp4": "the video is not there",
    "text.mp4": "the video can't be read",
    "size": "a mask has another size than the frame",
    "crop": "the crop lies outside of the frame",
    "caption": "the caption is empty",
    "masks": "no reference is left",
    "pair": "a pair names an unknown clip",
    "runs": "a mask can't be decoded",
    "few": "fewer than 5 frames",
}


def faulty(kind):
    """A record with one fault."""
    if kind.endswith(".mp4"):
        return opens2v_record(kind)
    if kind == "masks":
        return opens2v_record(masks=[("cat", (0, 0, 50, 50), 1.0, 0.1)])
    changes = {"crop": {"crop": [0, 97, 0, 64]}, "caption": {"face_cap_qwen": ""}, "few": {"face_cut": [3, 7]}}
    record = opens2v_record(**changes.get(kind, {}))
    mask = record["annotation"]["mask_annotation"]["2"]
    if kind == "size":
        mask["1"] = rle((0, 0, 20, 20), (32, 96))
    if kind == "runs":
        mask["1"]["counts"] = "`1"
    return record


def write(folder: Path) -> dict[str, str]:
    """Writes videos, records and pairs; returns the reason of each record that is faulty, by its id."""
    videos = write_videos(folder / "videos")
    whole = (videos / "cat.mp4").read_bytes()
    (videos / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (videos / "text.mp4").write_text("no video")
    records, wanted, pairs = {}, {}, []
    for n in range(COUNT):
        key = f"film{n // 4}_part{n}"
        if n % 10 == 7:
            kind = list(REASONS)[n // 10 % len(REASONS)]
            records[key] = faulty(kind)
            wanted[f"total_part1/{key}"] = REASONS[kind]
            if kind == "pair":
                pairs.append((key, "film99_part0"))
        else:
            box = (n % 30, n % 17, 50 + n % 40, 40 + n % 20)
            name = list(SUBJECTS)[n % 3]
            masks = [(name, box, 5.0, 0.2), ("sky", (0, 0, 96, 16), 2.0, 0.7), ("all", (0, 0, 96, 64), 4.0, 0.5)]
            records[key] = opens2v_record(f"{name}.mp4", masks, face_cap_qwen=f"Clip {n} of a {name}.")
            if n % 4 == 1:
                pairs.append((key, f"film{n // 4}_part{n - 1}"))
    write_opens2v(folder, records)
    alike = {"text_similarity": 0.9, "image_similarity": 0.9, "cur_class_id": "1", "aft_class_id": "1"}
    rows = [{"cur_id": f"total_part1/{a}", "aft_id": f"total_part1/{b}"} | alike for a, b in pairs]
    (folder / "pairs.json").write_text(json.dumps(rows))
    return wanted


def run(folder: str, dataset: str, part: tuple[int, int] = (1, 1)) -> str:
    """Prepares the records that `write` wrote."""
    config = OpenS2VConfig(videos=f"{folder}/videos", pairs=f"{folder}/pairs.json", cross_probability=1.0)
    source = open_opens2v(f"{folder}/total_part1.json", config, Path(dataset, ".tables"), TINY.seed)
    settings = TINY.__class__(**{**vars(TINY), "part": part})
    return prepare(source, dataset, settings, {"name": "opens2v", "settings": config.settings})


def start(*arguments) -> multiprocessing.Process:
    """Starts `run` in a process of its own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.preparing"])
    process = context.Process(target=run, args=arguments)
    process.start()
    return process


def blobs(dataset: Path) -> dict[str, int]:
    """A checksum of the bytes of every example, by its id."""
    found = {}
    for shard in read_manifest(dataset).shards:
        records = ArrayRecordDataSource([str(dataset / shard.name)]).__getitems__(range(len(shard.ids)))
        found |= {id: zlib.crc32(blob) for id, blob in zip(shard.ids, records, strict=True)}
    return found


def shards(dataset: Path) -> list[str]:
    """The SHA-256 of the shards in their order."""
    return [shard.sha256 for shard in read_manifest(dataset).shards]
