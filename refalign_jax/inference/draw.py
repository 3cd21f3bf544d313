"""Draws latents: prompts and references to what the transformer is given, then the sampler, step by step.

On CPUs the last bits of a matrix product depend on how many rows it has. So there each device draws one video at a
time, in a batch of any size, and with the references that the video has and no padding: the latents of a request are
the same bytes whatever is drawn beside it. Where the branches of guidance are split over devices, each device has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from refalign_jax.config import MAX_TEXT_LENGTH, DiTConfig, SamplingConfig
from refalign_jax.data.records import random_of
from refalign_jax.data.references import encode_references
from refalign_jax.encoders.interface import VideoCodec
from refalign_jax.inference.opening import Generator
from refalign_jax.inference.requests import Request
from refalign_jax.inference.tensors import given_noise, given_references, given_text
from refalign_jax.models.condition import Condition
from refalign_jax.sampling import advance, begin
from refalign_jax.sharding import replicated, to_devices
from refalign_jax.types import Array, Float, Params

BRANCHES = 3
"""Branches of guidance with references; plain text-to-video has two."""


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


def denoise(
    params: Params, inputs: Inputs, *, dit: DiTConfig, config: SamplingConfig, mesh: jax.sharding.Mesh
) -> Iterator[Float[Array, "B F H W C"]]:
    """Yields the latents of a batch after each step; the last ones are the sample.

    Args:
      params: of the transformer, on the mesh.
      inputs: of the batch; B is a multiple of the devices or, where branches are split over them, less.
      dit: the transformer.
      config: how to sample.
      mesh: the devices.
    """
    with jax.set_mesh(mesh):
        given = [x for x in inputs if x is not None]
        few = len(inputs.noise) % mesh.size != 0
        noise, prompt, negative, *references = (
            jax.device_put(given, replicated(mesh)) if few else to_devices(given, mesh)
        )
        conditions = Condition(prompt, *references), Condition(negative, *references)
        state = begin(params, noise, conditions, dit=dit, config=config)
    for i in range(config.num_steps):
        with jax.set_mesh(mesh):  # not around the yield, after which anything may run
            steps = jnp.int32(i), jnp.int32(i + 1)
            state = advance(params, state, steps, conditions, dit=dit, config=config)
        yield state.x


def batches(inputs: Mapping[str, Inputs], size: int) -> list[list[str]]:
    """Divides videos into batches of one kind each, at most `size`, in their order."""
    kinds: dict[tuple[int, int], list[str]] = {}
    for id, one in inputs.items():
        kinds.setdefault(one.kind, []).append(id)
    return [ids[start : start + size] for ids in kinds.values() for start in range(0, len(ids), size)]


def rows_per_call(generator: Generator) -> int:
    """How many videos the compiled program draws at once.

    A multiple of the devices; with `batched_guidance`, fewer, so that the branches of a video run on different devices:
    on CPUs as many videos as give each device one branch, whatever the batch size, elsewhere the batch size.
    """
    devices, wanted = generator.mesh.size, generator.generate.batch_size
    batched, on_cpu = generator.config.sampling.batched_guidance, jax.default_backend() == "cpu"
    if batched and on_cpu and devices >= BRANCHES:
        return devices // BRANCHES
    if batched and not on_cpu and wanted < devices:
        return wanted
    return devices if on_cpu else -(-wanted // devices) * devices


def stack(parts: Sequence[Inputs], size: int) -> Inputs:
    """The inputs of a batch, filled up with the last video so that all batches of a kind share one program."""
    filled = [parts[min(row, len(parts) - 1)] for row in range(size)]
    columns = zip(*filled, strict=True)
    noise, prompt, negative, references = (None if column[0] is None else np.stack(column) for column in columns)
    assert noise is not None
    assert prompt is not None
    assert negative is not None
    return Inputs(noise, prompt, negative, references)


def embed(requests: Sequence[Request], generator: Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The embeddings of each request's prompt and of the negative prompt, by id.

    Those of the text encoder are cut, or padded with zeros, to the length that the loader gives to training; those from
    a file are as they are.

    Raises:
      ValueError: a file lacks them, or they don't fit.
    """
    length, dit = generator.config.data.text_length, generator.config.model.dit
    given = {request.id: given_text(generator.given, request.id, dit.text_width) for request in requests}
    negative = generator.generate.negative_prompt or ""
    wanted = [request.prompt for request in requests if "prompt" not in given[request.id]]
    wanted += [negative] if any("negative" not in parts for parts in given.values()) else []
    unique = list(dict.fromkeys(wanted))
    rows: dict[str, np.ndarray] = {}
    if unique:
        if generator.text is None:
            raise ValueError(
                f"{generator.generate.embeddings} holds no embedding `negative` of the negative prompt; add it, or "
                "name a --text-encoder."
            )
        rows = dict(zip(unique, generator.text.encode(unique), strict=True))

    cache: dict[tuple[int, int], np.ndarray] = {}

    def padded(value: np.ndarray, length: int) -> np.ndarray:
        key = id(value), length  # requests share the negative prompt's
        if key not in cache:
            cache[key] = np.zeros((length, value.shape[1]), np.float32)
            cache[key][: min(len(value), length)] = value[:length]
        return cache[key]

    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for request in requests:
        parts = given[request.id]
        prompt = parts.get("prompt", rows.get(request.prompt))
        other = parts.get("negative", rows.get(negative))
        assert prompt is not None
        assert other is not None
        size = max(len(prompt), len(other)) if "prompt" in parts and "negative" in parts else length
        found[request.id] = padded(prompt, size), padded(other, size)
    return found


def references_of(
    request: Request, images: UInt8[np.ndarray, "R h w 3"], generator: Generator
) -> Float[np.ndarray, "R H W C"] | None:
    """The latents of a request's references, from the file of embeddings or encoded; None where it has none.

    Raises:
      ValueError: those of the file have another shape.
    """
    _, H, W, C = latent_shape(generator)
    given = given_references(generator.given, request.id, (H, W, C))
    if given is not None:
        return given
    return encode_references(images, generator.codec) if len(images) else None


def noise_of(request: Request, generator: Generator) -> Float[np.ndarray, "F H W C"]:
    """The noise of a request: from a file, or by its id and the seed alone.

    Raises:
      ValueError: the file holds none for it, or one of another shape.
    """
    shape = latent_shape(generator)
    given = given_noise(generator.given, request.id, shape)
    if given is not None:
        return given
    return random_of(request.id, generator.generate.seed).standard_normal(shape, np.float32)


def latent_shape(generator: Generator) -> tuple[int, int, int, int]:
    """F, H, W and C of a video."""
    codec: VideoCodec = generator.codec
    frames, rows, columns = generator.size
    return (frames - 1) // 4 + 1, rows // codec.stride, columns // codec.stride, codec.channels


def clean_estimate(
    before: Float[np.ndarray, "F H W C"], after: Float[np.ndarray, "F H W C"], sigmas: tuple[float, float]
) -> Float[np.ndarray, "F H W C"]:
    """Where the straight line through two states of the sampler meets σ = 0.

    x₀ = x' − σ'·(x' − x) / (σ' − σ). With Euler, x' − x = (σ' − σ)·v, so this is x − σ·v, the clean video that the
    guided velocity of the step points to. With the other solvers it is close to it.

    Args:
      before: x, the state before a step.
      after: x', the state after it.
      sigmas: σ and σ', their noise levels.
    """
    sigma, following = sigmas
    return after - following * (after - before) / (following - sigma)


def cut_prompts(requests: Sequence[Request], generator: Generator) -> list[str]:
    """A sentence for each prompt that is cut at the text length, with how many tokens it loses."""
    if not requests or generator.text is None or generator.given.embeddings is not None:
        return []
    most, found = min(generator.config.data.text_length, MAX_TEXT_LENGTH), []
    prompts = [*((request.id, request.prompt) for request in requests), ("", generator.generate.negative_prompt or "")]
    counts = generator.text.count_tokens([prompt for _, prompt in prompts])
    for (id, _), count in zip(prompts, counts, strict=True):
        if count > most:
            name = f"The prompt of {id}" if id else "The negative prompt"
            found.append(f"{name} has {count} tokens; it is cut at {most} and loses {count - most}.")
    return found
