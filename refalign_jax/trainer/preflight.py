"""What can be refused before anything is compiled: settings that fit neither each other nor what is there.

Each check raises `ValueError` or `OSError` with one sentence that names the value, the field and what would be right.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from refalign_jax import flops
from refalign_jax.config import Config, DataConfig, flat_fields
from refalign_jax.data.examples import Spec
from refalign_jax.data.loader import BatchIterator, Source, make_loader
from refalign_jax.data.shards import ShardSource
from refalign_jax.data.synthetic import SyntheticSource
from refalign_jax.encoders.interface import VideoCodec
from refalign_jax.encoders.open import reopen_video_codec
from refalign_jax.types import Float

FREE_TO_CHANGE = tuple(
    f"model.dit.{name}"
    for name in ("compute_dtype", "residual_dtype", "attention", "tiles", "remat", "offload", "max_position")
)
"""Beginnings of fields of the model that a run may change on its way: they say how it is computed, not what."""

FIXED = ("optimizer.freeze", "optimizer.beta1", "optimizer.beta2", "train.seed")
"""Fields beside the model's that a run may not change: saved moments and random numbers depend on them."""


def open_source(config: Config) -> Source:
    """Opens the dataset, or makes synthetic examples, and checks that the model fits them.

    Raises:
      ValueError: no dataset, or one of other widths or of a grid that the model can't take.
    """
    synthetic, dit = config.synthetic, config.model.dit
    if synthetic.num_examples:
        if config.data.path:
            raise ValueError(
                f"data.path={config.data.path!r} and synthetic.num_examples={synthetic.num_examples} exclude each "
                "other; set one of them to nothing."
            )
        spec = Spec(
            num_examples=synthetic.num_examples,
            video_latents=(*synthetic.latent_grid, dit.latent_channels),
            text_width=dit.text_width,
            vfm_width=config.model.alignment.vfm_width,
            longest_text=config.data.text_length,
            most_references=config.data.max_references,
        )
        check_data(config, spec, "synthetic")
        return SyntheticSource(spec)
    if not config.data.path:
        raise ValueError("data.path is empty; name the folder of a prepared dataset, or set synthetic.num_examples.")
    source = ShardSource(config.data.path)
    check_data(config, source.spec, config.data.path)
    return source


def check_data(config: Config, spec: Spec, name: str) -> None:
    """Compares the model's sizes with the examples'.

    Raises:
      ValueError: channels, text width, VFM width, grid or number of frames that don't fit.
    """
    dit, alignment = config.model.dit, config.model.alignment
    frames, rows, columns, channels = spec.video_latents
    pairs = [
        ("latent channels", channels, "model.dit.latent_channels", dit.latent_channels),
        ("text width", spec.text_width, "model.dit.text_width", dit.text_width),
    ]
    if alignment.weight > 0:
        pairs.append(("VFM width", spec.vfm_width, "model.alignment.vfm_width", alignment.vfm_width))
    for what, found, field, expected in pairs:
        if found != expected:
            raise ValueError(f"The examples of {name} have {what} {found}, but {field} is {expected}.")
    _, token_rows, token_columns = dit.token_grid(frames, rows, columns)
    if alignment.weight > 0 and token_rows * token_columns != spec.vfm_tokens:
        raise ValueError(
            f"The examples of {name} have {spec.vfm_tokens} VFM tokens a reference, but model.dit.patch_size="
            f"{dit.patch_size} makes {token_rows * token_columns} tokens of it; both grids must agree."
        )
    if frames + config.data.max_references > dit.max_position:
        raise ValueError(
            f"The examples of {name} have {frames} latent frames, which with data.max_references="
            f"{config.data.max_references} reach beyond model.dit.max_position={dit.max_position}."
        )


def empty_text(config: Config, source: Source) -> Float[np.ndarray, "S text_width"]:
    """The embedding of the empty prompt, padding rows zero.

    The dataset's manifest has it under made["empty_text"], a list of [tokens, text_width]; where it has none, all rows
    are zero.

    Raises:
      ValueError: it is of another width or longer than `data.text_length`.
    """
    text = np.zeros((config.data.text_length, config.model.dit.text_width), np.float32)
    found = source.manifest.made.get("empty_text") if isinstance(source, ShardSource) else None
    if found is not None:
        rows = np.asarray(found, np.float32)
        if rows.ndim != 2 or len(rows) > len(text) or rows.shape[1] != text.shape[1]:
            raise ValueError(
                f"The manifest of {config.data.path} has an empty_text of shape {list(rows.shape)}; the model needs "
                f"[at most {len(text)}, {text.shape[1]}]."
            )
        text[: len(rows)] = rows
    return text


def preview_codec(config: Config, source: Source) -> VideoCodec | None:
    """The codec that decodes previews, the one that the dataset was made with; None where no preview is asked for.

    Synthetic examples have none, and of a dataset that another program wrote it is not known.

    Raises:
      ValueError: the codec's weights are no longer where they were.
    """
    if not config.train.preview_every or not isinstance(source, ShardSource):
        return None
    described = source.manifest.made.get("encoders", {}).get("video")
    return None if described is None else reopen_video_codec(described)


def check_folder(folder: str, field: str) -> Path:
    """Makes a local folder and tries to write into it.

    Raises:
      ValueError: none is named.
      OSError: it can't be made or written.
    """
    if not folder:
        raise ValueError(f"{field} is empty; name the folder that the run writes to.")
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(f"{field}={folder!r} can't be written: {error.strerror}.") from error
    return path


def check_disk(folder: str, checkpoint_bytes: int) -> None:
    """Refuses a local disk that doesn't hold one more checkpoint.

    Raises:
      OSError: too little room.
    """
    if "://" in folder:
        return
    free = shutil.disk_usage(folder).free
    if free < checkpoint_bytes:
        raise OSError(
            f"{folder} has {free / 1e9:.2f} GB free, but one checkpoint takes {checkpoint_bytes / 1e9:.2f} GB; make "
            "room or name another train.checkpoint_folder."
        )


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], path: str) -> list[str]:
    """Compares the configuration of a checkpoint with that of the run that goes on from it.

    Args:
      saved: nested dict out of the checkpoint.
      now: `dataclasses.asdict` of the configuration.
      path: the checkpoint, for the message.

    Returns:
      Differences that are allowed, for the log.

    Raises:
      ValueError: differences that make it another run, all of them listed.
    """
    before, after = flat_fields(saved), flat_fields(now)
    had_ema, has_ema = (bool(fields.get("optimizer.ema_decay", 0)) for fields in (before, after))
    fatal: list[str] = []
    allowed: list[str] = []
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) == after.get(name) or (name.startswith("train.") and name != "train.seed"):
            continue
        difference = f"{name} was {before.get(name)!r}, now it is {after.get(name)!r}"
        another = (name.startswith("model.") and not name.startswith(FREE_TO_CHANGE)) or name in FIXED
        another |= name == "optimizer.ema_decay" and had_ema != has_ema
        (fatal if another else allowed).append(difference)
    if fatal:
        raise ValueError(
            f"{path} belongs to another run: {'; '.join(fatal)}; set this back, or name another train.folder and start "
            "there from train.init."
        )
    return allowed


def example_shape(config: Config, source: Source) -> flops.Shape:
    """Sizes of one example as it is computed, padding included."""
    return flops.Shape(
        grid=source.spec.video_latents[:3], references=config.data.max_references, text_length=config.data.text_length
    )


def _open_loader(data: DataConfig, source: Source, part: Literal["train", "held_out"]) -> BatchIterator:
    """This process's share of the batches."""
    return make_loader(data, source, split=part, process_index=jax.process_index(), process_count=jax.process_count())
