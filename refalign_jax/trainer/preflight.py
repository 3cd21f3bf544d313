"""What is refused before anything is compiled: settings that do not fit each other, the data, or the machine.

Each check raises `ValueError` or `OSError` with one sentence that names the value, the field and what would be right.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from refalign_jax import flops, remote
from refalign_jax.config import Config, flat_fields
from refalign_jax.data.examples import Spec
from refalign_jax.data.loader import BatchIterator, make_loader
from refalign_jax.data.mixture import Source, manifest_of, open_dataset, parts_of
from refalign_jax.data.synthetic import SyntheticSource
from refalign_jax.data.targets import target_mean
from refalign_jax.encoders.interface import VideoCodec
from refalign_jax.types import Float

logger = logging.getLogger(__name__)

FREE_TO_CHANGE = tuple(
    f"model.dit.{name}"
    for name in ("compute_dtype", "residual_dtype", "attention", "tiles", "remat", "offload", "max_position")
)
"""Beginnings of fields of the model that a run may change on its way: they say how it is computed, not what."""

FIXED = ("optimizer.freeze", "optimizer.beta1", "optimizer.beta2", "train.seed")
"""Fields beside the model's that a run may not change: saved moments and random numbers depend on them."""


def open_source(config: Config) -> Source:
    """Opens the dataset, or makes synthetic examples, and checks that the recipe fits them.

    Raises:
      ValueError: no dataset, or one that the recipe does not fit: everything that does not fit is listed.
    """
    synthetic = config.synthetic
    if synthetic.num_examples:
        if config.data.paths:
            field = f"mix={config.data.mix}" if config.data.mix else f"path={config.data.path!r}"
            raise ValueError(
                f"data.{field} and synthetic.num_examples={synthetic.num_examples} exclude each other; set one of them "
                "to nothing."
            )
        made = SyntheticSource(synthetic_spec(config))
        check_data(config, made, "synthetic")
        return made
    if not config.data.paths:
        raise ValueError("data.path is empty; name the folder of a prepared dataset, or set synthetic.num_examples.")
    source = open_dataset(config.data)
    check_data(config, source, " and ".join(config.data.paths))
    return source


def synthetic_spec(config: Config) -> Spec:
    """The synthetic examples that fit a recipe's model."""
    dit = config.model.dit
    return Spec(
        num_examples=config.synthetic.num_examples,
        video_latents=(*config.synthetic.latent_grid, dit.latent_channels),
        text_width=dit.text_width,
        vfm_width=config.model.alignment.vfm_width,
        longest_text=config.data.text_length,
        most_references=config.data.max_references,
        fewest_references=0 if config.synthetic.padded_references else config.data.max_references,
        subject_mask=True,
    )


def check_data(config: Config, source: Source, name: str) -> None:
    """Compares the recipe's sizes with the examples'.

    Raises:
      ValueError: one sentence that lists everything that does not fit.
    """
    found = [*_sizes_apart(config, source), *_grid_apart(config, source.spec)]
    rows = _empty_rows(source)
    if rows is not None and (rows.ndim != 2 or rows.shape[1] != config.model.dit.text_width):
        found.append(
            f"the manifest has an empty_text of shape {list(rows.shape)}, but model.dit.text_width is "
            f"{config.model.dit.text_width}"
        )
    if rows is not None and len(rows) > config.data.text_length:
        found.append(f"data.text_length is {config.data.text_length}, but the manifest's empty_text has {len(rows)}")
    if config.model.alignment.needs_subject_mask and not source.spec.subject_mask:
        found.append(
            "they have no subject masks, which model.alignment.center_targets and subject_patches_only need; prepare "
            "them again in another folder"
        )
    for part, data in zip(parts_of(source), config.data.parts, strict=True):
        if data.held_out >= len(part):
            of_path = f" of {data.path}" if config.data.mix else ""
            found.append(
                f"data.held_out{of_path} is {data.held_out} of {len(part)} examples, which leaves none to train on"
            )
    if found:
        raise ValueError(f"The recipe does not fit the examples of {name}: {'; '.join(found)}.")


def _sizes_apart(config: Config, source: Source) -> list[str]:
    """Widths, channels and lengths that differ, each as a clause; all of them can be taken from the dataset."""
    spec, manifest = source.spec, manifest_of(source)
    vfm = manifest.made.get("encoders", {}).get("vfm", {}).get("name") if manifest else None
    pairs = [
        ("latent channels", spec.video_latents[-1], "model.dit.latent_channels", config.model.dit.latent_channels),
        ("text width", spec.text_width, "model.dit.text_width", config.model.dit.text_width),
    ]
    if config.model.alignment.weight > 0:
        width = f"VFM features of {vfm} with the width" if vfm else "VFM width"
        pairs.append((width, spec.vfm_width, "model.alignment.vfm_width", config.model.alignment.vfm_width))
    found = [f"they have {what} {have}, but {field} is {want}" for what, have, field, want in pairs if have != want]
    if spec.longest_text > config.data.text_length:
        found.append(
            f"data.text_length is {config.data.text_length}, but the longest prompt has {spec.longest_text} tokens"
        )
    if found:
        found[-1] += " (--from-dataset takes these sizes from the dataset)"
    return found


def _grid_apart(config: Config, spec: Spec) -> list[str]:
    """Why the latents' grid does not suit the model, each reason as a clause."""
    dit, (frames, rows, columns, _) = config.model.dit, spec.video_latents
    found = []
    try:
        _, token_rows, token_columns = dit.token_grid(frames, rows, columns)
    except ValueError as error:
        found.append(str(error).rstrip("."))
    else:
        if config.model.alignment.weight > 0 and token_rows * token_columns != spec.vfm_tokens:
            found.append(
                f"they have {spec.vfm_tokens} VFM tokens per reference, but model.dit.patch_size={dit.patch_size} "
                f"makes {token_rows * token_columns} tokens of it, and both grids must agree"
            )
    if frames + config.data.max_references > dit.max_position:
        found.append(
            f"they have {frames} latent frames, which with data.max_references={config.data.max_references} reach "
            f"beyond model.dit.max_position={dit.max_position}"
        )
    return found


def fit_to_dataset(config: Config) -> Config:
    """Takes sizes from the dataset `data.path`, or from those of `data.mix`, and logs each that changes.

    These are latent channels, the widths of text and VFM features, and the number of references. The text length is
    raised to the longest prompt's, never lowered: the model attends to padding, so that a shorter text is another
    computation. Synthetic examples are turned off.

    Raises:
      ValueError: there is no such dataset.
    """
    if not config.data.paths:
        raise ValueError("--from-dataset needs data.path, the folder of a prepared dataset, or data.mix.")
    spec, model, data = open_dataset(config.data).spec, config.model, config.data
    fitted = dataclasses.replace(
        config,
        model=dataclasses.replace(
            model,
            dit=dataclasses.replace(model.dit, latent_channels=spec.video_latents[-1], text_width=spec.text_width),
            alignment=dataclasses.replace(model.alignment, vfm_width=spec.vfm_width),
        ),
        data=dataclasses.replace(
            data, text_length=max(data.text_length, spec.longest_text), max_references=spec.most_references
        ),
        synthetic=dataclasses.replace(config.synthetic, num_examples=0),
    )
    before, after = (flat_fields(dataclasses.asdict(x)) for x in (config, fitted))
    for name in before:
        if before[name] != after[name] and not name.startswith("synthetic."):
            logger.info("%s is %s, as in %s; the recipe says %s.", name, after[name], data.paths[0], before[name])
    return fitted


def empty_text(config: Config, source: Source) -> Float[np.ndarray, "S text_width"]:
    """The embedding of the empty prompt, padding rows zero.

    The dataset's manifest has it under made["empty_text"], a list of [tokens, text_width], which `check_data` has
    checked; where it has none, all rows are zero.
    """
    text = np.zeros((config.data.text_length, config.model.dit.text_width), np.float32)
    rows = _empty_rows(source)
    if rows is not None:
        text[: len(rows)] = rows
    return text


def _empty_rows(source: Source) -> np.ndarray | None:
    """The manifest's embedding of the empty prompt, [tokens, text_width]; None where it has none."""
    manifest = manifest_of(source)
    found = manifest.made.get("empty_text") if manifest else None
    return None if found is None else np.asarray(found, np.float32)


def preview_codec(config: Config, source: Source) -> VideoCodec | None:
    """The codec that decodes previews, the one that the dataset was made with; None where no preview is asked for.

    Synthetic examples have none, and of a dataset that another program wrote it is not known.

    Raises:
      ValueError: the codec's weights are no longer where they were.
    """
    manifest = manifest_of(source)
    if not config.train.preview_every or manifest is None:
        return None
    described = manifest.made.get("encoders", {}).get("video")
    if described is None:
        return None
    from refalign_jax.encoders.open import reopen_video_codec  # most runs need no encoder

    return reopen_video_codec(described)


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
    except FileExistsError as error:
        raise OSError(f"{field}={folder!r} can't be written: it is a file; name a folder.") from error
    except OSError as error:
        raise OSError(f"{field}={folder!r} can't be written: {error.strerror}.") from error
    return path


def check_disk(folder: str, checkpoint_bytes: int) -> None:
    """Refuses a local disk that doesn't hold one more checkpoint.

    Raises:
      OSError: too little room.
    """
    if remote.is_remote(folder):
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
    # What an older version did not save is what its runs did: a new field's default.
    before = flat_fields(dataclasses.asdict(Config())) | flat_fields(saved)
    after = flat_fields(now)
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


def open_loader(config: Config, source: Source, part: Literal["train", "held_out"]) -> BatchIterator:
    """This process's share of the batches."""
    alignment, mean = config.model.alignment, None
    if alignment.needs_subject_mask and alignment.center_targets == "dataset":
        parts = zip(parts_of(source), config.data.parts, strict=True)
        means = [target_mean(part, data.began_with(len(part))) for part, data in parts]
        mean = np.average(means, axis=0, weights=config.data.proportions).astype(np.float32)
    place: Any = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    return make_loader(config.data, source, split=part, target_mean=mean, **place)
