"""Prompts and reference images to videos: the body of tools/sample.py.

    {"id": "walk", "prompt": "A cat walks over grass.",
     "references": [{"image": "cat.png", "subject": "cat", "mask": "cat_mask.png"}]}

one such object a line; id, subject and mask may be left out, and paths are relative to the folder of the file. A line
becomes <id>.mp4, its references as the model saw them <id>-reference-0.png and so on, and an entry of samples.json. The
noise of a video depends on the seed and its id alone, so that neither the other lines nor their order change it. What a
folder holds already, made in the same way, is not made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from refalign_jax.config import Config, GenerateConfig, MeshConfig, ModelConfig
from refalign_jax.config.recipe import from_dict
from refalign_jax.convert.checkpoint import find_checkpoint, read_json
from refalign_jax.convert.files import open_weights
from refalign_jax.convert.infer import infer_config
from refalign_jax.convert.load import initial_params
from refalign_jax.data.json_lines import check_fields, check_text, read_lines
from refalign_jax.data.manifest import read_manifest
from refalign_jax.data.records import Reference
from refalign_jax.data.references import load_reference
from refalign_jax.data.sources.jsonl import parse_references
from refalign_jax.data.video import to_float, to_pixels, write_video
from refalign_jax.encoders.open import (
    TextEncoder,
    VideoCodec,
    open_text_encoder,
    open_video_codec,
    reopen_text_encoder,
    reopen_video_codec,
)
from refalign_jax.initial import model_shapes
from refalign_jax.sampling import sample
from refalign_jax.sharding import make_mesh, state_sharding, to_devices
from refalign_jax.types import Float, Params

SAMPLES = "samples.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One video that is asked for."""

    id: str
    """Its name; unique among those asked for together."""
    prompt: str
    references: tuple[Reference, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator:
    """All that turns requests into videos."""

    params: Params
    """Of the transformer."""
    config: Config
    """Of the run or, of published weights, one that fits them; its `sampling` is what is asked for."""
    weights: str
    """Where the parameters are from."""
    codec: VideoCodec
    text: TextEncoder
    size: tuple[int, int, int]
    """Frames, rows and columns of a video in pixels."""
    generate: GenerateConfig
    mesh: jax.sharding.Mesh

    @property
    def made(self) -> dict[str, Any]:
        """What decides a video beside prompt and references, as JSON."""
        return {
            "weights": self.weights,
            "encoders": {"video": self.codec.describe(), "text": self.text.describe()},
            "size": list(self.size),
            "sampling": dataclasses.asdict(self.config.sampling),
            "negative_prompt": self.generate.negative_prompt,
            "seed": self.generate.seed,
        }


def read_requests(path: str | Path) -> list[Request]:
    """Reads a JSONL file of prompts and references, in the form that this module describes.

    Raises:
      ValueError: no such file, no line in it, a line that is not in this form, or an id that is there twice.
    """
    path = Path(path)
    requests: dict[str, Request] = {}
    for number, fields in read_lines(path):
        where = f"{path}, line {number}"
        check_fields(fields, {"prompt": True, "references": False, "id": False}, where)
        check_text(fields["prompt"], "prompt", where, empty=True)
        name = fields.get("id", f"{number:04d}")
        check_text(name, "id", where)
        if name in requests or Path(name).name != name or name.startswith("."):
            raise ValueError(f"{where}: id is {name!r}; it must be a file's name that no other line has.")
        references = parse_references(fields.get("references", []), where, path.parent)
        requests[name] = Request(id=name, prompt=fields["prompt"], references=references)
    if not requests:
        raise ValueError(f'{path} holds no request; a line is {{"prompt": …, "references": […]}}.')
    return list(requests.values())


def open_generator(weights: str, config: GenerateConfig) -> Generator:
    """Opens parameters and encoders.

    Args:
      weights: a run's folder or one of its checkpoints, a checkpoint of parameters, or published safetensors.
      config: how to sample.

    Raises:
      ValueError: there are no weights, no encoders are named, or they don't fit each other.
    """
    run, source = _read_run(weights, config.ema)
    changes = {name: getattr(config, name) for name in ("num_steps", "shift", "reference_guidance", "text_guidance")}
    sampling = dataclasses.replace(run.sampling, **{name: v for name, v in changes.items() if v is not None})
    run = dataclasses.replace(run, sampling=sampling)
    codec, text, size = _open_encoders(run, config)
    _check_fit(run.model, codec, text, size)
    mesh = make_mesh(MeshConfig(fsdp=config.fsdp))
    shapes = {"dit": model_shapes(run.model)["dit"]}
    placed = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, jnp.dtype(config.weights_dtype), sharding=sharding),
        shapes,
        state_sharding(shapes, mesh),
    )
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
    """The configuration of a run, or one around the model of other weights; and which weights these are."""
    if not weights:
        raise ValueError("No weights are named; give a run's folder, a checkpoint, or published safetensors.")
    if Path(weights).suffix in (".safetensors", ".json") or any(Path(weights).glob("*.safetensors*")):
        opened = open_weights(weights)
        model, _ = infer_config(opened.shapes, opened.source)
        return Config(model=model), opened.source
    folder, item = find_checkpoint(weights, ema)
    values = read_json(folder, "config")
    if "model" in values:
        return from_dict(Config, values, str(folder)), f"{folder}/{item}"
    return Config(model=from_dict(ModelConfig, values, str(folder))), f"{folder}/{item}"


def _open_encoders(run: Config, config: GenerateConfig) -> tuple[VideoCodec, TextEncoder, tuple[int, int, int]]:
    """Codec, text encoder and size of a video: what the flags name, the rest as the dataset has it."""
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


def _check_fit(model: ModelConfig, codec: VideoCodec, text: TextEncoder, size: tuple[int, int, int]) -> None:
    """Compares the model's sizes with the encoders'.

    Raises:
      ValueError: channels, text width or the size of a video don't fit.
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
    """Samples a video for each request into a folder, passing over those that are there, made in the same way.

    Returns:
      The entries of samples.json, in the order of the requests.

    Raises:
      ValueError: a reference can't be read, or the folder holds a samples.json that is no list.
      OSError: the folder can't be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = {entry["id"]: entry for entry in read_samples(out)}
    entries = {request.id: _entry(request, generator) for request in requests}
    todo = []
    for request in requests:
        before, entry = found.get(request.id), entries[request.id]
        if before is not None and before | entry == before and (out / entry["video"]).exists():
            entries[request.id] = before
        else:
            found.pop(request.id, None)
            todo.append(request)
    step = -(-generator.generate.batch_size // generator.mesh.size) * generator.mesh.size
    with tqdm(total=len(requests), initial=len(requests) - len(todo), unit="video", desc="sample") as bar:
        for start in range(0, len(todo), step):
            part = todo[start : start + step]
            for request, frames, references in _draw(part, step, max(len(r.references) for r in todo), generator):
                for number, image in enumerate(references):
                    Image.fromarray(image).save(out / f"{request.id}-reference-{number}.png")
                write_video(out / f"{request.id}.mp4", frames, generator.generate.fps)
                found[request.id] = entries[request.id]
                bar.update()
            write_samples(out, list(found.values()))
    write_samples(out, list(entries.values()))
    return list(entries.values())


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The entries of a folder's samples.json; none where there is no such file.

    Raises:
      ValueError: it is not JSON.
    """
    path = folder / SAMPLES
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; remove it.") from error


def write_samples(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Writes a folder's samples.json, whole or not at all."""
    partial = folder / f".{SAMPLES}.{os.getpid()}.partial"
    partial.write_text(json.dumps(entries, indent=1, ensure_ascii=False), encoding="utf-8")
    partial.replace(folder / SAMPLES)


def _entry(request: Request, generator: Generator) -> dict[str, Any]:
    """What samples.json says of a request once its files are there."""
    references = [
        {"image": f"{request.id}-reference-{number}.png"}
        | ({} if reference.subject is None else {"subject": reference.subject})
        | {"source": str(reference.path)}
        for number, reference in enumerate(request.references)
    ]
    return {
        "id": request.id,
        "prompt": request.prompt,
        "video": f"{request.id}.mp4",
        "references": references,
        "made": generator.made,
    }


def _draw(
    requests: Sequence[Request], size: int, most_references: int, generator: Generator
) -> Iterator[tuple[Request, UInt8[np.ndarray, "T h w 3"], UInt8[np.ndarray, "R h w 3"]]]:
    """Samples one batch, filled up to `size` with its last request; yields each request's video and references."""
    config, codec = generator.config, generator.codec
    padded = [*requests, *[requests[-1]] * (size - len(requests))]
    frames, rows, columns = generator.size
    images = [
        np.array([load_reference(r, rows, columns) for r in request.references], np.uint8).reshape(-1, rows, columns, 3)
        for request in requests
    ]
    H, W, C = rows // codec.stride, columns // codec.stride, codec.channels
    latents = np.zeros((size, max(most_references, 1), H, W, C), np.float32)
    for row, image in zip(latents, images, strict=False):
        if len(image):
            row[: len(image)] = codec.encode(to_float(image)[:, None])[:, 0]
    latents[len(requests) :] = latents[len(requests) - 1]
    counts = np.array([len(request.references) for request in padded], np.int32)
    text = _embed([request.prompt for request in padded], generator)
    negative = _embed([generator.generate.negative_prompt] * size, generator)
    noise = np.stack(
        [_noise(request.id, generator.generate.seed, ((frames - 1) // 4 + 1, H, W, C)) for request in padded]
    )
    with jax.set_mesh(generator.mesh):
        drawn = sample(
            generator.params,
            *to_devices((noise, text, negative, latents, counts), generator.mesh),
            dit=config.model.dit,
            config=config.sampling,
        )
    videos = to_pixels(codec.decode(np.asarray(drawn)[: len(requests)]))
    yield from zip(requests, videos, images, strict=True)


def _embed(prompts: Sequence[str], generator: Generator) -> Float[np.ndarray, "B S text_width"]:
    """Embeds prompts as training's loader has them: cut and filled with zeros to the model's length."""
    text = np.zeros((len(prompts), generator.config.data.text_length, generator.text.width), np.float32)
    for row, embedding in zip(text, generator.text.encode(prompts), strict=True):
        used = min(len(embedding), len(row))
        row[:used] = embedding[:used]
    return text


def _noise(id: str, seed: int, shape: tuple[int, ...]) -> Float[np.ndarray, "F H W C"]:
    """Standard normal noise of one video."""
    digest = hashlib.sha256(id.encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, np.uint32).tolist()]).standard_normal(shape, np.float32)
