"""Measures what sampling saves, and what it changes: guidance between two noise levels, and the cache of residuals.

    python tools/benchmark_sampling.py runs/demo/seed-0

Held-out examples of a run are drawn in each setting, from the same noise and one video at a time, and compared with the
full computation of the same sampler: forward passes in which the blocks ran, time, relative error of latents, PSNR of
frames. UniPC is compared with Euler too. For a run of the demo, the subjects that are recognised in the videos are
counted. The tables are Markdown.
"""

from refalign_jax.command import OutputFile, run

# isort: split
import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from tyro.conf import Positional, arg

from refalign_jax.config import Config, GenerateConfig, SamplingConfig

SAMPLERS: tuple[tuple[Any, int], ...] = (("euler", 25), ("unipc", 12))
"""Solvers, and the steps that they take."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is measured."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Folder of a run that was trained on a prepared dataset, or one of its checkpoints."""
    videos: int = 16
    """Held-out examples that are drawn."""
    reference_guidance: float = 5.0
    """s_ref, the guidance scale of the references."""
    text_guidance: float = 7.5
    """s_text, the guidance scale of the text."""
    intervals: tuple[tuple[float, float], ...] = ((0.0, 0.99), (0.0, 0.95), (0.3, 1.0), (0.8, 1.0))
    """Values of guidance_interval."""
    thresholds: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3)
    """Values of cache_threshold."""
    json: OutputFile = None
    """File for all figures."""


class Example(NamedTuple):
    """A held-out example.

    Attributes:
      inputs: noise, prompt and negative prompt, as `sampling.sample` takes them.
      truth: frames of the true clip, decoded from its latents.
      scene: what the demo's clip shows; None in other datasets.
    """

    inputs: tuple[Any, Any, Any]
    truth: np.ndarray
    scene: Any


@dataclasses.dataclass(kw_only=True)
class Drawn:
    """The videos of one setting, the forward passes in which blocks ran, and the seconds that each video took."""

    latents: list[np.ndarray] = dataclasses.field(default_factory=list)
    frames: list[np.ndarray] = dataclasses.field(default_factory=list)
    forwards: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)


def settings(given: Arguments, recipe: SamplingConfig) -> dict[tuple[str, str], SamplingConfig]:
    """What is measured, by the sampler and what differs from its full computation."""
    from refalign_jax.sampling import guided_steps

    found: dict[tuple[str, str], SamplingConfig] = {}
    for solver, steps in SAMPLERS:
        full = SamplingConfig(
            solver=solver,
            num_steps=steps,
            shift=recipe.shift,
            reference_guidance=given.reference_guidance,
            text_guidance=given.text_guidance,
        )
        sampler = f"{solver}, {steps} steps"
        found[sampler, "full"] = full
        for interval in given.intervals if full.num_branches(references=True) > 1 else ():
            name = f"`guidance_interval` {interval[0]:g} {interval[1]:g}"
            found[sampler, name] = dataclasses.replace(full, guidance_interval=interval)
            guided_steps(found[sampler, name])
        for threshold in given.thresholds:
            found[sampler, f"`cache_threshold` {threshold:g}"] = dataclasses.replace(full, cache_threshold=threshold)
    return found


def open_examples(config: Config, count: int, codec: Any) -> list[Example]:
    """Reads the first held-out examples."""
    import jax.numpy as jnp

    from refalign_jax.data.shards import ShardSource
    from refalign_jax.demo.scenes import read_scene
    from refalign_jax.drawing import seeded_noise
    from refalign_jax.models.condition import Condition
    from refalign_jax.trainer.preflight import empty_text

    if not 0 < count <= config.data.held_out or not config.data.path:
        raise ValueError(
            f"--videos {count}: the run holds out {config.data.held_out} examples of {config.data.path!r}."
        )
    source = ShardSource(config.data.path)
    first, empty, R = config.data.first_held_out(len(source)), empty_text(config, source), config.data.max_references
    examples = []
    for index in range(first, first + count):
        arrays, about = source[index]
        clip = arrays["video_latents"].astype(np.float32)
        text, references = np.zeros_like(empty)[None], np.zeros((1, R, *clip.shape[1:]), np.float32)
        rows, real = arrays["text"][: len(empty)], arrays["reference_latents"][:R]
        text[0, : len(rows)], references[0, : len(real)] = rows, real
        prompt = Condition(jnp.asarray(text), jnp.asarray(references), jnp.array([len(real)]))
        noise = seeded_noise(about["id"], 0, clip.shape)[None]
        scene = read_scene(about["metadata"]["scene"]) if "scene" in about["metadata"] else None
        inputs = jnp.asarray(noise), prompt, prompt._replace(text=jnp.asarray(empty)[None])
        examples.append(Example(inputs, codec.decode(clip[None])[0], scene))
    return examples


def measure(given: Arguments) -> dict[str, Any]:
    """Draws each video in all settings, in turns; returns the figures of each setting."""
    from tqdm import tqdm

    from refalign_jax.inference.opening import open_generator

    generator = open_generator(given.run, GenerateConfig())
    config, codec, params = generator.config, generator.codec, generator.transformer()
    chosen = settings(given, config.sampling)
    examples = open_examples(config, given.videos, codec)
    for one in tqdm(chosen.values(), desc="compile", unit="setting"):
        draw(params, examples[0].inputs, config, one)
    drawn = {key: Drawn() for key in chosen}
    for example in tqdm(examples, desc="draw", unit="video"):
        for key, one in chosen.items():
            latents, forwards, seconds = draw(params, example.inputs, config, one)
            drawn[key].latents.append(latents)
            drawn[key].frames.append(codec.decode(latents)[0])
            drawn[key].forwards += forwards
            drawn[key].seconds.append(seconds)
    rows: list[dict[str, Any]] = []
    for (sampler, name), videos in drawn.items():
        against = compare(videos, drawn[sampler, "full"])
        rows.append({"sampler": sampler, "setting": name, **against, **recognised(videos.frames, examples)})
    full = [videos for (_, name), videos in drawn.items() if name == "full"]
    return {"rows": rows, "unipc_against_euler": compare(full[1], full[0])}


def draw(
    params: Any, inputs: tuple[Any, Any, Any], config: Config, one: SamplingConfig
) -> tuple[np.ndarray, int, float]:
    """Draws one video: its latents, forward passes in which the blocks ran, and seconds."""
    import jax.numpy as jnp

    from refalign_jax.sampling import advance, begin, num_forwards

    (noise, *conditions), dit, began = inputs, config.model.dit, time.perf_counter()
    state = begin(params, noise, (conditions[0], conditions[1]), dit=dit, config=one)
    steps = jnp.int32(0), jnp.int32(one.num_steps)
    state = advance(params, state, steps, (conditions[0], conditions[1]), dit=dit, config=one)
    latents = np.asarray(state.x)
    seconds = time.perf_counter() - began
    return latents, num_forwards(one, True) if state.cache is None else int(state.cache.runs), seconds


def compare(videos: Drawn, others: Drawn) -> dict[str, float]:
    """Ratios of forward passes and, at the median, of time; relative error of latents; PSNR over all frames."""
    pairs = list(zip(videos.latents, others.latents, strict=True))
    errors = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]
    clipped = [(np.clip(a, -1, 1), np.clip(b, -1, 1)) for a, b in zip(videos.frames, others.frames, strict=True)]
    square = float(np.mean([np.mean(np.square(a - b)) for a, b in clipped]))
    return {
        "forwards": videos.forwards / len(videos.latents),
        "blocks": videos.forwards / others.forwards,
        "time": float(np.median(np.divide(videos.seconds, others.seconds))),
        "error": float(np.mean(errors)),
        "largest_error": max(errors),
        "psnr": 10 * math.log10(4 / square) if square else math.inf,
    }


def recognised(frames: Sequence[np.ndarray], examples: Sequence[Example]) -> dict[str, str]:
    """How many of the requested subjects the demo's score recognises in the videos; nothing for other datasets."""
    from refalign_jax.data.video import to_pixels
    from refalign_jax.demo.score import judge

    if any(example.scene is None for example in examples):
        return {}
    verdicts = [
        verdict
        for video, example in zip(frames, examples, strict=True)
        for verdict in judge(to_pixels(video), to_pixels(example.truth), example.scene)
    ]
    return {"subjects": f"{sum(v.recognised == v.requested for v in verdicts)} of {len(verdicts)}"}


def table(found: Mapping[str, Any]) -> list[str]:
    """The figures as lines of Markdown."""
    lines = [
        "| sampler | setting | forward passes with blocks | time | error of latents | PSNR, dB | subjects right |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        same = row["setting"] == "full"
        error, psnr = ("", "") if same else (f"{row['error']:.3f}", f"{row['psnr']:.1f}")
        passes = f"{row['forwards']:.1f} ({row['blocks']:.2f})"
        cells = (row["sampler"], row["setting"], passes, f"{row['time']:.2f}", error, psnr, row.get("subjects", ""))
        lines.append(f"| {' | '.join(cells)} |")
    between = found["unipc_against_euler"]
    lines += ["", f"UniPC against Euler, full: error of latents {between['error']:.3f}, PSNR {between['psnr']:.1f} dB."]
    return lines


def main(arguments: list[str], prog: str) -> None:
    """Parses, measures, prints and writes."""
    given = tyro.cli(Arguments, args=arguments, prog=prog, description=__doc__)
    found = measure(given)
    print("\n".join(table(found)))
    if given.json is not None:
        from refalign_jax.atomic import write_text
        from refalign_jax.provenance import about

        record = {"about": about(), "arguments": dataclasses.asdict(given) | {"json": None}, **found}
        write_text(given.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
