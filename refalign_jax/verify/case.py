"""A transformer to verify: its weights, its inputs, and the report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from refalign_jax import flow
from refalign_jax.alignment import SubjectPatches
from refalign_jax.config import ModelConfig
from refalign_jax.convert.dit import Names, model_table
from refalign_jax.convert.table import Entry
from refalign_jax.models.condition import Condition
from refalign_jax.objective import Batch, Times, all_aligned
from refalign_jax.sharding import state_sharding
from refalign_jax.trees import flatten, unflatten
from refalign_jax.types import Params
from refalign_jax.verify import floors
from refalign_jax.verify.report import Report
from refalign_jax.verify.values import MissingError, Values

LARGE = 200_000_000
"""Parameters from which on a transformer is read block by block, and never held as a whole."""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A model and a folder of its values.

    Attributes:
      values: inputs, and what the other framework computed from them.
      report: receives the comparisons.
      config: of the model; its alignment weight is 0 where the values were made without the alignment loss.
      leaves: its parameters, unread; indexing one reads it.
      lacking: what the alignment loss needs and the folder lacks; empty where it lacks nothing.
      streamed: whether the blocks are read one at a time.
      mesh: the devices; None for one.
    """

    values: Values
    report: Report
    config: ModelConfig
    leaves: Params
    lacking: str = ""
    streamed: bool = False
    mesh: Mesh | None = None

    @functools.cached_property
    def params(self) -> Params:
        """The parameters, float32, on the devices.

        Raises:
          MissingError: the model is too large to be held.
        """
        if self.streamed:
            raise MissingError("the model is read block by block, which does for forward passes alone; see --stream")
        return self.place(jax.tree.map(lambda leaf: np.asarray(leaf[()], np.float32), self.leaves))

    def place(self, params: Params, within: str = "") -> Params:
        """Puts arrays on the devices, split as in training; `within` names the part of the parameters they are."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, params)
        whole = {within: params} if within else params
        placed = jax.device_put(whole, state_sharding(whole, self.mesh))
        return placed[within] if within else placed

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which programs are split over the devices."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def table(self, names: Names) -> Sequence[Entry]:
        """Published names of the parameters that take part: without the alignment loss those of the transformer."""
        return model_table(self.config.dit, self.config.alignment if "projectors" in self.leaves else None, names)

    def moved(self, tree: Any, draw: int) -> Any:
        """As `floors.moved`, by the spacing of the profile."""
        return floors.moved(tree, draw, self.report.spacing)

    @functools.cached_property
    def batch(self) -> Batch:
        """The training batch; unless the folder says otherwise, every reference is real and shows its own subject."""
        values = self.values
        latents, text = values.channels_last("video_latents"), jnp.asarray(values.need("text"))
        B = latents.shape[0]
        references = self.references()
        if references is None:
            references = jnp.zeros((B, 0, *latents.shape[2:]))
        R = references.shape[1]
        targets = jnp.zeros((B, R, 0, self.config.alignment.vfm_width))
        if "vfm_features" in values.arrays:
            targets = values.channels_last("vfm_features")  # [B, R, h, w, E]
            targets = targets.reshape(B, R, -1, targets.shape[-1])
        given, patches = values.arrays, None
        if "subject_mask" in given:
            patches = SubjectPatches(
                jnp.asarray(given["subject_mask"], bool),
                jnp.asarray(given["target_mean"]) if "target_mean" in given else None,
            )
        return Batch(
            video_latents=latents,
            text=text,
            reference_latents=references,
            num_references=jnp.asarray(given["num_references"], jnp.int32) if "num_references" in given else None,
            subject_ids=jnp.asarray(given.get("subject_ids", np.tile(np.arange(R), (B, 1))), jnp.int32),
            vfm_features=targets,
            aligned=jnp.asarray(given["aligned"], bool) if "aligned" in given else all_aligned(B),
            patches=patches,
        )

    def references(self) -> jax.Array | None:
        """The reference latents, [B, R, H, W, C]; None for plain text-to-video.

        Raises:
          MissingError: the values were made with references, and they are not in the folder.
        """
        if "reference_latents" in self.values.arrays:
            return self.values.channels_last("reference_latents")
        if self.config.alignment.weight or self.lacking:
            raise MissingError("values.npz lacks reference_latents")
        return None

    @functools.cached_property
    def noise(self) -> jax.Array:
        """The noise of the training batch, [B, F, H, W, C]."""
        return self.values.channels_last("noise")

    def indices(self, label: str) -> jax.Array:
        """Indices into the training schedule, [B]: `label` for each sample, or `index` of the folder where it is "".

        Raises:
          MissingError: there is no `index`.
          ValueError: one is outside of the schedule.
        """
        B = self.values.need("video_latents").shape[0]
        indices = np.full(B, int(label)) if label else self.values.need("index")
        count = self.config.flow.num_train_steps
        if indices.shape != (B,) or indices.min() < 0 or indices.max() >= count:
            raise ValueError(f"{indices.tolist()} are no {B} indices into the training schedule, 0 to {count - 1}.")
        return jnp.asarray(indices, jnp.int32)

    def times(self, label: str) -> Times:
        """σ, t and w of each sample.

        Where their t differs from ours by no more than the error of a float32 table, theirs is taken, with its σ: what
        the transformer and the loss make of it is another question.
        """
        sigma, t, weight = flow.lookup(flow.training_schedule(self.config.flow), self.indices(label))
        theirs = self.values.arrays.get(f"step{label}_timestep")
        if theirs is not None and theirs.shape in ((), t.shape):
            given = np.broadcast_to(np.asarray(theirs, np.float32), t.shape)
            differ, close = given != np.asarray(t), np.abs(given - np.asarray(t)) <= self.time_bounds(label)[1]
            if differ.any() and close.all():
                return jnp.where(differ, given / np.float32(1000), sigma), jnp.asarray(given), weight
        return sigma, t, weight

    def time_bounds(self, label: str) -> Times:
        """How far a float32 table may be from σ, t and w of each sample."""
        indices = np.asarray(self.indices(label))
        return tuple(bound[indices] for bound in self.bounds)

    def moved_times(self, label: str, draw: int) -> Times:
        """As `times`, moved by the error of a float32 table where the folder does not have theirs; see floors.py."""
        times = self.times(label)
        if f"step{label}_timestep" not in self.values.arrays:
            times = floors.moved_times(times, self.time_bounds(label), draw)
        return times[0], floors.moved_time(times[1], draw, self.report.spacing), times[2]

    def moved_inputs(self, inputs: tuple[jax.Array, jax.Array, Condition], draw: int) -> tuple[Any, jax.Array, Any]:
        """Latents, times and condition of a forward pass, moved; the times by `floors.moved_time`."""
        x, t, condition = inputs
        x, condition = self.moved((x, condition), draw)
        return x, floors.moved_time(t, draw, self.report.spacing), condition

    @functools.cached_property
    def bounds(self) -> flow.Schedule:
        """How far each entry of the training schedule may be from a float32 table."""
        return floors.table_bounds(self.config.flow.num_train_steps, self.config.flow.shift)

    def need_alignment(self) -> None:
        """Checks that the alignment loss can be computed, if it takes part.

        Raises:
          MissingError: it takes part and lacks something.
        """
        if self.lacking:
            raise MissingError(self.lacking)


def select(params: Params, *without: str) -> Params:
    """The parameters without some of the first level."""
    return {name: value for name, value in params.items() if name not in without}


def read_layer(leaves: Params, layer: int) -> Params:
    """Reads one layer of stacked parameters, float32."""
    return unflatten(
        {path: np.asarray(leaf[(slice(layer, layer + 1),)][0], np.float32) for path, leaf in flatten(leaves).items()}
    )
