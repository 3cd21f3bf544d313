"""Verifies the transformer, the alignment loss, flow matching, optimisation and sampling against a folder of values.

docs/verify.md describes the folder. Whatever it holds is compared: values.npz in `forward.py`, and the files of
gradients and of weights after AdamW in `training.py`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from refalign_jax.config import AlignmentConfig, DiTConfig, DType, FlowConfig, ModelConfig
from refalign_jax.convert.dit import model_table
from refalign_jax.convert.files import open_weights
from refalign_jax.convert.table import to_ours
from refalign_jax.initial import model_shapes
from refalign_jax.verify import forward, training
from refalign_jax.verify.case import Case
from refalign_jax.verify.progress import Task, run_tasks
from refalign_jax.verify.report import Report
from refalign_jax.verify.values import Entries, Values

INPUTS = re.compile(
    r"video_latents|noise|text|negative_text|reference_latents|vfm_features|sample_noise|ra\d+_(student|teacher)"
)
"""Names in values.npz that others are computed from."""

CHECKS: tuple[tuple[str, Callable[..., None]], ...] = (
    (r"velocity_t([\d.]+)_refs(\d+)", forward.check_velocity),
    (r"train_(timesteps|weights)", forward.check_schedule),
    (r"step(\d+)_velocity", forward.check_step),
    (r"ra(\d+)_loss", forward.check_alignment),
    (r"sample_latents", forward.check_sample),
)
"""Names in values.npz, and what compares them; the groups of a name are the arguments."""

TOGETHER = re.compile(
    r"adamw_losses|step\d+_(timestep|noisy|target|scalars|ref_features|blocks)|velocity_t[\d.]+_refs\d+_blocks"
    r"|ra\d+_grad|sample_(sigmas|timesteps)"
)
"""Names in values.npz that are compared together with another."""


def check_dit(values: Values, compute_dtype: DType, report: Report) -> None:
    """Compares everything in a folder with a transformer's weights.

    Args:
      values: the folder.
      compute_dtype: dtype of our matrix products.
      report: receives comparisons, and a remark on each name that is unknown or could not be compared.

    Raises:
      ValueError: config.json lacks an entry, the weights are not those of its model, or an input is missing.
    """
    case = open_case(values, compute_dtype, report)
    tasks: list[Task] = []
    for name in values.arrays:
        found = [(check, match) for pattern, check in CHECKS if (match := re.fullmatch(pattern, name))]
        for check, match in found:
            tasks.append((name, functools.partial(check, case, *match.groups())))
        if not found and not INPUTS.fullmatch(name) and not TOGETHER.fullmatch(name):
            report.remarks.append(f"values.npz holds {name!r}, which is none of the names verified.")
    for path in sorted(values.folder.glob("grads_step*.safetensors")):
        tasks.append((path.stem, functools.partial(training.check_gradients, case, path)))
    for path in sorted(values.folder.glob("weights_after_*_adamw.safetensors")):
        tasks.append((path.stem, functools.partial(training.check_adamw, case, path)))
    run_tasks(tasks)
    for name in values.arrays:
        remarked = any(name in remark for remark in report.remarks)
        if name not in report.compared and not INPUTS.fullmatch(name) and not remarked:
            report.remarks.append(f"{name} was not compared: what it belongs to is not in the folder.")


def open_case(values: Values, compute_dtype: DType, report: Report) -> Case:
    """Reads the model's configuration and weights; arguments and errors as in `check_dit`."""
    config = model_config(values, compute_dtype)
    table = model_table(config.dit, config.alignment)
    params = to_ours(table, model_shapes(config), open_weights(values.folder / "weights.safetensors"))
    return Case(values, report, config, table, params)


def model_config(values: Values, compute_dtype: DType) -> ModelConfig:
    """Reads our configuration from config.json.

    Raises:
      ValueError: an entry is missing or of another type, or the input and output channels differ.
    """
    try:
        return _model_config(values.config, compute_dtype)
    except (TypeError, AttributeError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"{values.config.place}: an entry is of another type than it must be ({error}).") from error


def _model_config(config: Entries, compute_dtype: DType) -> ModelConfig:
    """Reads our configuration from the entries of config.json."""
    channels = {int(config["in_dim"]), int(config["out_dim"])}
    if len(channels) > 1:
        raise ValueError(f"{config.place}: in_dim and out_dim differ; a Wan T2V model has them equal.")
    return ModelConfig(
        dit=DiTConfig(
            width=config["dim"],
            num_layers=config["num_layers"],
            num_heads=config["num_heads"],
            ffn_width=config["ffn_dim"],
            text_width=config["text_dim"],
            frequency_width=config["freq_dim"],
            latent_channels=channels.pop(),
            patch_size=tuple(config["patch_size"]),
            eps=config["eps"],
            compute_dtype=compute_dtype,
            attention="xla",
            remat="none",
        ),
        alignment=AlignmentConfig(num_blocks=config["align_blocks"], vfm_width=config["vfm_dim"]),
        flow=FlowConfig(shift=config.get("shift", 5.0)),
    )
