"""What a request's video is drawn from: embeddings of its prompts, latents of its references, and its noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from refalign_jax.config import MAX_TEXT_LENGTH
from refalign_jax.data.references import encode_references
from refalign_jax.drawing import seeded_noise
from refalign_jax.encoders.interface import VideoCodec
from refalign_jax.inference.opening import Generator
from refalign_jax.inference.requests import Request
from refalign_jax.inference.tensors import given_noise, given_references, given_text
from refalign_jax.types import Float


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
    return seeded_noise(request.id, generator.generate.seed, shape) if given is None else given


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
