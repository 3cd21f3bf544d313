r"""Draws videos from prompts and reference images.

    python tools/sample.py --weights refalign/ --prompt "A cat sits beside a man." \
        --reference cat.jpg --reference man.png --out cat_man.mp4
    python tools/sample.py runs/a prompts.jsonl out/ --num-steps 50
    python tools/sample.py --weights refalign/ --eval Open-Domain_Eval.json --out out/

One video goes to the file that --out names, with a JSON file beside it that describes it. Many go to a folder. Started
again on a folder, the command continues where it stopped: it keeps a video whose prompt, references, weights and
settings are what they were, makes the others, and prints why.
"""

from refalign_jax.command import local, require, run

# isort: split
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from refalign_jax.config import GenerateConfig

if TYPE_CHECKING:
    from refalign_jax.inference.requests import Request

_ABSENT = "(default: none)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is drawn, from what, and where to."""

    places: Annotated[
        Positional[tuple[str, ...]], arg(metavar="[WEIGHTS PROMPTS OUT]", help_behavior_hint="(or by name, below)")
    ] = ()
    """Weights, a JSONL file of prompts, and the folder for the videos."""
    weights: Annotated[str, arg(metavar="PLACE", help_behavior_hint="(required)")] = ""
    """A run's folder, a checkpoint, published weights (a file, or a folder of RefAlign, Wan2.1 or diffusers), or a hub id."""  # noqa: E501
    prompt: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint=_ABSENT)] = None
    """What the one video shows."""
    reference: Annotated[UseAppendAction[tuple[Path, ...]], arg(metavar="IMAGE", help_behavior_hint=_ABSENT)] = ()
    """An image of a subject in it; may be given several times."""
    prompts: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=_ABSENT)] = None
    """Lines {"prompt", "references": [{"image", "subject"?, "mask"?}], "id"?}, paths relative to the file."""
    eval: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=_ABSENT)] = None
    """Prompts of OpenS2V-Eval, such as Open-Domain_Eval.json."""
    images: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: that of --eval)")] = None
    """What the paths of images in --eval are relative to."""
    out: Annotated[Path | None, arg(metavar="PLACE", help_behavior_hint="(required)")] = None
    """The MP4 of the one video; of many, the folder for <id>.mp4, references, samples.json and gallery.html."""
    show_references: bool = False
    """Write the references of the one video as the model sees them, before it is sampled."""
    distributed: bool = False
    """Join the other processes, each of which makes its part of the videos."""
    config: OmitArgPrefixes[GenerateConfig] = dataclasses.field(default_factory=GenerateConfig)

    def named(self) -> "Arguments":
        """The arguments with those that were given by place under their names.

        Raises:
          ValueError: it is not clear what to draw, from what or where to.
        """
        if self.places and len(self.places) != 3:
            raise ValueError(
                f"{len(self.places)} places are named; give WEIGHTS PROMPTS OUT, or name each by its option."
            )
        if self.places and (self.weights or self.prompts or self.out):
            raise ValueError("Weights, prompts and out are named twice; give WEIGHTS PROMPTS OUT or their options.")
        weights, prompts, out = self.places or (self.weights, self.prompts, self.out)
        if not weights or not out:
            raise ValueError(f"No --{'out' if weights else 'weights'} is named; see --help.")
        given = [name for name, value in (("--prompt", self.prompt), ("--eval", self.eval)) if value is not None]
        given += ["--prompts"] if prompts else []
        if len(given) != 1:
            wrong = f"{' and '.join(given)} are given" if given else "Nothing to draw is given"
            raise ValueError(f"{wrong}; give one of --prompt TEXT, --prompts FILE and --eval FILE.")
        if self.prompt is None and (self.reference or self.show_references):
            raise ValueError("--reference and --show-references belong to --prompt; a file has references of its own.")
        if self.images is not None and self.eval is None:
            raise ValueError("--images belongs to --eval.")
        return dataclasses.replace(
            self, places=(), weights=str(weights), prompts=local(prompts) if prompts else None, out=local(out)
        )


def sample(arguments: Arguments) -> None:
    """Draws what is asked for."""
    for path, what in (
        (arguments.prompts or arguments.eval, "a file of prompts"),
        *((path, "an image") for path in arguments.reference),
        (arguments.config.dataset, "a prepared dataset"),
    ):
        if path:
            require(path, what)
    from refalign_jax.inference.requests import read_eval, read_requests
    from refalign_jax.locks import check_free

    out = arguments.out
    assert out is not None
    if arguments.prompt is not None:
        _sample_one(arguments, out)
        return
    if arguments.eval is not None:
        requests = read_eval(arguments.eval, arguments.images)
    else:
        assert arguments.prompts is not None
        requests = read_requests(arguments.prompts)
    if arguments.distributed:
        from refalign_jax.config import TrainConfig
        from refalign_jax.trainer.distributed import join

        join(TrainConfig())
    elif arguments.config.part == (1, 1):
        check_free(out, "tools/sample.py")
    _sample_many(requests, arguments, out)


def _sample_one(arguments: Arguments, out: Path) -> None:
    """Draws one video into a file."""
    from refalign_jax.data.records import Reference
    from refalign_jax.inference.generate import generate_one
    from refalign_jax.inference.opening import open_generator
    from refalign_jax.inference.requests import Request

    references = tuple(Reference(path=path) for path in arguments.reference)
    request = Request(id="0001", prompt=arguments.prompt or "", references=references)
    generator = open_generator(arguments.weights, arguments.config)
    generate_one(request, out, generator, arguments.show_references)
    print(f"The video is {out}, described by {out.with_suffix('.json')}.")


def _sample_many(requests: "list[Request]", arguments: Arguments, out: Path) -> None:
    """Draws many videos into a folder."""
    from refalign_jax.inference.gallery import GALLERY
    from refalign_jax.inference.generate import generate
    from refalign_jax.inference.opening import open_generator
    from refalign_jax.inference.outputs import SAMPLES

    entries = generate(requests, out, open_generator(arguments.weights, arguments.config))
    print(f"{len(entries)} videos are in {out}, described by {out / SAMPLES} and shown by {out / GALLERY}.")


def main(arguments: list[str], prog: str) -> None:
    """Parses and samples."""
    sample(tyro.cli(Arguments, args=arguments, prog=prog, description=__doc__).named())


if __name__ == "__main__":
    run(main)
