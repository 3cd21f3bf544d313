"""Draws the latents of videos: previews of training, `tools/sample.py`, the demo and the studio all draw here.

    noise, prompt, negative prompt, references     `Inputs`; the noise is decided by the video's id and the seed alone
    videos of one kind, without padding            `batches`, `stack`
    the sampler, step by step                      `denoise`, which calls `sampling.advance`

On CPUs the last bits of a matrix product depend on how many rows it has. So there each part of the mesh that holds a
whole sequence draws one video at a time, in a batch of any size, and with the references that the video has and no
padding: the latents of a video are the same bytes whatever is drawn beside it. Where the branches of guidance are split
over devices, each device has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from refalign_jax.config import DiTConfig, SamplingConfig
from refalign_jax.data.seeds import random_of
from refalign_jax.models.condition import Condition
from refalign_jax.sampling import advance, begin
from refalign_jax.sharding import BATCH, batch_parts, replicated
from refalign_jax.types import Array, Float, Params

BRANCHES = 3
"""Branches of guidance with references; plain text-to-video has two."""

Key = TypeVar("Key")


class Inputs(NamedTuple):
    """What is drawn from, for a batch of videos or, without the axis B, for one.

    Attributes:
      noise: standard normal, float32.
      prompt: embeddings, padding rows zero.
      negative: embeddings of the negative prompt.
      references: clean latents; None for plain text-to-video.
    """

    noise: Float[np.ndarray, "*B F H W C"]
    prompt: Float[np.ndarray, "*B S D"]
    negative: Float[np.ndarray, "*B S D"]
    references: Float[np.ndarray, "*B R H W C"] | None

    @property
    def kind(self) -> tuple[int, int]:
        """Text tokens and references; what differs in it can't be drawn in one batch."""
        return self.prompt.shape[-2], 0 if self.references is None else self.references.shape[-4]


def seeded_noise(id: str, seed: int, shape: tuple[int, int, int, int]) -> Float[np.ndarray, "F H W C"]:
    """The noise of a video, which its id and the seed alone decide."""
    return random_of(id, seed).standard_normal(shape, np.float32)


def denoise(
    params: Params, inputs: Inputs, *, dit: DiTConfig, config: SamplingConfig, mesh: Mesh
) -> Iterator[Float[Array, "B F H W C"]]:
    """Yields the latents of a batch after each step; the last ones are the sample.

    Args:
      params: of the transformer, on the mesh.
      inputs: of the batch, the same in every process of the mesh; B is a multiple of `sharding.batch_parts` or, where
        branches are split over devices, less.
      dit: the transformer.
      config: how to sample.
      mesh: the devices.
    """
    few = len(inputs.noise) % batch_parts(mesh) != 0
    place = replicated(mesh) if few else NamedSharding(mesh, BATCH)

    def put(x: np.ndarray) -> Array:
        return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

    noise, prompt, negative, *references = (put(x) for x in inputs if x is not None)
    conditions = Condition(prompt, *references), Condition(negative, *references)
    with jax.set_mesh(mesh):
        state = begin(params, noise, conditions, dit=dit, config=config)
    for i in range(config.num_steps):
        with jax.set_mesh(mesh):  # not around the yield, after which anything may run
            steps = np.int32(i), np.int32(i + 1)
            state = advance(params, state, steps, conditions, dit=dit, config=config)
        yield state.x


def rows_per_call(mesh: Mesh, wanted: int, batched_guidance: bool) -> int:
    """How many videos the compiled program draws at once.

    A multiple of the parts into which the mesh splits a batch; with `batched_guidance`, fewer, so that the branches of
    a video run on different devices: on CPUs as many videos as give each part one branch, whatever is wanted, elsewhere
    what is wanted.

    Args:
      mesh: the devices.
      wanted: how many are asked for.
      batched_guidance: as in `SamplingConfig`.
    """
    parts, on_cpu = batch_parts(mesh), jax.default_backend() == "cpu"
    if batched_guidance and on_cpu and parts >= BRANCHES:
        return parts // BRANCHES
    if batched_guidance and not on_cpu and wanted < parts:
        return wanted
    return parts if on_cpu else -(-wanted // parts) * parts


def batches(inputs: Mapping[Key, Inputs], size: int) -> list[list[Key]]:
    """Divides videos into batches of one kind each, at most `size`, in their order."""
    kinds: dict[tuple[int, int], list[Key]] = {}
    for key, one in inputs.items():
        kinds.setdefault(one.kind, []).append(key)
    return [keys[start : start + size] for keys in kinds.values() for start in range(0, len(keys), size)]


def stack(parts: Sequence[Inputs], size: int) -> Inputs:
    """The inputs of a batch, filled up with the last video so that all batches of a kind share one program."""
    filled = [parts[min(row, len(parts) - 1)] for row in range(size)]
    columns = zip(*filled, strict=True)
    noise, prompt, negative, references = (None if column[0] is None else np.stack(column) for column in columns)
    assert noise is not None
    assert prompt is not None
    assert negative is not None
    return Inputs(noise, prompt, negative, references)
