"""Prompts and reference images to videos.

python tools/sample.py runs/a prompts.jsonl out/ [--dataset data/mine | --vae … --text-encoder …] [--num-steps 50]
python tools/sample.py refalign.safetensors prompts.jsonl out/ --vae Wan2.1_VAE.pth --text-encoder umt5/
"""

from pathlib import Path
from typing import Annotated

import tyro

from refalign_jax.command import run
from refalign_jax.config import GenerateConfig
from refalign_jax.inference.generate import generate, open_generator
from refalign_jax.inference.outputs import SAMPLES
from refalign_jax.inference.requests import read_requests

Positional = tyro.conf.Positional


def sample(
    weights: Annotated[str, Positional],
    prompts: Annotated[Path, Positional],
    out: Annotated[Path, Positional],
    /,
    *,
    config: Annotated[GenerateConfig, tyro.conf.arg(name="")] = GenerateConfig(),  # noqa: B008 (frozen)
) -> None:
    """Samples a video for each line of a JSONL file; started again, it goes on where it stopped.

    Args:
      weights: a run's folder or one of its checkpoints, a checkpoint of parameters, or published safetensors.
      prompts: lines {"prompt", "references": [{"image", "subject"?, "mask"?}], "id"?}, paths relative to the file.
      out: folder for <id>.mp4, the references as the model saw them, and samples.json.
      config: how.
    """
    requests = read_requests(prompts)
    generate(requests, out, open_generator(weights, config))
    print(f"{len(requests)} videos are in {out}; {out / SAMPLES} tells of them.")


if __name__ == "__main__":
    run(sample)
