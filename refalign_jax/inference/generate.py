"""Samples videos: opens weights and encoders, then draws a video for each request.

The noise of a video depends on the seed and the request's id alone, so neither the other requests nor their order
change it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import UInt8
from tqdm import tqdm

from refalign_jax.config import MAX_TEXT_LENGTH, Config, GenerateConfig, MeshConfig, ModelConfig
from refalign_jax.config.recipe import from_dict
from refalign_jax.convert.checkpoint import find_checkpoint, read_json
from refalign_jax.convert.infer import open_transformer
from refalign_jax.convert.load import initial_params, is_checkpoint
from refalign_jax.data.manifest import MANIFEST, read_manifest
from refalign_jax.data.records import random_of
from refalign_jax.data.references import encode_references, load_reference
from refalign_jax.data.shards import WAN_FPS, clip_fps
from refalign_jax.data.video import write_latents
from refalign_jax.digests import Digests, digest_json
from refalign_jax.encoders.interface import TextEncoder, VideoCodec
from refalign_jax.encoders.open import (
    open_text_encoder,
    open_video_codec,
    reopen_text_encoder,
    reopen_video_codec,
    weights_digests,
)
from refalign_jax.inference.outputs import (
    describe_sample,
    digest_files,
    file_names,
    read_samples,
    reason_to_make,
    remove_files,
    summarise,
    write_references,
    write_samples,
)
from refalign_jax.inference.requests import Request, check_references
from refalign_jax.initial import model_shapes
from refalign_jax.locks import exclusive
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
    """Where the parameters are from, in words."""
    weights_path: str
    """The file or folder that holds them."""
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
            "model": digest_json(dataclasses.asdict(self.config.model)),
            "weights_dtype": self.generate.weights_dtype,
            "text_length": self.config.data.text_length,
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
    run, source, path = _read_run(weights, config)
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
    params, _ = initial_params(
        weights, config.ema, run.model, placed, jax.random.key(0), verify=config.verify_checkpoint
    )
    return Generator(
        params=params["dit"],
        config=run,
        weights=source,
        weights_path=path,
        codec=codec,
        text=text,
        size=size,
        generate=config,
        mesh=mesh,
    )


def _read_run(weights: str, config: GenerateConfig) -> tuple[Config, str, str]:
    """Returns the run's configuration, or defaults around the model of other weights; the weights in words; and where.

    Where an index names the weights, that is its folder.
    """
    if not weights:
        raise ValueError("No weights are named; give a run's folder, a checkpoint, or published safetensors.")
    if not is_checkpoint(weights):
        opened = open_transformer(weights, config.num_heads)
        place = str(Path(weights).parent) if weights.endswith(".json") else weights
        return Config(model=opened.config), opened.tensors.source, place
    folder, item = find_checkpoint(weights, config.ema)
    values, path = read_json(folder, "config", config.verify_checkpoint), f"{folder}/{item}"
    if "model" in values:
        return from_dict(Config, values, str(folder)), path, path
    return Config(model=from_dict(ModelConfig, values, str(folder))), path, path


def _open_encoders(run: Config, config: GenerateConfig) -> tuple[VideoCodec, TextEncoder, tuple[int, int, int]]:
    """Opens codec and text encoder, and chooses the size of videos: as configured, the rest as the dataset has it."""
    dataset = next(iter(run.data.paths), "") if config.dataset is None else config.dataset
    dit, made = run.model.dit, dict[str, Any]()
    if dataset and not (config.vae and config.text_encoder and config.height and config.width and config.num_frames):
        made = dict(read_manifest(dataset).made)
    described, settings = made.get("encoders", {}), made.get("settings", {})
    flags = (("video", "vae"), ("text", "text_encoder"))
    for name, flag in flags:
        if not getattr(config, flag) and not isinstance(described.get(name), dict):
            raise ValueError(
                f"No --{flag.replace('_', '-')} is named, and {dataset or 'no dataset'} tells it; name it, or a "
                "prepared dataset by --dataset."
            )
    _check_weights(dataset, made, [name for name, flag in flags if not getattr(config, flag)])
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


def _check_weights(dataset: str, made: Mapping[str, Any], names: Sequence[str]) -> None:
    """Checks that encoders of a dataset have the weights with which it was prepared.

    Raises:
      ValueError: they have others now.
    """
    described = {name: made["encoders"][name] for name in names if "path" in made["encoders"][name]}
    if not described or not all(Path(about["path"]).exists() for about in described.values()):
        return  # there are no weights, or their opening says that they are gone
    with Digests(dataset) as digests:
        now = weights_digests(described, digests)
    for name, digest in now.items():
        if made.get("digests", {}).get(name, digest) != digest:
            raise ValueError(
                f"{described[name]['path']} has changed since {dataset} was prepared with it; name the encoder by "
                f"--{'vae' if name == 'video' else 'text-encoder'} to use it all the same."
            )


def _dataset_fps(run: Config, config: GenerateConfig) -> float:
    """Returns the frames a second of the dataset's clips, or 16 where no dataset is named or the run's is elsewhere."""
    if config.dataset:
        return clip_fps(config.dataset)
    trained = next(iter(run.data.paths), "")
    here = bool(trained) and (epath.Path(trained) / MANIFEST).exists()
    return clip_fps(trained) if here else WAN_FPS


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
    """Samples a video for each request into a folder, except those that are there, whole and made of the same inputs.

    It prints how many are kept and how many are made for which reason. Entries of other requests stay.

    Args:
      requests: what to sample.
      out: the folder, created if it does not exist.
      generator: weights, encoders and settings.

    Returns:
      The entries of samples.json, in the order of the requests.

    Raises:
      ValueError: a reference can't be read, a sample is not finite, the folder is in use by another process, or its
        samples.json is not what this function writes.
      OSError: the folder can't be written; finished videos are kept.
    """
    check_references(requests)
    with exclusive(out, "tools/sample.py"), Digests(out) as digests:
        made = generator.made
        files = weights_digests({"weights": {"path": generator.weights_path}, **made["encoders"]}, digests)
        made["digests"] = {name: files[name] for name in sorted(files)}
        wanted = {request.id: describe_sample(request, made, digests) for request in requests}
        entries = {entry["id"]: entry for entry in read_samples(out)}
        reasons = {id: reason_to_make(out, entries.get(id), entry, digests) for id, entry in wanted.items()}
        reasons = {id: reason for id, reason in reasons.items() if reason}
        print(summarise(len(requests), reasons), flush=True)
        entries |= {id: entries[id] | entry for id, entry in wanted.items() if id not in reasons}  # places may be new
        todo = [request for request in requests if request.id in reasons]
        _print_cut(todo, generator)
        _make(todo, wanted, entries, _Folder(out, digests), generator)
        return [entries[request.id] for request in requests]


class _Folder(NamedTuple):
    """A folder of samples."""

    path: Path
    digests: Digests


def _make(
    todo: Sequence[Request],
    wanted: Mapping[str, dict[str, Any]],
    entries: dict[str, dict[str, Any]],
    folder: _Folder,
    generator: Generator,
) -> None:
    """Samples videos and enters them into `entries` and samples.json, batch by batch; a batch is there or is not.

    An entry whose video is to be made again is listed until its batch is there, with digests that no longer hold.
    """
    out, digests = folder
    most_references = max((len(request.references) for request in todo), default=0)
    size = -(-generator.generate.batch_size // generator.mesh.size) * generator.mesh.size
    with tqdm(total=len(wanted), initial=len(wanted) - len(todo), unit="video", desc="sample") as bar:
        for start in range(0, len(todo), size):
            part = todo[start : start + size]
            latents, references = draw(part, size, most_references, generator)
            before = [entries.pop(request.id, {}).get("files") for request in part]
            old = [name for files in before if isinstance(files, dict) for name in files]
            try:
                remove_files(out, old)
                for request, images in zip(part, references, strict=True):
                    write_references(out, request.id, images)
                paths = [out / wanted[request.id]["video"] for request in part]
                write_latents(paths, latents, generator.codec, generator.generate.fps)
                made = {r.id: wanted[r.id] | {"files": digest_files(out, wanted[r.id], digests)} for r in part}
                write_samples(out, [*entries.values(), *made.values()])
            except BaseException:
                remove_files(out, (name for request in part for name in file_names(wanted[request.id])))
                raise
            entries |= made
            bar.update(len(part))
    if not todo:
        write_samples(out, list(entries.values()))


def _print_cut(requests: Sequence[Request], generator: Generator) -> None:
    """Names the prompts that are cut at the text length, and how many tokens they lose."""
    if not requests:
        return
    most = min(generator.config.data.text_length, MAX_TEXT_LENGTH)
    prompts = [*((request.id, request.prompt) for request in requests), ("", generator.generate.negative_prompt)]
    counts = generator.text.count_tokens([prompt for _, prompt in prompts])
    for (id, _), count in zip(prompts, counts, strict=True):
        if count > most:
            name = f"The prompt of {id}" if id else "The negative prompt"
            print(f"{name} has {count} tokens; it is cut at {most} and loses {count - most}.", flush=True)


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
      ValueError: a reference can't be read, or a sample is not finite.
    """
    codec, (frames, rows, columns) = generator.codec, generator.size
    F, H, W, C = (frames - 1) // 4 + 1, rows // codec.stride, columns // codec.stride, codec.channels
    images = [
        np.array([load_reference(r, rows, columns).pixels for r in request.references], np.uint8).reshape(
            -1, rows, columns, 3
        )
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
    latents = np.asarray(drawn)[: len(requests)]
    wrong = [r.id for r, video in zip(requests, latents, strict=True) if not np.isfinite(video).all()]
    if wrong:
        raise ValueError(
            f"The sample of {', '.join(wrong)} holds NaN or infinity; the weights {generator.weights} or the guidance "
            f"({generator.config.sampling.reference_guidance:g}, {generator.config.sampling.text_guidance:g}) are at "
            "fault."
        )
    return latents, images


def _embed(prompts: Sequence[str], generator: Generator) -> Float[np.ndarray, "B S text_width"]:
    """Embeds prompts as the loader gives them to training: cut, or padded with zeros, to `data.text_length`."""
    text = np.zeros((len(prompts), generator.config.data.text_length, generator.text.width), np.float32)
    for row, embedding in zip(text, generator.text.encode(prompts), strict=True):
        used = min(len(embedding), len(row))
        row[:used] = embedding[:used]
    return text
