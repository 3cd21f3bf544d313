"""Records in the form of OpenS2V-5M and Phantom-Data, made of tiny videos."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from pycocotools import mask as coco

from refalign_jax.config import PrepareConfig
from refalign_jax.data.video import write_video
from support.footage import SUBJECTS, panned

ROWS, COLUMNS = 64, 96
TINY = PrepareConfig(
    vae="dct",
    text_encoder="words",
    vfm="daisy",
    height=32,
    width=48,
    num_frames=5,
    dct_stride=4,
    dct_channels=6,
    word_width=12,
    examples_per_shard=8,
)


def rle(box, size=(ROWS, COLUMNS)):
    """A rectangle as a mask in COCO's run lengths."""
    mask = np.zeros(size, np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    coded = coco.encode(np.asfortranarray(mask))
    return {"size": list(size), "counts": coded["counts"].decode(), "score": [0.9]}


def opens2v_record(
    path="cat.mp4", masks=(("cat", (5, 5, 60, 50), 5.0, 0.2), ("sky", (0, 0, 96, 20), 3.0, 0.7)), **about
):
    """A record; each mask is name, box, aesthetic and GME score."""
    metadata = {
        "cut": [0, 12],
        "crop": [0, COLUMNS, 0, ROWS],
        "fps": 8.0,
        "num_frames": 12,
        "resolution": {"height": ROWS, "width": COLUMNS},
        "path": path,
        "face_cut": [0, 12],
        "face_cap_qwen": 'A "cat" {walks} \\ away.\n',
    }
    numbers = [str(index) for index in range(1, len(masks) + 1)]
    return {
        "metadata": metadata | about,
        "word_tags": {"subject": ["cat"], "object": []},
        "annotation": {
            "ann_frame_data": {
                "ann_frame_idx": 2,
                "annotations": [
                    {"class_name": name, "bbox": [*map(float, box)], "aes_score": aesthetic, "gme_score": gme}
                    for name, box, aesthetic, gme in masks
                ],
            },
            "mask_map": {n: {"class_name": name} for n, (name, *_) in zip(numbers, masks, strict=True)},
            "mask_annotation": {"2": {n: rle(box) for n, (_, box, *_) in zip(numbers, masks, strict=True)}},
        },
    }


def write_opens2v(folder: Path, records, name="total_part1.json", indent=4) -> Path:
    """Writes records by key, as published."""
    path = folder / name
    path.write_text(json.dumps(records, indent=indent))
    return path


def write_videos(folder: Path, frames=12) -> Path:
    """Three videos of 64x96."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SUBJECTS:
        write_video(folder / f"{name}.mp4", panned(name, frames), fps=8)
    return folder


def write_split_tar(folder: Path, files, pieces=3, name="total_part1") -> list[Path]:
    """A tar of files, cut into pieces of equal size wherever that is."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for path in files:
            tar.add(path, f"{name}/{Path(path).name}")
    data = whole.getvalue()
    size = -(-len(data) // pieces)
    paths = [folder / f"{name}.tar.split.{index:03d}" for index in range(pieces)]
    for index, path in enumerate(paths):
        path.write_bytes(data[index * size : (index + 1) * size])
    return paths


def reference(vid, box, moment="0.25"):
    """An entry of `refer_result` as published."""
    return {"vid": vid, "frame_idx": moment, "bbox_loc": [box], "bbox_cls": "cat", "scores": 0.8}


def write_phantom(folder: Path, rows, sizes, named="video_id", pairs=json.dumps) -> tuple[Path, Path]:
    """Writes annotations, (vid, caption, cross_pair), and metadata, vid to (width, height)."""
    columns = {
        named: [row[0] for row in rows],
        "video_caption": [row[1] for row in rows],
        "cross_pair": [row[2] if isinstance(row[2], str) else pairs(row[2]) for row in rows],
    }
    annotations, metadata = folder / "annotations.parquet", folder / "metadata.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), annotations)
    table = {
        "vid": list(sizes),
        "youtube_url": ["https://www.youtube.com/watch?v=x"] * len(sizes),
        "timestamp": ["['0:00', '0:01']"] * len(sizes),
        "width": [width for width, _ in sizes.values()],
        "height": [height for _, height in sizes.values()],
        "fps": [8.0] * len(sizes),
    }
    pyarrow.parquet.write_table(pyarrow.table(table), metadata)
    return annotations, metadata
