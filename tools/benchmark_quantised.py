"""Measures what quantised weights change: the relative error of velocities, of sampled latents and of embeddings.

    python tools/benchmark_quantised.py
    python tools/benchmark_quantised.py --weights runs/demo/seed-0 --samples runs/demo/seed-0/samples

The first takes random weights: two blocks of the 1.3B and of the 14B transformer and of UMT5-XXL, at full width. The
second takes trained weights, and the prompts and references of a folder that tools/sample.py or a run wrote. All
compute in float32, beside float32 weights; weights in bfloat16 are measured too, for comparison.
"""

from __future__ import annotations

from refalign_jax.command import run

# isort: split
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from refalign_jax.config import (
    DiTConfig,
    GenerateConfig,
    QuantisedDType,
    SamplingConfig,
    WeightsDType,
    wan_1_3b,
    wan_14b,
)
from refalign_jax.models import umt5
from refalign_jax.models.condition import Condition
from refalign_jax.models.quantise import quantise, shared_axis
from refalign_jax.models.transformer import init_params, velocity
from refalign_jax.sampling import noise_levels, sample
from refalign_jax.trees import flatten, unflatten
from refalign_jax.types import Params

if TYPE_CHECKING:
    from refalign_jax.drawing import Inputs

DTYPES: tuple[WeightsDType, ...] = ("bfloat16", *get_args(QuantisedDType))
STEPS = (0.0, 0.5, 1.0)
"""Where of the sampler's steps velocities are compared: at the first, in the middle, at the last."""


def benchmark_quantised(*, weights: str = "", samples: str = "", videos: int = 6) -> None:
    """Prints the errors.

    Args:
      weights: as in `tools/sample.py`; empty for random weights.
      samples: folder with samples.json.
      videos: how many of its videos are sampled.
    """
    if bool(weights) != bool(samples):
        raise ValueError("--weights and --samples belong together; name both, or neither for random weights.")
    if weights:
        _trained(weights, Path(samples), videos)
        return
    _random("1.3B, 2 blocks", dataclasses.replace(wan_1_3b(), num_layers=2, compute_dtype="float32"))
    _random("14B, 2 blocks", dataclasses.replace(wan_14b(), num_layers=2, compute_dtype="float32"))
    _random_text()


def _trained(weights: str, samples: Path, videos: int) -> None:
    """Samples videos with each dtype of the weights, and compares velocities along the way of float32."""
    from refalign_jax.data.records import Reference
    from refalign_jax.drawing import Inputs, stack
    from refalign_jax.inference.draw import embed, noise_of, references_of
    from refalign_jax.inference.opening import open_generator
    from refalign_jax.inference.outputs import read_samples
    from refalign_jax.inference.references import prepare_references
    from refalign_jax.inference.requests import Request

    requests = [
        Request(
            id=entry["id"],
            prompt=entry["prompt"],
            references=tuple(Reference(path=samples / about["image"]) for about in entry["references"]),
        )
        for entry in read_samples(samples)[:videos]
    ]
    if not requests:
        raise ValueError(f"--samples {samples} has no samples.json, or --videos is 0; name a folder of samples.")
    generator = open_generator(weights, GenerateConfig(dtype="float32", weights_dtype="float32"))
    text, inputs = embed(requests, generator), dict[str, Inputs]()
    for request in requests:
        images = prepare_references(request.references, generator.size[1:], None)
        references = references_of(request, images, generator)
        inputs[request.id] = stack([Inputs(noise_of(request, generator), *text[request.id], references)], 1)
    config, dit = generator.config.sampling, generator.config.model.dit
    paths = {id: _path(generator.transformer(), one, dit, config, generator.mesh) for id, one in inputs.items()}
    times = 1000 * noise_levels(config)
    places = [round(step * (config.num_steps - 1)) for step in STEPS]

    def velocities(params: Params, id: str) -> list[np.ndarray]:
        condition = Condition(*(jnp.asarray(x) for x in (inputs[id].prompt, inputs[id].references) if x is not None))
        return [_velocity(params, dit, paths[id][i], jnp.full(1, times[i], jnp.float32), condition) for i in places]

    exact = {id: velocities(generator.transformer(), id) for id in inputs}
    for dtype in DTYPES:
        other = open_generator(weights, GenerateConfig(dtype="float32", weights_dtype=dtype)).transformer()
        pairs = [pair for id in inputs for pair in zip(velocities(other, id), exact[id], strict=True)]
        ends = [(_path(other, one, dit, config, generator.mesh)[-1], paths[id][-1]) for id, one in inputs.items()]
        _report(
            f"{weights}, {len(inputs)} videos, {config.num_steps} steps", dtype, {"velocity": pairs, "latents": ends}
        )


def _path(params: Params, one: Inputs, dit: DiTConfig, config: SamplingConfig, mesh: Any) -> list[np.ndarray]:
    """The latents before each step, and the sampled ones."""
    from refalign_jax.drawing import denoise

    return [one.noise, *map(np.asarray, denoise(params, one, dit=dit, config=config, mesh=mesh))]


@functools.partial(jax.jit, static_argnums=1)
def _velocity(params: Params, dit: DiTConfig, x: Any, t: Any, condition: Condition) -> Any:
    return velocity(params, dit, x, t, condition)


def _random(name: str, dit: DiTConfig) -> None:
    """Compares at random weights, the head's among them, over four guided steps of a small video."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(np.asarray, init_params(dit, jax.random.key(0)))
    params["head"]["linear"]["kernel"] = rng.normal(0, 0.02, params["head"]["linear"]["kernel"].shape).astype("float32")

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    noise, references = normal(1, 2, 8, 8, dit.latent_channels), normal(1, 1, 8, 8, dit.latent_channels)
    prompt, negative = (Condition(normal(1, 16, dit.text_width), references) for _ in range(2))
    config = SamplingConfig(num_steps=4)

    def results(params: Params) -> dict[str, np.ndarray]:
        v = _velocity(params, dit, noise, jnp.full(1, 500.0), prompt)
        latents = sample(params, noise, prompt, negative, dit=dit, config=config)
        return {"velocity": np.asarray(v), "latents": np.asarray(latents)}

    exact = results(params)
    for dtype in DTYPES:
        found = results(_held(params, dtype))
        _report(name, dtype, {key: [(found[key], exact[key])] for key in exact})


def _random_text() -> None:
    """Compares embeddings of two blocks of UMT5-XXL with a small vocabulary."""
    config = umt5.UMT5Config(vocab_size=4096, num_layers=2, compute_dtype="float32")
    params = jax.tree.map(np.asarray, umt5.init(config, jax.random.key(0)))
    query = params["blocks"]["query"]["kernel"]  # T5 divides it by √K when it draws it, since scores are not scaled
    params["blocks"]["query"]["kernel"] = query / np.sqrt(config.attention_width // config.num_heads)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, 32), np.int32)
    exact = umt5.encode(params, ids, np.ones_like(ids), config)
    for dtype in DTYPES:
        found = umt5.encode(_held(params, dtype), ids, np.ones_like(ids), config)
        _report("UMT5-XXL, 2 blocks", dtype, {"embeddings": [(np.asarray(found), np.asarray(exact))]})


def _held(params: Params, dtype: WeightsDType) -> dict[str, Any]:
    """The parameters as a dtype of the weights holds them: bfloat16 all, the others those that are quantised."""
    if dtype not in get_args(QuantisedDType):
        return jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), dict(params))
    held = {}
    for path, x in flatten(params).items():
        axis = shared_axis(path)
        held[path] = x if axis is None else quantise(x, dtype, axis)  # type: ignore[arg-type]
    return unflatten(held)


def _report(name: str, dtype: str, pairs: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]) -> None:
    """Prints the mean and the largest relative error of each kind."""
    words = []
    for kind, both in pairs.items():
        errors = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in both]
        most = f" (at most {max(errors):.2%})" if len(errors) > 1 else ""
        words.append(f"{kind} {np.mean(errors):.2%}{most}")
    print(f"{name}, weights in {dtype}: {', '.join(words)}", flush=True)


def main(arguments: list[str], prog: str) -> None:
    """Parses and measures."""
    tyro.cli(benchmark_quantised, args=arguments, prog=prog, description=__doc__)


if __name__ == "__main__":
    run(main)
