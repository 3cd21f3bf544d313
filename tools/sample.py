"""Draws videos from prompts and reference images.

    python tools/sample.py runs/a prompts.jsonl out/ --num-steps 50
    python tools/sample.py refalign.safetensors prompts.jsonl out/ --vae Wan2.1_VAE.pth --text-encoder umt5/

Started again, it continues where it stopped: it keeps a video whose prompt, references, weights and settings are what
they were, makes the others, and prints why.
"""

from refalign_jax.command import require, run

# isort: split
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from refalign_jax.config import GenerateConfig


def sample(
    weights: Positional[str],
    prompts: Positional[Path],
    out: Positional[Path],
    /,
    *,
    config: Annotated[GenerateConfig, arg(name="")] = GenerateConfig(),  # noqa: B008 (frozen)
) -> None:
    """Draws a video for each line of a JSONL file.

    Args:
      weights: a run's folder or one of its checkpoints, a checkpoint of parameters, or published safetensors.
      prompts: lines {"prompt", "references": [{"image", "subject"?, "mask"?}], "id"?}, paths relative to the file.
      out: folder for <id>.mp4, the references as the model saw them, and samples.json.
      config: how.
    """
    for path, what in (
        (weights, "a run's folder, a checkpoint, or published weights"),
        (prompts, "a JSONL file"),
        (config.dataset, "a prepared dataset"),
        (config.vae if config.vae != "dct" else None, "the weights of --vae"),
        (config.text_encoder if config.text_encoder != "words" else None, "the weights of --text-encoder"),
    ):
        if path:
            require(path, what)
    from refalign_jax.inference.generate import generate, open_generator
    from refalign_jax.inference.outputs import SAMPLES
    from refalign_jax.inference.requests import check_references, read_requests
    from refalign_jax.locks import check_free

    requests = read_requests(prompts)
    check_references(requests)  # before weights are read, which takes minutes
    check_free(out, "tools/sample.py")
    generate(requests, out, open_generator(weights, config))
    print(f"{len(requests)} videos are in {out}, described by {out / SAMPLES}.")


def main(arguments: list[str], prog: str) -> None:
    """Parses and samples."""
    tyro.cli(sample, args=arguments, prog=prog, description=__doc__)


if __name__ == "__main__":
    run(main)
