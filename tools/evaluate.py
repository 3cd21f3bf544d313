r"""Computes scores of generated videos and prints OpenS2V-Eval's table beside published rows.

    python tools/evaluate.py scores/ --prompts Open-Domain_Eval.json --videos out/ --name mine --markdown table.md
    python tools/evaluate.py scores/ --prompts Open-Domain_Eval.json --videos out/ \
        --clip clip-vit-large-patch14/ --aesthetic-head sac+logos+ava1-l14-linearMSE.pth

SCORES is a folder of score files as the benchmark's scripts write them, one JSON file per metric. With --videos, motion
amplitude is computed and added to it; with --clip and --aesthetic-head the aesthetic score too; with --faces and
--face-model FaceSim. The other metrics need foreign judges: run the benchmark's own scripts for them. A missing metric
is named, and then there is no total.
"""

from refalign_jax.command import OutputFile, run

# isort: split
import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from refalign_jax.atomic import write_text

Given = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="(default: not computed)")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is computed, and where the table goes."""

    domain: Literal["open", "single", "human"] = "open"
    """Decides on metrics and weights."""
    prompts: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: all ids that have scores)")] = (
        None
    )
    """The benchmark's JSON file; its ids are the items that count."""
    videos: Given = None
    """Folder of <id>.mp4, of which motion amplitude is computed."""
    clip: Given = None
    """CLIP ViT-L/14 as transformers publishes it."""
    aesthetic_head: Given = None
    """LAION's predictor on CLIP embeddings."""
    faces: Given = None
    """Folder of <id>/reference.png and <id>/*.png, aligned faces of 112x112."""
    face_model: Given = None
    """CurricularFace's IR-101."""
    name: str = "this run"
    """Name of the row."""
    json: OutputFile = None
    """File for the figures."""
    markdown: OutputFile = None
    """File for the table."""

    def __post_init__(self) -> None:
        """Refuses options that need another one."""
        for one, other in (("clip", "aesthetic_head"), ("faces", "face_model")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                both = [f"--{name.replace('_', '-')}" for name in (one, other)]
                raise ValueError(f"{both[0]} and {both[1]} belong together; name both or neither.")
        if self.clip is not None and self.videos is None:
            raise ValueError("--clip scores videos; name their folder by --videos.")


def evaluate(
    scores: Positional[Path],
    /,
    *,
    given: Annotated[Arguments, arg(name="")] = Arguments(),
) -> None:
    """Prints OpenS2V-Eval's table.

    Args:
      scores: folder of score files.
      given: what is computed, and where the table goes.
    """
    from refalign_jax.evaluate import table
    from refalign_jax.evaluate.compute import read_ids
    from refalign_jax.evaluate.scores import read_scores

    ids = read_ids(given.prompts) if given.prompts is not None else ()
    _compute(scores, ids, given)
    found = read_scores(scores, given.domain, ids or None)
    print(table.text(given.name, found, given.domain))
    if given.json is not None:
        write_text(given.json, json.dumps(table.report(given.name, found, given.domain), indent=1) + "\n")
    if given.markdown is not None:
        write_text(given.markdown, table.markdown(given.name, found, given.domain))


def _compute(scores: Path, ids: tuple[str, ...], given: Arguments) -> None:
    """Adds what can be computed to the score files."""
    if given.videos is None and given.faces is None:
        return
    from refalign_jax.digests import Digests
    from refalign_jax.evaluate import compute, tasks
    from refalign_jax.locks import exclusive

    wanted = []
    if given.videos is not None:
        found = compute.videos_of(given.videos, ids)
        wanted.append(tasks.amplitude(found))
        if given.clip is not None and given.aesthetic_head is not None:
            wanted.append(tasks.aesthetic(found, given.clip, given.aesthetic_head))
    if given.faces is not None and given.face_model is not None:
        wanted.append(tasks.faces(given.faces, given.face_model, ids))
    with exclusive(scores, "tools/evaluate.py"), Digests(scores) as digests:
        for task in wanted:
            count = compute.compute(task, scores, digests)
            print(f"{task.file}: {count} computed, {len(task.inputs) - count} kept.")


def main(arguments: list[str], prog: str) -> None:
    """Parses and prints."""
    tyro.cli(evaluate, args=arguments, prog=prog, description=__doc__)


if __name__ == "__main__":
    run(main)
