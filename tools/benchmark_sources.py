"""Measures the reading of published data sets: memory on files of gigabytes, and decoding against other libraries.

    python tools/benchmark_sources.py memory --gigabytes 2
    python tools/benchmark_sources.py decode VIDEO VIDEO …

`memory` writes files of OpenS2V-5M's and Phantom-Data's form by repetition into a temporary folder and reads each in a
process of its own. It prints the peak memory above that of the process before it reads, and the rate per second of CPU
time. `decode` reads clips and references as preparation does, in turns with PyAV alone, which decodes each video once
and converts the same frames to RGB at the same size, and with decord and torchcodec where they are installed.
"""

from refalign_jax.command import run

# isort: split
import dataclasses
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tyro.conf import Positional

from refalign_jax.config import PrepareConfig

FORMS = ("json", "zip", "parquet", "tar")
READ = """
import json, os, sys, time
from pathlib import Path
from refalign_jax.config import OpenS2VConfig, PhantomConfig
from refalign_jax.data.sources import opens2v, phantom
from refalign_jax.data.sources.videos import open_videos
import pycocotools.mask, pyarrow.parquet, sqlite3, tarfile
def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024
form, folder = sys.argv[1], sys.argv[2]
Path("/proc/self/clear_refs").write_text("5")
idle, begun, count = memory("VmRSS"), time.process_time(), 0
if form in ("json", "zip"):
    place = f"{folder}/part.json" + (".zip" if form == "zip" else "")
    source = opens2v.open_opens2v(place, OpenS2VConfig(videos=folder), Path(folder, "t"), 0)
elif form == "parquet":
    config = PhantomConfig(videos=folder, metadata=f"{folder}/metadata.parquet")
    source = phantom.open_phantom(f"{folder}/annotations.parquet", config, Path(folder, "t"))
else:
    videos, notes = open_videos(f"{folder}/tars", Path(folder, "t"))
    source = [videos.find(f"v{n}.mp4").read() for n in range(0, 1000, 100)]
for entry in source:
    count += 1
    if count % 50 == 0 and form != "tar":
        entry.read()
print(json.dumps([idle, memory("VmHWM"), time.process_time() - begun, count]))
"""
"""Reads one form, every fiftieth record to the end, and prints memory in MiB, CPU seconds and number of records."""


def record() -> dict[str, Any]:
    """A record of about 30 kB in OpenS2V-5M's form; its video does not exist."""
    coco = importlib.import_module("pycocotools.mask")
    x, y = np.arange(1280) - 640, np.arange(720)[:, None] - 360
    blocks = [((x / (100 + 30 * n)) ** 2 + (y / (90 + 15 * n)) ** 2 < 1).astype(np.uint8) for n in range(16)]
    masks = {str(n + 1): coco.encode(np.asfortranarray(block)) for n, block in enumerate(blocks)}
    frames = {n: {"size": m["size"], "counts": m["counts"].decode(), "score": [0.9]} for n, m in masks.items()}
    return {
        "metadata": {
            "crop": [0, 1280, 0, 720],
            "resolution": {"height": 720, "width": 1280},
            "path": "none.mp4",
            "face_cut": [0, 95],
            "face_cap_qwen": "A clip. " * 100,
        },
        "annotation": {
            "ann_frame_data": {
                "ann_frame_idx": 0,
                "annotations": [{"bbox": [0, 0, 9, 9], "gme_score": 0.3, "aes_score": 5.0}] * len(masks),
            },
            "mask_map": {n: {"class_name": "thing"} for n in masks},
            "mask_annotation": {"0": frames},
        },
    }


def write(form: str, folder: Path, size: int) -> int:
    """Writes one form; returns the bytes that are read."""
    if form == "json":
        value = json.dumps(record(), indent=4)
        with (folder / "part.json").open("w") as file:
            file.write("{\n")
            for n in range(size // len(value) + 1):
                file.write(f'{"," if n else ""}    "clip_{n:08d}": {value}\n')
            file.write("}")
        return (folder / "part.json").stat().st_size
    if form == "zip":
        write("json", folder, size)
        with zipfile.ZipFile(folder / "part.json.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
            packed.write(folder / "part.json", "part.json")
        total = (folder / "part.json").stat().st_size
        (folder / "part.json").unlink()
        return total
    return _write_parquet(folder, size) if form == "parquet" else _write_tar(folder, size)


def _write_parquet(folder: Path, size: int) -> int:
    """Writes annotations in one row group, as published, without compression, and metadata."""
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    text = os.urandom(700).hex()
    entry = {"vid": "x_0_1", "frame_idx": "0.5", "bbox_loc": [[0, 0, 9, 9]], "bbox_cls": text, "scores": 0.5}
    pairs = json.dumps({"cup": {"obj_from_tgt_video": [entry], "refer_result": [[entry]]}})
    names, rows = ("video_id", "video_caption", "cross_pair"), 1000
    schema = arrow.schema([(name, arrow.string()) for name in names])
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False}
    with parquet.ParquetWriter(folder / "annotations.parquet", schema, **options) as writer:
        for n in range(size // (rows * len(pairs)) + 1):
            ids = [f"{n:06d}-{m}_0_9" for m in range(rows)]
            batch = arrow.record_batch([ids, ["A clip."] * rows, [pairs] * rows], schema=schema)
            writer.write_batch(batch, row_group_size=1 << 30)
    table: dict[str, list[Any]] = {"vid": [f"{n:032d}_0_1" for n in range(1_129_029)]}
    table |= {name: [1280] * 1_129_029 for name in ("width", "height")}
    parquet.write_table(arrow.table(table), folder / "metadata.parquet")
    return (folder / "annotations.parquet").stat().st_size


def _write_tar(folder: Path, size: int) -> int:
    """Writes a tar of a thousand files in three pieces."""
    (folder / "tars").mkdir()
    data = os.urandom(size // 1000)
    piece = size // 3
    whole = folder / "whole.tar"
    with tarfile.open(whole, "w") as tar:
        for n in range(1000):
            info = tarfile.TarInfo(f"part/v{n}.mp4")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with whole.open("rb") as file:
        for n in range(4):
            (folder / "tars" / f"part.tar.split.{n:03d}").write_bytes(file.read(piece))
    whole.unlink()
    return size


def memory(*, gigabytes: float = 2.0, forms: tuple[str, ...] = FORMS, folder: str = "") -> None:
    """Reads large files of each form.

    Args:
      gigabytes: size of each file.
      forms: which of json, zip, parquet and tar.
      folder: parent of the temporary folder; empty for the system's.
    """
    print(f"{'form':8s} {'GB':>6s} {'records':>8s} {'idle MiB':>9s} {'peak above MiB':>15s} {'MB/s':>8s}")
    for form in forms:
        with tempfile.TemporaryDirectory(dir=folder or None) as place:
            size = write(form, Path(place), round(gigabytes * 1e9))
            done = subprocess.run([sys.executable, "-c", READ, form, place], capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"Reading {form} failed: {done.stderr.strip().splitlines()[-1]}")
            idle, peak, seconds, count = json.loads(done.stdout.splitlines()[-1])
        above = peak - idle
        print(
            f"{form:8s} {size / 1e9:6.2f} {count:8d} {idle:9.0f} {above:15.0f} {size / 1e6 / seconds:7.0f}", flush=True
        )


def decode(
    videos: Positional[tuple[Path, ...]], /, *, rounds: int = 5, readers: int = 1, height: int = 480, width: int = 832
) -> None:
    """Reads clips and references in turns with PyAV alone and others.

    Args:
      videos: files that hold at least 81 frames.
      rounds: rounds of all, in turn.
      readers: threads that each read all videos at the same time; preparation has several (`--workers`).
      height: rows of the clip.
      width: columns of the clip.
    """
    import av

    from refalign_jax.data.clips import Clip, load_clip

    config = PrepareConfig(vae="dct", text_encoder="words", vfm="daisy", height=height, width=width)
    records = _records(videos)
    clips = [load_clip(record, config) for record in records]
    missing = next((clip for clip in clips if not isinstance(clip, Clip)), None)
    if missing is not None:
        raise ValueError(f"{missing.id} can't be used: {missing.detail}")
    frames = [clip.metadata["frames"] for clip in clips if isinstance(clip, Clip)]

    def alone() -> None:
        for path, numbers in zip(videos, frames, strict=True):
            wanted = set(numbers)
            with av.open(str(path), "r", metadata_errors="replace") as container:
                container.streams.video[0].thread_type = "AUTO"
                for number, frame in enumerate(container.decode(video=0)):
                    if number in wanted:
                        frame.to_ndarray(format="rgb24", width=width, height=height)

    ways: dict[str, Callable[[], None]] = {
        "clips and references": lambda: _each(records, config),
        "clips alone": lambda: _each([dataclasses.replace(record, references=()) for record in records], config),
        "PyAV and swscale": alone,
    }
    for name, make in (("decord", _decord), ("torchcodec", _torchcodec)):
        if importlib.util.find_spec(name):
            try:
                ways[name] = make(videos, frames, height, width)
            except (ImportError, OSError, RuntimeError) as error:
                print(f"{name} can't be loaded: {str(error).splitlines()[0]}")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, call in ways.items():
            begun = time.perf_counter(), time.process_time()
            with ThreadPoolExecutor(readers) as pool:
                list(pool.map(lambda _, call=call: call(), range(readers)))
            if turn:  # the first one warms the page cache
                seconds[name].append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    print(f"{'':22s} {'seconds':>8s} {'CPU':>7s}   speed of clips and references over this, by time and by CPU time")
    medians = {
        name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in seconds.items()
    }
    ours = medians["clips and references"]
    for name, (wall, cpu) in medians.items():
        each = " ".join(f"{value:.2f}" for value, _ in seconds[name])
        print(f"{name:22s} {wall:8.3f} {cpu:7.3f}   {wall / ours[0]:.2f} {cpu / ours[1]:.2f}   [{each}]")


def _records(videos: tuple[Path, ...]) -> list[Any]:
    """A record of each video, with two references cut from its first frame."""
    import av

    from refalign_jax.data.records import Record, Reference

    records = []
    for path in videos:
        with av.open(str(path), "r", metadata_errors="replace") as container:
            stream = container.streams.video[0]
            h, w = stream.height, stream.width
        used = [Reference(path=path, frame=0, box=box, own_clip=True) for box in ((0, 0, w, h), (0, 0, w // 2, h))]
        records.append(Record(id=path.name, video=path, prompt="", references=tuple(used)))
    return records


def _each(records: list[Any], config: PrepareConfig) -> None:
    """Reads records as preparation does."""
    from refalign_jax.data.clips import load_clip

    for record in records:
        load_clip(record, config)


def _decord(videos: tuple[Path, ...], frames: list[list[int]], height: int, width: int) -> Callable[[], None]:
    """The same frames, at the same size, by decord."""
    import decord

    def read() -> None:
        for path, numbers in zip(videos, frames, strict=True):
            decord.VideoReader(str(path), width=width, height=height).get_batch(numbers).asnumpy()

    return read


def _torchcodec(videos: tuple[Path, ...], frames: list[list[int]], height: int, width: int) -> Callable[[], None]:
    """The same frames by torchcodec, at the video's own size."""
    from torchcodec.decoders import VideoDecoder

    def read() -> None:
        for path, numbers in zip(videos, frames, strict=True):
            VideoDecoder(str(path), num_ffmpeg_threads=0, dimension_order="NHWC").get_frames_at(numbers).data.numpy()

    return read


def main(arguments: list[str], prog: str) -> None:
    """Parses and measures."""
    kinds: dict[str, Any] = {"memory": memory, "decode": decode}
    tyro.extras.subcommand_cli_from_dict(kinds, args=arguments, prog=prog, description=__doc__)


if __name__ == "__main__":
    run(main)
