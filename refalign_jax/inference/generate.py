"""Samples videos: opens weights and encoders, then draws a video for each request.

The noise of a video depends on the seed and the request's id alone, so neither the other requests nor their order
change it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import UInt8
from tqdm import tqdm

from refalign_jax.config import Config, GenerateConfig, MeshConfig, ModelConfig
from refalign_jax.config.recipe import from_dict
from refalign_jax.convert.checkpoint import find_checkpoint, read_json
from refalign_jax.convert.infer import open_transformer
from refalign_jax.convert.load import initial_params, is_checkpoint
from refalign_jax.data.manifest import MANIFEST, read_manifest
from refalign_jax.data.records import random_of
from refalign_jax.data.references import encode_references, load_reference
from refalign_jax.data.shards import WAN_FPS, clip_fps
from refalign_jax.data.video import write_latents
from refalign_jax.encoders.interface import TextEncoder, VideoCodec
from refalign_jax.encoders.open import (
    open_text_encoder,
    open_video_codec,
    reopen_text_encoder,
    reopen_video_codec,
)
from refalign_jax.inference.outputs import describe_sample, find_done, write_references, write_samples
from refalign_jax.inference.requests import Request
from refalign_jax.initial import model_shapes
from refalign_jax.models.condition import Condition
from refalign_jax.sampling import sample
from refalign_jax.sharding import make_mesh, place_shapes, to_devices
from refalign_jax.types import Float, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator:
    """Everything that turns requests into videos."""

    params: Params
    """The transformer's parameters."""
    config: Config
    """The run's configuration or, for published weights, defaults around their model; `sampling` in it is used."""
    weights: str
    """Where the parameters are from."""
    codec: VideoCodec
    text: TextEncoder
    size: tuple[int, int, int]
    """Frames, rows and columns of a video in pixels."""
    generate: GenerateConfig
    """What was asked for, and the frame rate; of it, negative prompt, seed, frame rate and batch size are used."""
    mesh: jax.sharding.Mesh
    """The devices."""

    @property
    def made(self) -> dict[str, Any]:
        """Everything that decides a video beside prompt and references, as JSON."""
        return {
            "weights": self.weights,
            "encoders": {"video": self.codec.describe(), "text": self.text.describe()},
            "size": list(self.size),
            "fps": self.generate.fps,
            "sampling": dataclasses.asdict(self.config.sampling),
            "negative_prompt": self.generate.negative_prompt,
            "seed": self.generate.seed,
        }


def open_generator(weights: str, config: GenerateConfig) -> Generator:
    """Opens parameters and encoders.

    Args:
      weights: a run's folder or one of its checkpoints, a checkpoint of parameters, or published safetensors.
      config: how to sample; what it leaves open is as the run or its dataset has it.

    Raises:
      ValueError: there are no weights, no encoders are named, or they don't fit each other.
    """
    run, source = _read_run(weights, config.ema)
    names = ("solver", "num_steps", "shift", "reference_guidance", "text_guidance")
    changes = {name: getattr(config, name) for name in names}
    sampling = dataclasses.replace(run.sampling, **{name: v for name, v in changes.items() if v is not None})
    run = dataclasses.replace(run, sampling=sampling)
    config = dataclasses.replace(config, fps=config.fps or _dataset_fps(run, config))
    codec, text, size = _open_encoders(run, config)
    _check_fit(run.model, codec, text, size)
    mesh = make_mesh(MeshConfig(fsdp=config.fsdp))
    shapes = {"dit": model_shapes(run.model)["dit"]}
    placed = place_shapes(shapes, mesh, jnp.dtype(config.weights_dtype))
    params, _ = initial_params(weights, config.ema, run.model, placed, jax.random.key(0))
    return Generator(
        params=params["dit"],
        config=run,
        weights=source,
        codec=codec,
        text=text,
        size=size,
        generate=config,
        mesh=mesh,
    )


def _read_run(weights: str, ema: bool) -> tuple[Config, str]:
    """Returns the run's configuration, or defaults around the model of other weights, and where the weights are."""
    if not weights:
        raise ValueError("No weights are named; give a run's folder, a checkpoint, or published safetensors.")
    if not is_checkpoint(weights):
        opened = open_transformer(weights)
        return Config(model=opened.config), opened.tensors.source
    folder, item = find_checkpoint(weights, ema)
    values = read_json(folder, "config")
    if "model" in values:
        return from_dict(Config, values, str(folder)), f"{folder}/{item}"
    return Config(model=from_dict(ModelConfig, values, str(folder))), f"{folder}/{item}"


def _open_encoders(run: Config, config: GenerateConfig) -> tuple[VideoCodec, TextEncoder, tuple[int, int, int]]:
    """Opens codec and text encoder, and chooses the size of videos: as configured, the rest as the dataset has it."""
    dataset = run.data.path if config.dataset is None else config.dataset
    dit, made = run.model.dit, dict[str, Any]()
    if dataset and not (config.vae and config.text_encoder and config.height and config.width and config.num_frames):
        made = dict(read_manifest(dataset).made)
    described, settings = made.get("encoders", {}), made.get("settings", {})
    for name, flag in (("video", "vae"), ("text", "text_encoder")):
        if not getattr(config, flag) and name not in described:
            raise ValueError(
                f"No --{flag.replace('_', '-')} is named, and {dataset or 'no dataset'} tells it; name it, or a "
                "prepared dataset by --dataset."
            )
    batch = config.batch_size
    codec = (
        open_video_codec(config.vae, dct_channels=dit.latent_channels, batch_size=batch)
        if config.vae
        else reopen_video_codec(described["video"], batch_size=batch)
    )
    text = (
        open_text_encoder(config.text_encoder, word_width=dit.text_width, batch_size=batch)
        if config.text_encoder
        else reopen_text_encoder(described["text"], batch_size=batch)
    )
    frames, rows, columns = (
        getattr(config, name) or settings.get(name, default)
        for name, default in (("num_frames", 81), ("height", 480), ("width", 832))
    )
    return codec, text, (frames, rows, columns)


def _dataset_fps(run: Config, config: GenerateConfig) -> float:
    """Returns the frames a second of the dataset's clips, or 16 where no dataset is named or the run's is elsewhere."""
    if config.dataset:
        return clip_fps(config.dataset)
    here = bool(run.data.path) and (epath.Path(run.data.path) / MANIFEST).exists()
    return clip_fps(run.data.path) if here else WAN_FPS


def _check_fit(model: ModelConfig, codec: VideoCodec, text: TextEncoder, size: tuple[int, int, int]) -> None:
    """Checks that the model fits the encoders and the size of videos.

    Raises:
      ValueError: channels, text width or size don't fit.
    """
    dit = model.dit
    for what, found, expected in (
        ("The codec's channels are", codec.channels, dit.latent_channels),
        ("The text encoder's width is", text.width, dit.text_width),
    ):
        if found != expected:
            raise ValueError(
                f"{what} {found}, but the model was made for {expected}; name the encoders it was made for."
            )
    _, *patch = dit.patch_size
    for name, pixels, cells in (("height", size[1], patch[0]), ("width", size[2], patch[1])):
        if pixels % (cells * codec.stride):
            raise ValueError(f"The {name} is {pixels}; it must be a multiple of {cells * codec.stride} pixels.")


def generate(requests: Sequence[Request], out: Path, generator: Generator) -> list[dict[str, Any]]:
    """Samples a video for each request into a folder, except those that are there and were made in the same way.

    Args:
      requests: what to sample.
      out: the folder, created if it does not exist.
      generator: weights, encoders and settings.

    Returns:
      The entries of samples.json, in the order of the requests.

    Raises:
      ValueError: a reference can't be read, or the folder has a samples.json that is not JSON.
      OSError: the folder can't be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    entries = {request.id: describe_sample(request, generator.made) for request in requests}
    done = find_done(out, list(entries.values()))
    todo = [request for request in requests if request.id not in done]
    most_references = max((len(request.references) for request in todo), default=0)
    size = -(-generator.generate.batch_size // generator.mesh.size) * generator.mesh.size
    with tqdm(total=len(requests), initial=len(requests) - len(todo), unit="video", desc="sample") as bar:
        for start in range(0, len(todo), size):
            part = todo[start : start + size]
            latents, references = draw(part, size, most_references, generator)
            for request, images in zip(part, references, strict=True):
                write_references(out, request.id, images)
            paths = [out / entries[request.id]["video"] for request in part]
            write_latents(paths, latents, generator.codec, generator.generate.fps)
            done |= {request.id: entries[request.id] for request in part}
            bar.update(len(part))
            write_samples(out, list(done.values()))
    finished = [done[request.id] for request in requests]
    write_samples(out, finished)
    return finished


def draw(
    requests: Sequence[Request], size: int, most_references: int, generator: Generator
) -> tuple[Float[np.ndarray, "B F H W C"], list[UInt8[np.ndarray, "R h w 3"]]]:
    """Samples a batch of videos.

    Args:
      requests: one per video, at most `size`.
      size: the batch is filled up to this size with its last request, so that all batches share one program.
      most_references: R, for the same reason; at least what each request has.
      generator: weights, encoders and settings.

    Returns:
      The normalised latents of each request's video, and its references on white, RGB.

    Raises:
      ValueError: a reference can't be read.
    """
    codec, (frames, rows, columns) = generator.codec, generator.size
    F, H, W, C = (frames - 1) // 4 + 1, rows // codec.stride, columns // codec.stride, codec.channels
    images = [
        np.array([load_reference(r, rows, columns) for r in request.references], np.uint8).reshape(-1, rows, columns, 3)
        for request in requests
    ]
    references = np.zeros((len(requests), max(most_references, 1), H, W, C), np.float32)
    for row, image in zip(references, images, strict=True):
        row[: len(image)] = encode_references(image, codec)
    num_references = np.array([len(image) for image in images], np.int32)
    text = _embed([request.prompt for request in requests], generator)
    negative = _embed([generator.generate.negative_prompt], generator).repeat(len(requests), axis=0)
    seed = generator.generate.seed
    noise = np.stack([random_of(r.id, seed).standard_normal((F, H, W, C), np.float32) for r in requests])
    filled = np.minimum(np.arange(size), len(requests) - 1)
    inputs = [x[filled] for x in (noise, text, negative, references, num_references)]
    with jax.set_mesh(generator.mesh):
        start, prompt_text, negative_text, *given = to_devices(inputs, generator.mesh)
        drawn = sample(
            generator.params,
            start,
            Condition(prompt_text, *given),
            Condition(negative_text, *given),
            dit=generator.config.model.dit,
            config=generator.config.sampling,
        )
    return np.asarray(drawn)[: len(requests)], images


def _embed(prompts: Sequence[str], generator: Generator) -> Float[np.ndarray, "B S text_width"]:
    """Embeds prompts as the loader gives them to training: cut, or padded with zeros, to `data.text_length`."""
    text = np.zeros((len(prompts), generator.config.data.text_length, generator.text.width), np.float32)
    for row, embedding in zip(text, generator.text.encode(prompts), strict=True):
        used = min(len(embedding), len(row))
        row[:used] = embedding[:used]
    return text
