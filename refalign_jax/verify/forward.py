"""Comparisons of forward passes: velocity, blocks, the training loss and its parts, the alignment loss, sampling."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refalign_jax import alignment, flow, objective
from refalign_jax.config import AlignmentConfig, DiTConfig, ModelConfig, SamplingConfig
from refalign_jax.models import dit
from refalign_jax.models.condition import Condition
from refalign_jax.objective import Batch, Terms
from refalign_jax.sampling import sample
from refalign_jax.types import Params
from refalign_jax.verify.case import Case
from refalign_jax.verify.report import measure
from refalign_jax.verify.values import channels_second

SCALARS: Mapping[str, Callable[[Terms], jax.Array]] = {
    "mse": lambda terms: terms.flow,
    "weight": lambda terms: terms.weight,
    "gate": lambda terms: terms.gate,
    "ra_total(pos+neg)": lambda terms: terms.alignment,
    "ra_pos": lambda terms: terms.pull,
    "ra_neg": lambda terms: terms.push,
    "loss": lambda terms: terms.loss,
}
"""Names that `scalars` of config.json may hold."""


def check_velocity(case: Case, t: str, count: str) -> None:
    """Compares the velocity at time `t` with the first `count` references."""
    name, values = f"velocity_t{t}_refs{count}", case.values
    x = values.channels_last("video_latents")
    references = values.channels_last("reference_latents")[:, : int(count)] if int(count) else None
    condition = Condition(jnp.asarray(values.need("text")), references)
    inputs = case.params["dit"], case.config.dit, x, jnp.full(x.shape[:1], float(t), jnp.float32), condition
    row = case.report.compare(name, channels_second(velocity(*inputs)), values.arrays[name], "forward")
    check_blocks(case, name, inputs, row.passed)


def check_schedule(case: Case, what: str) -> None:
    """Compares the training schedule's `timesteps` or `weights`."""
    name, table = f"train_{what}", flow.training_schedule(case.config.flow)
    case.report.compare(name, getattr(table, what), case.values.arrays[name], "forward")


def check_step(case: Case, index: str) -> None:
    """Compares one training step's loss, its terms and what they are computed from."""
    name, arrays, indices = f"step{index}", case.values.arrays, case.indices(int(index))
    terms, predicted = loss_terms(case.params, case.batch, case.noise, indices, config=case.config)
    sigma, t, _ = flow.lookup(flow.training_schedule(case.config.flow), indices)
    noisy, target = flow.corrupt(case.batch.video_latents, case.noise, sigma)
    parts = {"timestep": t, "noisy": channels_second(noisy), "target": channels_second(target)}
    for part, ours in parts.items():
        if f"{name}_{part}" in arrays:
            case.report.compare(f"{name}_{part}", ours, arrays[f"{name}_{part}"], "forward")
    row = case.report.compare(f"{name}_velocity", channels_second(predicted), arrays[f"{name}_velocity"], "forward")
    inputs = case.params["dit"], case.config.dit, noisy, t, case.batch.condition._replace(num_references=None)
    check_blocks(case, name, inputs, row.passed)
    if f"{name}_ref_features" in arrays:
        features = reference_features(*inputs, case.config.alignment.num_blocks)
        theirs = arrays[f"{name}_ref_features"]
        case.report.compare(f"{name}_ref_features", np.asarray(features, np.float32), theirs, "forward")
    if f"{name}_scalars" in arrays:
        check_scalars(case, f"{name}_scalars", terms)


def check_scalars(case: Case, name: str, terms: Terms) -> None:
    """Compares the means of a loss's terms over the batch.

    Raises:
      ValueError: config.json names a term that is unknown.
    """
    labels = list(case.values.config.get("scalars", []))
    unknown = [label for label in labels if label not in SCALARS]
    if unknown:
        raise ValueError(f"{case.values.config.place} names the scalars {unknown}; known are {', '.join(SCALARS)}.")
    scalars = [float(jnp.mean(SCALARS[label](terms))) for label in labels]
    case.report.compare_each(name, scalars, case.values.arrays[name], labels)


def check_blocks(case: Case, name: str, inputs: tuple[Any, ...], agrees: bool) -> None:
    """Compares the tokens after every block, if the folder has them, and remarks on the first block that diverges.

    Args:
      case: the model and its values.
      name: of the forward pass.
      inputs: of `velocity`.
      agrees: whether the velocity is within tolerance.
    """
    theirs, remarks = case.values.arrays.get(f"{name}_blocks"), case.report.remarks
    if theirs is None:
        if not agrees:
            remarks.append(
                f"{name} diverges; to see where, add the tokens after each block, {name}_blocks [layers, B, tokens, D]."
            )
        return
    ours = np.asarray(block_tokens(*inputs))
    row = case.report.compare(f"{name}_blocks", ours, theirs, "forward")
    for i, pair in enumerate(zip(ours, theirs, strict=True)):
        if not measure("", *pair, row.tolerance).passed:
            remarks.append(f"{name}: block {i} is the first that diverges.")
            return
    if not agrees:
        remarks.append(f"{name}: every block agrees, so that the head diverges.")


def check_alignment(case: Case, subjects: str) -> None:
    """Compares the alignment loss and its gradient, for features of several subjects with equally many tokens.

    Raises:
      ValueError: the tokens do not divide by the subjects.
    """
    name, k, arrays = f"ra{subjects}", int(subjects), case.values.arrays
    student, teacher = (jnp.asarray(case.values.need(f"{name}_{part}")) for part in ("student", "teacher"))
    if len(student) % k:
        raise ValueError(f"{name}_student has {len(student)} tokens, not divisible by its {k} subjects.")
    loss = functools.partial(alignment_of, teacher=teacher, subjects=k, config=case.config.alignment)
    (_, terms), gradient = jax.value_and_grad(loss, has_aux=True)(student)
    case.report.compare_each(f"{name}_loss", terms, arrays[f"{name}_loss"], ["total", "pull", "push"])
    if f"{name}_grad" in arrays:
        case.report.compare(f"{name}_grad", gradient, arrays[f"{name}_grad"], "gradient")


def check_sample(case: Case) -> None:
    """Compares sampled latents, with three-branch guidance."""
    values = case.values
    guidance = values.config.get("guidance", {})
    config = SamplingConfig(
        num_steps=int(values.config.get("sample_steps", 50)),
        shift=case.config.flow.shift,
        reference_guidance=guidance.get("reference", 5.0),
        text_guidance=guidance.get("text", 7.5),
    )
    table = flow.schedule(config.num_steps, config.shift)
    for part in ("sigmas", "timesteps"):
        if f"sample_{part}" in values.arrays:
            case.report.compare(f"sample_{part}", getattr(table, part), values.arrays[f"sample_{part}"], "forward")
    prompt = Condition(jnp.asarray(values.need("text")), values.channels_last("reference_latents"))
    negative = prompt._replace(text=jnp.asarray(values.need("negative_text")))
    noise = values.channels_last("sample_noise")
    latents = sample(case.params["dit"], noise, prompt, negative, dit=case.config.dit, config=config)
    case.report.compare("sample_latents", channels_second(latents), values.arrays["sample_latents"], "sample")


velocity = jax.jit(dit.velocity, static_argnums=1)


@functools.partial(jax.jit, static_argnums=(1, 5))
def reference_features(
    params: Params, config: DiTConfig, x: jax.Array, t: jax.Array, condition: Condition, num_blocks: int
) -> jax.Array:
    """Reference tokens after the first blocks, [A, B, R·P, D]."""
    assert condition.reference_latents is not None
    observer = dit.reference_tokens(config, num_blocks, condition.reference_latents.shape)
    tokens = dit.observe(params, config, x, t, condition, observer)[1]
    return tokens.reshape(*tokens.shape[:2], -1, tokens.shape[-1])


@functools.partial(jax.jit, static_argnums=1)
def block_tokens(params: Params, config: DiTConfig, x: jax.Array, t: jax.Array, condition: Condition) -> jax.Array:
    """All tokens after every block, [layers, B, tokens, D], float32."""
    return dit.observe(params, config, x, t, condition, dit.all_tokens(config))[1].astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="config")
def loss_terms(params: Params, batch: Batch, noise: jax.Array, index: jax.Array, *, config: ModelConfig) -> Any:
    """Terms of each sample's loss, and the velocity."""
    return objective.sample_terms(params, batch, noise, index, jnp.int32(0), config)


def alignment_of(
    student: jax.Array, *, teacher: jax.Array, subjects: int, config: AlignmentConfig
) -> tuple[jax.Array, list[jax.Array]]:
    """The alignment loss, and [loss, pull, push], of tokens [subjects·P, E]."""
    s, f = (x.reshape(1, subjects, -1, x.shape[-1]) for x in (student, teacher))
    pull, push = alignment.pull_push(s, f, jnp.arange(subjects)[None], jnp.ones((1, subjects), bool), config)
    total = alignment.alignment_loss(pull, push, config)[0]
    return total, [total, pull[0], push[0]]
