"""Verifies the transformer, the alignment loss, flow matching, optimisation and sampling against a folder of values.

docs/verify.md describes the folder. Whatever it holds is compared: values.npz in `forward.py`, and the files of
gradients and of weights after AdamW in `training.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from refalign_jax.config import AlignmentConfig, DType, FlowConfig, MeshConfig, ModelConfig
from refalign_jax.convert.dit import model_table
from refalign_jax.convert.files import open_weights
from refalign_jax.convert.infer import Transformer, open_transformer
from refalign_jax.convert.table import stored
from refalign_jax.initial import model_shapes
from refalign_jax.sharding import check_heads, make_mesh
from refalign_jax.trees import count
from refalign_jax.types import Params
from refalign_jax.verify import forward, training
from refalign_jax.verify.case import LARGE, Case, select
from refalign_jax.verify.divergence import FILES
from refalign_jax.verify.progress import Task, attempt, run_tasks
from refalign_jax.verify.report import Report
from refalign_jax.verify.values import Values

INPUTS = re.compile(
    r"video_latents|noise|text|negative_text|reference_latents|vfm_features|sample_noise|ra\d+_(student|teacher)"
    r"|index|num_references|subject_ids|aligned|subject_mask|target_mean"
)
"""Names in values.npz that others are computed from."""

_OPERATIONS = "|".join(FILES.values())

CHECKS: tuple[tuple[str, Callable[..., None]], ...] = (
    (rf"(?P<a>velocity_t(?P<b>[\d.]+)(?:_refs(?P<c>\d+))?)(?:_(?:{_OPERATIONS}))?", forward.check_velocity),
    (r"train_(?P<a>timesteps|weights)", forward.check_schedule),
    (
        rf"step(?P<a>\d*)_(?:timestep|noisy|target|velocity|scalars|ref_features|{_OPERATIONS})",
        forward.check_step,
    ),
    (r"ra(?P<a>\d+)_(?:loss|grad)", forward.check_alignment),
    (r"sample_(?:latents|sigmas|timesteps)", forward.check_sample),
)
"""Names in values.npz and what compares them. Names with equal named groups, which are its arguments, are one check."""

WEIGHTS = (
    "weights.safetensors",
    "weights.safetensors.index.json",
    "weights.pth",
    "weights",
    "transformer",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
"""Where a folder's weights are looked for, before any other weight file in it."""

STATED = {
    "dim": "width",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "ffn_dim": "ffn_width",
    "text_dim": "text_width",
    "freq_dim": "frequency_width",
    "in_dim": "latent_channels",
    "out_dim": "latent_channels",
    "patch_size": "patch_size",
}
"""Sizes that config.json may state, and the fields of `DiTConfig` that the weights' shapes show."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a transformer is verified.

    Attributes:
      weights: its weights; None: those in the folder.
      devices: number of devices over which it is split.
      stream: whether it is read block by block; None: if it is large.
    """

    weights: Path | None = None
    devices: int = 1
    stream: bool | None = None


def check_dit(values: Values, compute_dtype: DType, report: Report, options: Options) -> None:
    """Compares everything in a folder with a transformer's weights.

    Args:
      values: the folder.
      compute_dtype: dtype of our matrix products.
      report: receives comparisons, what could not be compared, and a remark on each name that is unknown.
      options: weights, devices.

    Raises:
      ValueError: there are no weights, they are not those of the model that config.json states, or the number of heads
        is unknown.
    """
    case = open_case(values, compute_dtype, report, options)
    checks: dict[tuple[Any, ...], list[str]] = {}
    for name in values.arrays:
        found = next(((check, m) for pattern, check in CHECKS if (m := re.fullmatch(pattern, name))), None)
        if found:
            checks.setdefault((found[0], *found[1].groupdict().values()), []).append(name)
        elif not INPUTS.fullmatch(name) and name != "adamw_losses":
            report.remarks.append(f"values.npz holds {name!r}, which is none of the names verified.")
    tasks: list[Task] = [
        (names[0], functools.partial(attempt, report, names, functools.partial(check, case, *groups)))
        for (check, *groups), names in checks.items()
    ]
    for pattern, check in (
        ("grads_step*.safetensors", training.check_gradients),
        ("weights_after_*_adamw.safetensors", training.check_adamw),
    ):
        for path in sorted(values.folder.glob(pattern)):
            call = functools.partial(check, case, path)
            tasks.append((path.stem, functools.partial(attempt, report, [path.name], call)))
    run_tasks(tasks)
    left = [n for names in (*checks.values(), ["adamw_losses"]) for n in names if n in values.arrays]
    noted = " ".join(report.remarks)
    report.skip([n for n in left if n not in report.skipped and n not in noted], "what it belongs to is missing")


def open_case(values: Values, compute_dtype: DType, report: Report, options: Options | None = None) -> Case:
    """Opens the model's weights; arguments and errors as in `check_dit`."""
    options = options or Options()
    opened = open_model(values, options.weights)
    config, lacking = model_config(values, opened, compute_dtype)
    shapes: Params = model_shapes(config)
    if not opened.has_projectors:
        shapes = select(shapes, "projectors")
    table = model_table(config.dit, config.alignment if opened.has_projectors else None, opened.names)
    leaves = stored(table, shapes, opened.tensors)
    streamed = count(shapes) > LARGE if options.stream is None else options.stream
    mesh = split_over(options.devices, config)
    return Case(values, report, config, leaves, lacking, streamed, mesh)


def open_model(values: Values, weights: Path | None) -> Transformer:
    """Opens the weights of a folder, in any form that `convert.py import` reads.

    Raises:
      ValueError: there are none, several, or the number of heads is unknown.
    """
    found = next((path for name in WEIGHTS if (path := values.folder / name).exists()), values.folder)
    heads = values.config.optional("num_heads", 0) or None
    if heads is not None and heads < 1:
        raise ValueError(f"{values.config.place}: num_heads is {heads}; it must be positive.")
    try:
        if weights is None and found == values.folder:
            open_weights(found)
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{found} lacks weights.safetensors, and --weights names no other ({reason}).") from error
    try:
        return open_transformer(weights or found, heads)
    except ValueError as error:
        if "how many attention heads" not in str(error):
            raise
        raise ValueError(
            f"{weights or found}: no file says how many attention heads; state num_heads in "
            f"{values.folder / 'config.json'}."
        ) from error


def model_config(values: Values, opened: Transformer, compute_dtype: DType) -> tuple[ModelConfig, str]:
    """The model, and what its alignment loss lacks.

    Returns:
      The configuration, whose alignment weight is 0 where the values were made without the alignment loss or it can't
      be computed; a reason in the second case, otherwise an empty string.

    Raises:
      ValueError: config.json states another model than the weights show, or an entry of another type.
    """
    try:
        return _model_config(values, opened, compute_dtype)
    except (TypeError, AttributeError, OverflowError, ZeroDivisionError) as error:
        place = values.config.place
        raise ValueError(f"{place}: an entry is of another type than it must be ({error}).") from error


def _model_config(values: Values, opened: Transformer, compute_dtype: DType) -> tuple[ModelConfig, str]:
    config, dit = values.config, opened.config.dit
    for entry, field in STATED.items():
        shown = getattr(dit, field)
        stated = tuple(config[entry]) if isinstance(config.get(entry), list) else config.get(entry, shown)
        if stated != shown:
            raise ValueError(f"{config.place} states {entry}={config[entry]!r:.60}, but the weights show {shown}.")
    dit = dataclasses.replace(
        dit,
        eps=config.optional("eps", dit.eps),
        compute_dtype=compute_dtype,
        attention="xla",
        remat="none",
        offload=False,
    )
    arrays, aligned = values.arrays, config.optional("align_blocks", 0)
    expected = aligned > 0 or "vfm_features" in arrays
    if opened.has_projectors:
        loss = opened.config.alignment
        for entry, shown in (("align_blocks", loss.num_blocks), ("vfm_dim", loss.vfm_width)):
            if config.get(entry, shown) != shown:
                raise ValueError(f"{config.place} states {entry}={config[entry]!r:.60}, the projectors are {shown}.")
        expected |= "reference_latents" in arrays
        lacking = [name for name in ("reference_latents", "vfm_features") if name not in arrays]
        missing = f"values.npz lacks {lacking[0]}" if lacking else ""
    else:
        loss = AlignmentConfig(num_blocks=min(max(aligned, 0) or 9, dit.num_layers))
        missing = "the weights have no projectors (blocks.{i}.input_mlp)"
    lacks = missing if expected else ""
    weight = loss.weight if expected and not missing else 0.0
    alignment = dataclasses.replace(loss, weight=weight, stop_step=0)
    flow = FlowConfig(shift=config.optional("shift", opened.config.flow.shift))
    return ModelConfig(dit=dit, alignment=alignment, flow=flow), lacks


def split_over(devices: int, config: ModelConfig) -> Mesh | None:
    """A mesh of so many devices, over which tokens, heads and weights are split; None for one device.

    Raises:
      ValueError: there are fewer devices, or the heads don't split over them.
    """
    if devices == 1:
        return None
    found = jax.devices()
    if not 1 <= devices <= len(found):
        raise ValueError(f"{devices} devices are asked for; there are {len(found)}.")
    mesh = make_mesh(MeshConfig(data=1, context=devices), found[:devices])
    check_heads(config.dit, mesh)
    return mesh
