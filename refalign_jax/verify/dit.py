"""Verifies the transformer, the alignment loss, flow matching, optimisation and sampling against a folder of values.

The folder's form is described in docs/verify.md. Whatever of it is there is compared;
arrays are in PyTorch layout, channels second.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from refalign_jax import alignment, flow
from refalign_jax.config import AlignmentConfig, DiTConfig, DType, FlowConfig, ModelConfig, SamplingConfig
from refalign_jax.convert.dit import model_table
from refalign_jax.convert.files import open_weights
from refalign_jax.convert.table import to_ours, to_published
from refalign_jax.initial import model_shapes
from refalign_jax.models.condition import Condition
from refalign_jax.models.dit import all_tokens, observe, reference_tokens, velocity
from refalign_jax.objective import Batch, Terms, all_aligned, sample_terms
from refalign_jax.sampling import sample
from refalign_jax.types import Params
from refalign_jax.verify.report import Report

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

ADAMW = {"learning_rate": 5e-5, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
"""torch.optim.AdamW's defaults and the recipe's learning rate."""

_INPUTS = re.compile(
    r"video_latents|noise|text|negative_text|reference_latents|vfm_features|sample_noise|ra\d+_(student|teacher)"
)


class DiTCheck:
    """One folder opened: its configuration, weights and values, and the comparisons over them."""

    def __init__(self, folder: Path, config: Mapping[str, Any], compute_dtype: DType, report: Report) -> None:
        """Reads the weights.

        Raises:
          ValueError: config.json lacks an entry, or the weights are not those of its model.
        """
        self.folder, self.json, self.report = folder, config, report
        self.config = _model_config(folder, config, compute_dtype)
        with np.load(folder / "values.npz") as file:
            self.values = {name: file[name] for name in file.files}
        self.table = model_table(self.config.dit, self.config.alignment)
        shapes = model_shapes(self.config)
        self.params: Params = to_ours(self.table, shapes, open_weights(folder / "weights.safetensors"))

    def run(self) -> None:
        """Compares all that is there and remarks on names that are not known."""
        known: list[tuple[str, Callable[..., None]]] = [
            (r"velocity_t([\d.]+)_refs(\d+)", self._velocity),
            (r"train_(timesteps|weights)", self._schedule),
            (r"step(\d+)_velocity", self._step),
            (r"ra(\d+)_loss", self._alignment),
            (r"sample_latents", self._sample),
            (r"adamw_losses", self._nothing),
            (r"step(\d+)_(timestep|noisy|target|scalars|ref_features|blocks)", self._nothing),
            (r"velocity_t[\d.]+_refs\d+_blocks|ra\d+_grad|sample_(sigmas|timesteps)", self._nothing),
        ]
        gradients = sorted(self.folder.glob("grads_step*.safetensors"))
        updates = sorted(self.folder.glob("weights_after_*_adamw.safetensors"))
        names = [name for name in self.values if not _INPUTS.fullmatch(name)]
        with tqdm(desc="verify", total=len(names) + len(gradients) + len(updates), unit="value") as bar:
            for name in names:
                matches = ((re.fullmatch(pattern, name), check) for pattern, check in known)
                match, check = next(((match, check) for match, check in matches if match), (None, self._nothing))
                if match is None:
                    self.report.remarks.append(f"values.npz holds {name!r}, which is none of the names verified.")
                else:
                    check(*match.groups())
                bar.update()
            for path in gradients:
                self._gradients(path)
                bar.update()
            for path in updates:
                self._adamw(path)
                bar.update()
        compared = {row.name.split("[")[0] for row in self.report.rows}
        for name in self.values:
            if name not in compared and not _INPUTS.fullmatch(name) and not any(name in r for r in self.report.remarks):
                self.report.remarks.append(f"{name} was not compared: what it belongs to is not in the folder.")

    def _nothing(self, *_: str) -> None:
        """For names compared together with another."""

    def _need(self, name: str) -> np.ndarray:
        if name not in self.values:
            raise ValueError(f"{self.folder / 'values.npz'} lacks {name!r}, which the values in it depend on.")
        return self.values[name]

    def _latents(self, name: str) -> jax.Array:
        return jnp.moveaxis(jnp.asarray(self._need(name)), 1, -1)

    def _published(self, x: jax.Array) -> np.ndarray:
        return np.moveaxis(np.asarray(x), -1, 1)

    def _velocity(self, t: str, count: str) -> None:
        """Forwards with the first `count` references."""
        name = f"velocity_t{t}_refs{count}"
        x = self._latents("video_latents")
        references = self._latents("reference_latents")[:, : int(count)] if int(count) else None
        condition = Condition(jnp.asarray(self._need("text")), references)
        inputs = self.params["dit"], self.config.dit, x, jnp.full(x.shape[:1], float(t), jnp.float32), condition
        row = self.report.compare(name, self._published(_velocity(*inputs)), self.values[name], "forward")
        self._blocks(name, inputs, row.passed)

    def _blocks(self, name: str, inputs: tuple, agrees: bool) -> None:
        """Compares the tokens after every block, if given, and names the first block that diverges."""
        given = self.values.get(f"{name}_blocks")
        if given is None:
            if not agrees:
                self.report.remarks.append(
                    f"{name} diverges; add {name}_blocks [layers, B, tokens, D], the tokens after every block, to see "
                    "where."
                )
            return
        states = _tokens(*inputs)
        self.report.compare(f"{name}_blocks", states, given, "forward")
        for i, (ours, theirs) in enumerate(zip(np.asarray(states), given, strict=True)):
            if not self.report._row("", ours, theirs, "forward").passed:
                self.report.remarks.append(f"{name}: block {i} is the first that diverges.")
                return
        if not agrees:
            self.report.remarks.append(f"{name}: every block agrees, so that the head diverges.")

    def _schedule(self, what: str) -> None:
        """The training schedule's table."""
        table = flow.training_schedule(self.config.flow)
        self.report.compare(f"train_{what}", getattr(table, what), self.values[f"train_{what}"], "forward")

    def _terms(self, params: Params, index: int) -> tuple[Terms, jax.Array]:
        batch = self._batch
        indices = jnp.full(batch.video_latents.shape[:1], index)
        return _loss_terms(params, batch, self._latents("noise"), indices, config=self.config)

    @functools.cached_property
    def _batch(self) -> Batch:
        targets = jnp.moveaxis(jnp.asarray(self._need("vfm_features")), 1, -1)  # [B, R, h, w, E]
        B, R = targets.shape[:2]
        return Batch(
            video_latents=self._latents("video_latents"),
            text=jnp.asarray(self._need("text")),
            reference_latents=self._latents("reference_latents"),
            num_references=jnp.full((B,), R),
            subject_ids=jnp.tile(jnp.arange(R), (B, 1)),
            vfm_features=targets.reshape(B, R, -1, targets.shape[-1]),
            aligned=all_aligned(B),
        )

    def _step(self, index: str) -> None:
        """Everything on the way to one step's loss."""
        i, name = int(index), f"step{index}"
        batch, values = self._batch, self.values
        terms, velocity = self._terms(self.params, i)
        sigma, t, _ = flow.lookup(flow.training_schedule(self.config.flow), jnp.full(batch.text.shape[:1], i))
        noisy, target = flow.corrupt(batch.video_latents, self._latents("noise"), sigma)
        for part, ours in (
            ("timestep", t),
            ("noisy", self._published(noisy)),
            ("target", self._published(target)),
        ):
            if f"{name}_{part}" in values:
                self.report.compare(f"{name}_{part}", ours, values[f"{name}_{part}"], "forward")
        row = self.report.compare(f"{name}_velocity", self._published(velocity), values[f"{name}_velocity"], "forward")
        condition = batch.condition._replace(num_references=None)
        inputs = self.params["dit"], self.config.dit, noisy, t, condition
        self._blocks(name, inputs, row.passed)
        if f"{name}_ref_features" in values:
            blocks = self.config.alignment.num_blocks
            features = _features(*inputs, blocks)
            features = features.reshape(*features.shape[:2], -1, features.shape[-1])
            theirs = values[f"{name}_ref_features"]
            self.report.compare(f"{name}_ref_features", np.asarray(features, np.float32), theirs, "forward")
        if f"{name}_scalars" in values:
            labels = list(self.json.get("scalars", []))
            unknown = [label for label in labels if label not in SCALARS]
            if unknown:
                raise ValueError(f"config.json names the scalars {unknown}; known are {', '.join(SCALARS)}.")
            scalars = [float(jnp.mean(SCALARS[label](terms))) for label in labels]
            self.report.compare_each(f"{name}_scalars", scalars, values[f"{name}_scalars"], labels)

    def _alignment(self, subjects: str) -> None:
        """The alignment loss alone, for so many subjects of equally many tokens, and its gradient."""
        name, k = f"ra{subjects}", int(subjects)
        student, teacher = (jnp.asarray(self._need(f"{name}_{part}")) for part in ("student", "teacher"))
        if len(student) % k:
            raise ValueError(f"{name}_student has {len(student)} tokens, not divisible by its {k} subjects.")
        loss = functools.partial(_alignment_alone, teacher=teacher, subjects=k, config=self.config.alignment)
        (_, terms), gradient = jax.value_and_grad(loss, has_aux=True)(student)
        self.report.compare_each(f"{name}_loss", terms, self.values[f"{name}_loss"], ["total", "pull", "push"])
        if f"{name}_grad" in self.values:
            self.report.compare(f"{name}_grad", gradient, self.values[f"{name}_grad"], "gradient")

    def _sample(self) -> None:
        """Sampling with three-branch guidance."""
        guidance = self.json.get("guidance", {})
        config = SamplingConfig(
            num_steps=int(self.json.get("sample_steps", 50)),
            shift=self.config.flow.shift,
            reference_guidance=guidance.get("reference", 5.0),
            text_guidance=guidance.get("text", 7.5),
        )
        table = flow.schedule(config.num_steps, config.shift)
        for part in ("sigmas", "timesteps"):
            if f"sample_{part}" in self.values:
                self.report.compare(f"sample_{part}", getattr(table, part), self.values[f"sample_{part}"], "forward")
        prompt = Condition(jnp.asarray(self._need("text")), self._latents("reference_latents"))
        negative = prompt._replace(text=jnp.asarray(self._need("negative_text")))
        noise = self._latents("sample_noise")
        latents = sample(self.params["dit"], noise, prompt, negative, dit=self.config.dit, config=config)
        self.report.compare("sample_latents", self._published(latents), self.values["sample_latents"], "sample")

    def _gradients(self, path: Path) -> None:
        """The gradient of every parameter at one step."""
        match = re.fullmatch(r"grads_step(\d+)", path.stem)
        if match is None:
            raise ValueError(f"{path.name}: a file of gradients is named grads_step<index>.safetensors.")
        _, gradient = self._value_and_gradient(self.params, int(match[1]))
        weights = open_weights(path)
        for name, ours in to_published(self.table, jax.device_get(gradient)):
            if name not in weights.shapes:
                self.report.remarks.append(f"{path.name} lacks {name}.")
                continue
            self.report.compare(f"gradient {name}", ours, weights.read(name), "gradient", key=f"grad/{name}")

    def _adamw(self, path: Path) -> None:
        """The update of every parameter after some AdamW steps, and the loss before each."""
        match = re.fullmatch(r"weights_after_(\d+)_adamw", path.stem)
        if match is None:
            raise ValueError(f"{path.name}: such a file is named weights_after_<steps>_adamw.safetensors.")
        index = int(self.json.get("adamw_id", 300))
        params: Params = jax.tree.map(jnp.asarray, self.params)
        state, losses = optax.adamw(**ADAMW).init(params), []
        for _ in range(int(match[1])):
            loss, gradient = self._value_and_gradient(params, index)
            losses.append(loss)
            params, state = _update(params, state, gradient)
        if "adamw_losses" in self.values:
            labels = [f"step {i}" for i in range(len(losses))]
            self.report.compare_each("adamw_losses", losses, self.values["adamw_losses"], labels)
        weights = open_weights(path)
        before = dict(to_published(self.table, self.params))
        for name, ours in to_published(self.table, jax.device_get(params)):
            if name not in weights.shapes:
                self.report.remarks.append(f"{path.name} lacks {name}.")
                continue
            self.report.compare(f"update {name}", ours - before[name], weights.read(name) - before[name], "update")
            self.report.values[f"adamw/{name}"] = self.report.values.pop(f"update {name}") + before[name]

    def _value_and_gradient(self, params: Params, index: int) -> tuple[float, Params]:
        batch = self._batch
        indices = jnp.full(batch.video_latents.shape[:1], index)
        loss, gradient = _loss_gradient(params, batch, self._latents("noise"), indices, config=self.config)
        return float(loss), gradient


_velocity = jax.jit(velocity, static_argnums=1)


@functools.partial(jax.jit, static_argnums=(1, 5))
def _features(
    params: Params, config: DiTConfig, x: jax.Array, t: jax.Array, condition: Condition, num_blocks: int
) -> jax.Array:
    """Reference tokens after the first blocks, [A, B, R, P, D]."""
    assert condition.reference_latents is not None
    observer = reference_tokens(config, num_blocks, condition.reference_latents.shape)
    return observe(params, config, x, t, condition, observer)[1]


@functools.partial(jax.jit, static_argnums=1)
def _tokens(params: Params, config: DiTConfig, x: jax.Array, t: jax.Array, condition: Condition) -> jax.Array:
    """All tokens after every block, [layers, B, tokens, D], float32."""
    return observe(params, config, x, t, condition, all_tokens(config))[1].astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="config")
def _loss_terms(params: Params, batch: Batch, noise: jax.Array, index: jax.Array, *, config: ModelConfig) -> Any:
    return sample_terms(params, batch, noise, index, jnp.int32(0), config)


@functools.partial(jax.jit, static_argnames="config")
def _loss_gradient(params: Params, batch: Batch, noise: jax.Array, index: jax.Array, *, config: ModelConfig) -> Any:
    def loss(params: Params) -> jax.Array:
        return jnp.mean(sample_terms(params, batch, noise, index, jnp.int32(0), config)[0].loss)

    return jax.value_and_grad(loss)(params)


@jax.jit
def _update(params: Params, state: Any, gradient: Params) -> Any:
    optimizer = optax.adamw(**ADAMW)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def _alignment_alone(
    student: jax.Array, *, teacher: jax.Array, subjects: int, config: AlignmentConfig
) -> tuple[jax.Array, list[jax.Array]]:
    """Total, and [total, pull, push], for tokens [subjects·P, E]."""
    s, f = (x.reshape(1, subjects, -1, x.shape[-1]) for x in (student, teacher))
    pull, push = alignment.pull_push(s, f, jnp.arange(subjects)[None], jnp.ones((1, subjects), bool), config)
    total = alignment.alignment_loss(pull, push, config)[0]
    return total, [total, pull[0], push[0]]


def _model_config(folder: Path, config: Mapping[str, Any], compute_dtype: DType) -> ModelConfig:
    """Our configuration from the folder's config.json."""
    try:
        channels = {int(config["in_dim"]), int(config["out_dim"])}
        if len(channels) > 1:
            raise ValueError(f"{folder / 'config.json'}: in_dim and out_dim differ; a Wan T2V model has them equal.")
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
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} lacks {error}; docs/verify.md lists what it holds.") from error
