"""Opens weights and encoders for sampling: names, shapes and settings. Numbers are read when they are needed.

A folder of Wan2.1, or a pipeline of diffusers, holds all three networks, and then it is all that has to be named.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from refalign_jax import remote
from refalign_jax.config import (
    WAN_NEGATIVE_PROMPT,
    Config,
    DiTConfig,
    GenerateConfig,
    MeshConfig,
    ModelConfig,
    SamplingConfig,
    SigmaTable,
)
from refalign_jax.config.recipe import from_dict
from refalign_jax.convert.checkpoint import find_checkpoint, open_params, read_json
from refalign_jax.convert.hub import find_weights
from refalign_jax.convert.infer import open_transformer
from refalign_jax.convert.load import find_published, initial_params, is_checkpoint
from refalign_jax.convert.lora import Adapter, merge, open_adapter
from refalign_jax.convert.quantise import place_quantised
from refalign_jax.data.manifest import MANIFEST, read_manifest
from refalign_jax.data.shards import WAN_FPS, clip_fps
from refalign_jax.digests import Digests, digest_json
from refalign_jax.encoders.interface import TextEncoder, VideoCodec
from refalign_jax.encoders.network import Resident
from refalign_jax.encoders.open import (
    open_text_encoder,
    open_video_codec,
    reopen_text_encoder,
    reopen_video_codec,
    weights_digests,
)
from refalign_jax.inference.background import CutOut, open_cut_out
from refalign_jax.inference.tensors import Given, open_given
from refalign_jax.initial import model_shapes
from refalign_jax.sampling import guided_steps
from refalign_jax.sharding import check_heads, make_mesh, place_shapes
from refalign_jax.types import Params

_ENCODER_FILES = {"vae": ("Wan2.1_VAE.pth", "vae"), "text_encoder": ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder")}
"""How a folder of Wan2.1 or diffusers names its encoders."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator:
    """Everything that turns requests into videos."""

    transformer: Resident
    """The transformer's parameters, read when they are needed."""
    config: Config
    """The run's configuration or, for published weights, defaults around their model; `sampling` in it is used."""
    weights: str
    """Where the parameters are from, in words."""
    weights_path: str
    """The file or folder that holds them."""
    codec: VideoCodec
    text: TextEncoder | None
    """None where embeddings are given, and no encoder is named."""
    size: tuple[int, int, int]
    """Frames, rows and columns of a video in pixels."""
    generate: GenerateConfig
    """What was asked for; frame rate, negative prompt and the dtype of the weights are filled in."""
    mesh: jax.sharding.Mesh
    """The devices of this process."""
    adapters: tuple[Adapter, ...] = ()
    """What is merged into the transformer."""
    given: Given = dataclasses.field(default_factory=Given)
    """Noise and embeddings from files."""
    cut_out: CutOut | None = None
    """Removes the background of references; None for not at all."""

    @property
    def made(self) -> dict[str, Any]:
        """Everything that decides a video beside prompt, references and contents of files, as JSON."""
        encoders = {"video": self.codec.describe()} | ({"text": self.text.describe()} if self.text else {})
        made: dict[str, Any] = {
            "weights": self.weights,
            "encoders": encoders,
            "model": digest_json(dataclasses.asdict(self.config.model)),
            "weights_dtype": self.generate.weights_dtype,
            "text_length": self.config.data.text_length,
            "size": list(self.size),
            "fps": self.generate.fps,
            "sampling": dataclasses.asdict(self.config.sampling),
            "negative_prompt": self.generate.negative_prompt,
            "seed": self.generate.seed,
        }
        if self.adapters:
            made["lora_scale"] = [adapter.strength for adapter in self.adapters]
        if self.cut_out:
            made["background"] = self.cut_out.describe()
        return made

    def digests(self, digests: Digests) -> dict[str, str]:
        """Digests of all files that decide a video, by what they are.

        Raises:
          ValueError, OSError: one can't be read.
        """
        places = {f"lora_{number}": adapter.path for number, adapter in enumerate(self.adapters)}
        places |= {name: path for name in ("noise", "embeddings") if (path := getattr(self.generate, name))}
        described = {"weights": {"path": self.weights_path}, **self.made["encoders"]}
        described |= {name: {"path": path} for name, path in places.items()}
        found = weights_digests(described, digests)
        return {name: found[name] for name in sorted(found)}

    def release(self) -> None:
        """Frees the memory of all networks, unless they are to be kept."""
        if not self.generate.keep_loaded:
            self.transformer.release()
            self.codec.release()
            if self.text:
                self.text.release()


def open_generator(weights: str, config: GenerateConfig) -> Generator:
    """Opens parameters and encoders.

    Args:
      weights: a run's folder or one of its checkpoints, a checkpoint of parameters, published weights in any form that
        `tools/convert.py import` reads, a folder of Wan2.1 or of diffusers with all three networks, or a hub id.
      config: how to sample; what it leaves open is as the run or its dataset has it.

    Raises:
      ValueError: there are no weights, no encoders are named, they don't fit each other, an adapter doesn't fit, or the
        devices can't be split as asked.
    """
    weights = find_weights(weights)
    run, source, path = _read_run(weights, config)
    run = _settle(run, config)
    mesh = _open_mesh(config, run.model.dit)
    dtype = config.weights_dtype or config.dtype or "float32"
    config = dataclasses.replace(config, fps=config.fps or _dataset_fps(run, config), weights_dtype=dtype)
    codec, text, size = _open_encoders(run, _with_encoders_beside(weights, run, config))
    _check_fit(run.model, codec, text, size)
    if config.negative_prompt is None:
        published = text is None or text.describe()["name"] != "words"  # what hashes words knows no Chinese
        config = dataclasses.replace(config, negative_prompt=WAN_NEGATIVE_PROMPT if published else "")
    strengths = config.lora_scale or (1.0,) * len(config.lora)
    adapters = tuple(
        open_adapter(find_weights(name), strength, run.model.dit)
        for name, strength in zip(config.lora, strengths, strict=True)
    )
    held = (config.dtype or "float32") if config.quantised else dtype  # what is not quantised
    placed = place_shapes({"dit": model_shapes(run.model)["dit"]}, mesh, jnp.dtype(held))
    if not is_checkpoint(weights):
        find_published(weights, run.model, placed)  # what does not fit is found before minutes have passed
    read = functools.partial(_read_transformer, weights, config, run.model, placed, adapters)
    return Generator(
        transformer=Resident(read),
        config=run,
        weights=source,
        weights_path=path,
        codec=codec,
        text=text,
        size=size,
        generate=config,
        mesh=mesh,
        adapters=adapters,
        given=open_given(config.noise, config.embeddings),
        cut_out=open_cut_out(config.remove_background),
    )


def _open_mesh(config: GenerateConfig, dit: DiTConfig) -> jax.sharding.Mesh:
    """This process's devices: tokens are split over the context axis, videos over the others.

    Raises:
      ValueError: what is asked for does not divide the devices, or the heads.
    """
    devices, parts = jax.local_devices(), config.fsdp * config.context
    if len(devices) % parts:
        raise ValueError(
            f"--fsdp {config.fsdp} times --context {config.context} is {parts}; it must divide the number of this "
            f"process's devices, {len(devices)}."
        )
    if dit.num_heads % config.context:
        raise ValueError(f"--context {config.context} must divide the transformer's {dit.num_heads} heads.")
    mesh = make_mesh(MeshConfig(fsdp=config.fsdp, context=config.context), devices)
    check_heads(dit, mesh)
    return mesh


def _read_transformer(
    weights: str, config: GenerateConfig, model: ModelConfig, placed: Params, adapters: Sequence[Adapter]
) -> Params:
    """Reads the transformer's parameters, merges adapters into them, and quantises them if asked to."""
    key, verify = jax.random.key(0), config.verify_checkpoint
    if config.quantised:
        published = not is_checkpoint(weights)
        stored = find_published(weights, model, placed) if published else open_params(weights, config.ema, verify)[0]
        return place_quantised(stored["dit"], placed["dit"], config.quantised, adapters)
    params, _ = initial_params(weights, config.ema, model, placed, key, verify=verify)
    return merge(params["dit"], adapters) if adapters else params["dit"]


def _read_run(weights: str, config: GenerateConfig) -> tuple[Config, str, str]:
    """Returns the run's configuration, or defaults around the model of other weights; the weights in words; and where.

    Where an index names the weights, that is its folder.
    """
    if not weights:
        raise ValueError("No weights are named; give a run's folder, a checkpoint, or published safetensors.")
    if not is_checkpoint(weights):
        if config.ema:
            raise ValueError(f"--ema: {weights} is no training checkpoint, so it has no moving average.")
        opened = open_transformer(weights, config.num_heads)
        place = str(Path(weights).parent) if weights.endswith(".json") else weights
        return Config(model=opened.config), opened.tensors.source, place
    folder, item = find_checkpoint(weights, config.ema)
    values, path = read_json(folder, "config", config.verify_checkpoint), f"{folder}/{item}"
    if "model" in values:
        return from_dict(Config, values, str(folder)), path, path
    return Config(model=from_dict(ModelConfig, values, str(folder))), path, path


def _settle(run: Config, config: GenerateConfig) -> Config:
    """The run's configuration with what was asked for. Phantom-Wan is sampled as it publishes, unless a run differs.

    Raises:
      ValueError: noise levels can't be read or don't fit the number of steps, or guidance applies in no step.
    """
    dit, sampling = run.model.dit, run.sampling
    if config.dtype:
        dit = dataclasses.replace(dit, compute_dtype=config.dtype)
    if config.phantom:
        dit = dataclasses.replace(dit, reference_cross_attention=True)
        if sampling == SamplingConfig():
            sampling = dataclasses.replace(sampling, solver="unipc", sigmas="wan", integer_timesteps=True)
    names = ["solver", "num_steps", "shift", "integer_timesteps", "reference_guidance", "text_guidance"]
    names += ["guidance_interval", "cache_threshold", "batched_guidance"]
    changes = {name: value for name in names if (value := getattr(config, name)) is not None}
    if config.sigmas in typing.get_args(SigmaTable):
        changes |= {"sigmas": config.sigmas, "sigma_values": ()}
    elif config.sigmas is not None:
        values = read_sigmas(config.sigmas)
        if config.num_steps not in (None, len(values)):
            raise ValueError(
                f"{config.sigmas} lists {len(values)} noise levels, but --num-steps is {config.num_steps}."
            )
        changes |= {"sigma_values": values, "num_steps": len(values)}
    sampling = dataclasses.replace(sampling, **changes)
    guided_steps(sampling)  # an interval without noise levels is found before minutes have passed
    return dataclasses.replace(run, model=dataclasses.replace(run.model, dit=dit), sampling=sampling)


def read_sigmas(path: str) -> tuple[float, ...]:
    """Reads noise levels from a JSON file: a list of numbers from at most 1 to above 0; a last 0 may follow.

    Raises:
      ValueError: no such file, or another content.
    """
    known = ", ".join(typing.get_args(SigmaTable))
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        numbers = tuple(float(value) for value in values)
    except OSError as error:
        raise ValueError(f"--sigmas {path} is neither a table ({known}) nor a file ({error.strerror}).") from error
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} is no JSON list of noise levels: {error}.") from error
    numbers = numbers[:-1] if numbers and numbers[-1] == 0 else numbers
    if not numbers:
        raise ValueError(f"{path} lists no noise level; give a JSON list such as [1.0, 0.9, 0.7].")
    try:
        SamplingConfig(num_steps=len(numbers), sigma_values=numbers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return numbers


def _with_encoders_beside(weights: str, run: Config, config: GenerateConfig) -> GenerateConfig:
    """The configuration with encoders that lie with published weights, where neither it nor a dataset names others.

    Hub ids are replaced by folders.
    """
    found: dict[str, str] = {}
    folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
    dataset = run.data.path if config.dataset is None else config.dataset
    for flag, names in _ENCODER_FILES.items():
        named = getattr(config, flag)
        if named:
            found[flag] = find_weights(named)
        elif not dataset and any((folder / name).exists() for name in names):
            found[flag] = str(folder)
    return dataclasses.replace(config, **found)  # type: ignore[arg-type]


def _open_encoders(run: Config, config: GenerateConfig) -> tuple[VideoCodec, TextEncoder | None, tuple[int, int, int]]:
    """Opens codec and text encoder, and chooses the size of videos: as configured, the rest as the dataset has it."""
    dataset = run.data.path if config.dataset is None else config.dataset
    dit, made = run.model.dit, dict[str, Any]()
    if dataset and not (config.vae and config.text_encoder and config.height and config.width and config.num_frames):
        made = dict(read_manifest(dataset).made)
    described, settings = made.get("encoders", {}), made.get("settings", {})
    flags = [("video", "vae"), ("text", "text_encoder")]
    without_text = bool(config.embeddings) and not config.text_encoder and "text" not in described
    for name, flag in flags[: 1 if without_text else 2]:
        if not getattr(config, flag) and not isinstance(described.get(name), dict):
            raise ValueError(
                f"No --{flag.replace('_', '-')} is named, and {dataset or 'no dataset'} names it; name it, or a "
                "prepared dataset by --dataset."
            )
    _check_weights(dataset, made, [name for name, flag in flags if name in described and not getattr(config, flag)])
    # On CPUs a row's last bits depend on how many rows a product has, so each device encodes one at a time.
    batch = 1 if jax.default_backend() == "cpu" else config.batch_size
    dtype: dict[str, Any] = {"compute_dtype": config.dtype} if config.dtype else {}
    codec = (
        open_video_codec(config.vae, dct_channels=dit.latent_channels, batch_size=batch, **dtype)
        if config.vae
        else reopen_video_codec(described["video"], batch, config.dtype)
    )
    text: TextEncoder | None = None
    if config.text_encoder:
        text = open_text_encoder(
            config.text_encoder, word_width=dit.text_width, batch_size=batch, quantised=config.quantised, **dtype
        )
    elif not without_text:
        text = reopen_text_encoder(described["text"], batch, config.dtype, config.quantised)
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
    return clip_fps(run.data.path) if run.data.path and _is_here(run.data.path) else WAN_FPS


def _is_here(dataset: str) -> bool:
    """Whether a dataset can be read from this machine."""
    try:
        remote.check(dataset)
    except (ValueError, OSError):
        return False
    return (epath.Path(dataset) / MANIFEST).exists()


def _check_fit(model: ModelConfig, codec: VideoCodec, text: TextEncoder | None, size: tuple[int, int, int]) -> None:
    """Checks that the model fits the encoders and the size of videos.

    Raises:
      ValueError: channels, text width or size don't fit.
    """
    dit = model.dit
    for what, found, expected in (
        ("The codec's channels are", codec.channels, dit.latent_channels),
        ("The text encoder's width is", text.width if text else dit.text_width, dit.text_width),
    ):
        if found != expected:
            raise ValueError(
                f"{what} {found}, but the model was made for {expected}; name the encoders it was made for."
            )
    _, *patch = dit.patch_size
    for name, pixels, cells in (("height", size[1], patch[0]), ("width", size[2], patch[1])):
        if pixels % (cells * codec.stride):
            raise ValueError(f"The {name} is {pixels}; it must be a multiple of {cells * codec.stride} pixels.")
