"""Comparisons of forward passes: velocity, the training loss and its parts, the alignment loss, sampling."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refalign_jax import alignment, flow, objective
from refalign_jax.config import AlignmentConfig, DiTConfig, ModelConfig, SamplingConfig
from refalign_jax.models import dit
from refalign_jax.models.condition import Condition
from refalign_jax.objective import PUBLISHED_TERMS, Batch, Times
from refalign_jax.sampling import sample
from refalign_jax.types import Params
from refalign_jax.verify import streamed
from refalign_jax.verify.case import Case
from refalign_jax.verify.divergence import check_operations, offered, walk
from refalign_jax.verify.floors import Compute, spread, table_bounds
from refalign_jax.verify.progress import attempt
from refalign_jax.verify.report import Floor
from refalign_jax.verify.values import Entries, MissingError, channels_second

WITHOUT_ALIGNMENT = ("mse", "weight", "gate")
"""Scalars that need no alignment loss."""


def check_velocity(case: Case, name: str, t: str, count: str) -> None:
    """Compares the velocity `name` at time `t` with the first `count` references, and the operations on the way."""
    x, text = case.values.channels_last("video_latents"), jnp.asarray(case.values.need("text"))
    references = None
    if int(count or 0):
        references = case.values.channels_last("reference_latents")
        if references.shape[1] < int(count):
            raise MissingError(f"reference_latents holds {references.shape[1]} references")
        references = references[:, : int(count)]
    inputs = x, jnp.full(x.shape[:1], float(t), jnp.float32), Condition(text, references)

    operations = offered(case, name)
    walked = walk(case, inputs, 0, operations) if case.streamed and operations else None

    @functools.cache
    def compute(draw: int) -> dict[str, Any]:
        if walked and not draw:
            return {name: walked["velocity"]}
        return {name: channels_second(predict(case, case.moved_inputs(inputs, draw), draw))}

    agrees = True
    if name in case.values.arrays:
        theirs = case.values.arrays[name]
        agrees = case.report.compare(name, compute(0)[name], theirs, "forward", lambda: spread(compute, name)).passed
    check_operations(case, name, inputs, agrees, walked)


def check_schedule(case: Case, what: str) -> None:
    """Compares the training schedule's `timesteps` or `weights`, entry by entry."""
    name, table = f"train_{what}", flow.training_schedule(case.config.flow)
    case.report.compare_table(name, getattr(table, what), case.values.arrays[name], getattr(case.bounds, what))


def check_step(case: Case, label: str) -> None:
    """Compares what the folder has of one training step: its time, its inputs, the velocity, features, the loss."""
    compute = step_values(case, label)
    parts: dict[str, Callable[..., None]] = {
        "timestep": check_time,
        "noisy": check_corruption,
        "target": check_corruption,
        "velocity": functools.partial(check_prediction, compute=compute),
        "ref_features": check_features,
        "scalars": functools.partial(check_scalars, compute=compute),
    }
    for part, check in parts.items():
        if f"step{label}_{part}" in case.values.arrays:
            attempt(case.report, [f"step{label}_{part}"], functools.partial(check, case, label, part))
    agrees = all(row.passed for row in case.report.rows if row.name == f"step{label}_velocity")

    def operations() -> None:
        noisy, _ = flow.corrupt(case.batch.video_latents, case.noise, case.times(label)[0])
        check_operations(case, f"step{label}", (noisy, case.times(label)[1], case.batch.condition), agrees)

    attempt(case.report, [f"step{label}_{name}" for name in (*streamed.OPERATIONS, "blocks")], operations)


def check_time(case: Case, label: str, part: str) -> None:
    """Compares the times of a step with the schedule."""
    name, theirs = f"step{label}_{part}", case.values.arrays[f"step{label}_{part}"]
    _, t, _ = flow.lookup(flow.training_schedule(case.config.flow), case.indices(label))
    ours = np.asarray(t).reshape(theirs.shape) if theirs.size == t.size else np.asarray(t)
    case.report.compare(name, ours, theirs, "forward", lambda: float(np.linalg.norm(case.time_bounds(label)[1])))


def check_corruption(case: Case, label: str, part: str) -> None:
    """Compares the noisy latents, or the target, of a step."""
    name = f"step{label}_{part}"
    latents, sigma = case.values.channels_last("video_latents"), case.times(label)[0]
    ours = flow.corrupt(latents, case.noise, sigma)[part == "target"]

    def floor() -> float:
        return float(np.max(case.time_bounds(label)[0]) * jnp.linalg.norm((case.noise - latents).ravel()))

    case.report.compare(name, channels_second(ours), case.values.arrays[name], "forward", floor)


def check_prediction(case: Case, label: str, part: str, compute: Compute) -> None:
    """Compares the velocity that a step predicts."""
    name = f"step{label}_{part}"
    theirs = case.values.arrays[name]
    case.report.compare(name, compute(0)[part], theirs, "forward", lambda: spread(compute, part))


def check_features(case: Case, label: str, part: str) -> None:
    """Compares the reference tokens after the first blocks, of which there are as many as theirs has."""
    name = f"step{label}_{part}"
    theirs = case.values.arrays[name]
    if case.references() is None:
        raise MissingError("values.npz lacks reference_latents")

    @functools.cache
    def compute(draw: int) -> dict[str, Any]:
        sigma, t, _ = case.moved_times(label, draw)
        noisy, _ = flow.corrupt(case.batch.video_latents, case.noise, sigma)
        noisy, condition = case.moved((noisy, case.batch.condition), draw)
        inputs = noisy, t, condition
        if case.streamed:
            walk, count = streamed.Walk(case, inputs, draw), len(theirs)
            tokens = [np.asarray(found["block"]) for i, _, found in walk.blocks() if i < count]
            return {name: np.stack(tokens)[:, :, -theirs.shape[2] :]}
        params = case.moved(case.params["dit"], draw)
        with case.on_mesh():
            found = reference_features(params, case.config.dit, *inputs, min(len(theirs), case.config.dit.num_layers))
        return {name: np.asarray(found, np.float32)}

    case.report.compare(name, compute(0)[name], theirs, "forward", lambda: spread(compute, name))


def check_scalars(case: Case, label: str, part: str, compute: Compute) -> None:
    """Compares the means of a loss's terms over the batch.

    Raises:
      MissingError: config.json does not name the terms.
      ValueError: config.json names a term that is unknown, or not as many as there are.
    """
    name = f"step{label}_{part}"
    theirs, labels = case.values.arrays[name], case.values.config.optional("scalars", [])
    if not labels:
        raise MissingError("config.json lacks scalars, the names of what it holds")
    unknown = [label for label in labels if not isinstance(label, str) or label not in PUBLISHED_TERMS]
    if unknown or theirs.shape != (len(labels),):
        raise ValueError(
            f"{name} has the shape {list(theirs.shape)}, config.json names the scalars {labels}; known are "
            f"{', '.join(PUBLISHED_TERMS)}."
        )
    kept = [i for i, label in enumerate(labels) if label in WITHOUT_ALIGNMENT or not case.lacking]
    chosen = [labels[i] for i in kept]
    bounds = [float(np.mean(bound)) for bound in case.time_bounds(label)]
    errors: dict[str, Floor] = {label: functools.partial(spread, compute, label) for label in chosen}
    errors["weight"] = lambda: bounds[2]
    errors["loss"] = lambda: bounds[2] * float(compute(0)["mse"]) + spread(compute, "loss")
    case.report.compare_each(name, [compute(0)[label] for label in chosen], theirs[kept], chosen, errors)
    case.report.skip([f"{name}[{labels[i]}]" for i in range(len(labels)) if i not in kept], case.lacking)


def step_values(case: Case, label: str) -> Compute:
    """The velocity and the mean terms of one training step, by name, as a function of the draw (floors.py)."""

    @functools.cache
    def compute(draw: int) -> dict[str, Any]:
        batch, noise = case.moved((case.batch, case.noise), draw)
        times = case.moved_times(label, draw)
        if case.streamed:
            terms, predicted = streamed.loss_terms(case, batch, noise, times, draw)
        else:
            params = case.moved(case.params, draw)
            with case.on_mesh():
                terms, predicted = loss_terms(params, batch, noise, times, config=case.config)
        means = {name: float(jnp.mean(getattr(terms, field))) for name, field in PUBLISHED_TERMS.items()}
        return {"velocity": channels_second(predicted), **means}

    return compute


def check_alignment(case: Case, subjects: str) -> None:
    """Compares the alignment loss and its gradient, for features of several subjects with equally many tokens.

    Raises:
      ValueError: the tokens do not divide by the subjects.
    """
    name, k, arrays = f"ra{subjects}", int(subjects), case.values.arrays
    tokens = tuple(jnp.asarray(case.values.need(f"{name}_{part}")) for part in ("student", "teacher"))
    if not k or len(tokens[0]) % k or tokens[0].shape != tokens[1].shape:
        raise ValueError(f"{name}_student has {len(tokens[0])} tokens, not divisible by its {k} subjects.")
    loss = functools.partial(alignment_of, subjects=k, config=case.config.alignment)

    @functools.cache
    def compute(draw: int) -> dict[str, Any]:
        student, teacher = case.moved(tokens, draw)
        (_, terms), gradient = jax.value_and_grad(loss, has_aux=True)(student, teacher)
        return {"grad": gradient, **dict(zip(labels, terms, strict=True))}

    labels = ["total", "pull", "push"]
    if f"{name}_loss" in arrays:
        errors: dict[str, Floor] = {label: functools.partial(spread, compute, label) for label in labels}
        ours = [compute(0)[label] for label in labels]
        case.report.compare_each(f"{name}_loss", ours, arrays[f"{name}_loss"], labels, errors)
    if f"{name}_grad" in arrays:
        theirs = arrays[f"{name}_grad"]
        case.report.compare(f"{name}_grad", compute(0)["grad"], theirs, "gradient", lambda: spread(compute, "grad"))


def check_sample(case: Case) -> None:
    """Compares the sampling schedule, and sampled latents with three-branch guidance or, without references, with two.

    Raises:
      MissingError: an input is missing.
    """
    values, arrays = case.values, case.values.arrays
    guidance = Entries(values.config.optional("guidance", {}), f"{values.config.place}: guidance")
    config = SamplingConfig(
        num_steps=values.config.optional("sample_steps", len(arrays.get("sample_sigmas", range(50)))),
        shift=case.config.flow.shift,
        reference_guidance=guidance.optional("reference", 5.0),
        text_guidance=guidance.optional("text", 7.5),
    )
    table, bounds = (make(config.num_steps, config.shift) for make in (flow.schedule, table_bounds))
    for part in ("sigmas", "timesteps"):
        if f"sample_{part}" in arrays:
            tables = getattr(table, part), arrays[f"sample_{part}"], getattr(bounds, part)
            compare = functools.partial(case.report.compare_table, f"sample_{part}", *tables)
            attempt(case.report, [f"sample_{part}"], compare)
    if "sample_latents" not in arrays:
        return
    references = case.references()
    if references is None and "reference" in guidance:
        raise MissingError("values.npz lacks reference_latents")
    prompt = Condition(jnp.asarray(values.need("text")), references)
    negative = prompt._replace(text=jnp.asarray(values.need("negative_text")))
    inputs = values.channels_last("sample_noise"), prompt, negative

    @functools.cache
    def compute(draw: int) -> dict[str, Any]:
        params, moved = case.moved(case.params["dit"], draw), case.moved(inputs, draw)
        with case.on_mesh():
            return {"latents": channels_second(sample(params, *moved, dit=case.config.dit, config=config))}

    latents, theirs = compute(0)["latents"], arrays["sample_latents"]
    case.report.compare("sample_latents", latents, theirs, "sample", lambda: spread(compute, "latents"))


def predict(case: Case, inputs: streamed.Inputs, draw: int = 0) -> jax.Array:
    """The velocity; `draw` moves the parameters."""
    if case.streamed:
        return streamed.velocity(case, inputs, draw)
    params = case.moved(case.params["dit"], draw)
    with case.on_mesh():
        return velocity(params, case.config.dit, *inputs)


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


@functools.partial(jax.jit, static_argnames="config")
def loss_terms(params: Params, batch: Batch, noise: jax.Array, times: Times, *, config: ModelConfig) -> Any:
    """Terms of each sample's loss, and the velocity."""
    return objective.terms_at(params, batch, noise, times, jnp.int32(0), config)


def alignment_of(
    student: jax.Array, teacher: jax.Array, *, subjects: int, config: AlignmentConfig
) -> tuple[jax.Array, list[jax.Array]]:
    """The alignment loss, and [loss, pull, push], of tokens [subjects·P, E]."""
    s, f = (x.reshape(1, subjects, -1, x.shape[-1]) for x in (student, teacher))
    pull, push = alignment.pull_push(s, f, jnp.arange(subjects)[None], jnp.ones((1, subjects), bool), config)
    total = alignment.alignment_loss(pull, push, config)[0]
    return total, [total, pull[0], push[0]]
