"""Small inputs of every command, and the commands that read them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from refalign_jax.data.video import write_video
from refalign_jax.soak.processes import Command

PREPARE = (
    *("--vae=dct", "--text-encoder=words", "--vfm=daisy", "--height=128", "--width=192", "--num-frames=5"),
    *("--word-width=16", "--examples-per-shard=2"),
)
TRAIN = ("tiny", "--train.steps=3", "--train.save-every=3", "--train.held-out-every=0", "--train.preview-every=0")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A folder with records, requests, a dataset, a run and weights.

    Attributes:
      folder: holds records.jsonl, requests.jsonl, data, run and w.safetensors.
    """

    folder: Path

    def command(self, name: str, out: Path) -> tuple[str, list[object]]:
        """The command that writes something into a folder that exists, by its name, and its arguments.

        Args:
          name: one of `COMMANDS`.
          out: the folder.
        """
        return COMMANDS[name](self.folder, out)

    def run(self, name: str, out: Path) -> Command:
        """Starts a command; its output goes to a file beside `out`."""
        out.mkdir(exist_ok=True)
        return Command(*self.command(name, out), output=out.with_name(f"{out.name}.txt"))


COMMANDS: dict[str, Callable[[Path, Path], tuple[str, list[object]]]] = {
    "prepare": lambda given, out: ("prepare", [given / "records.jsonl", out, *PREPARE]),
    "train": lambda given, out: ("train", [*TRAIN, "--train.folder", out]),
    "sample": lambda given, out: ("sample", [given / "run", given / "requests.jsonl", out, "--num-steps=2"]),
    "import": lambda given, out: ("convert", ["import", given / "w.safetensors", out / "checkpoint"]),
    "export": lambda given, out: ("convert", ["export", given / "run", out / "w.safetensors", "--projectors"]),
    "report": lambda given, out: ("report", [given / "run", "--out", out / "report.html"]),
}
"""Each returns the name of the command and its arguments."""


def make_inputs(folder: Path, count: int = 8) -> Inputs:
    """Writes videos, records and requests, and prepares, trains and exports.

    Args:
      folder: made if it does not exist.
      count: number of videos; another record names one that is missing.

    Raises:
      RuntimeError: a command failed; the message names the file with its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    records, requests = [], []
    for number in range(count):
        image = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)).resize((192, 128))
        frames = np.stack([np.roll(np.asarray(image), 8 * shift, 1) for shift in range(6)])
        write_video(folder / f"{number}.mp4", frames, fps=8)
        image.save(folder / f"{number}.png")
        references = [{"image": f"{number}.png", "subject": "pattern"}]
        records.append({"video": f"{number}.mp4", "prompt": f"Pattern {number} moves.", "references": references})
        requests.append({"id": f"pattern-{number}", "prompt": f"Pattern {number} rests.", "references": references})
    records.append({**records[0], "video": "missing.mp4"})
    for name, lines in (("records", records), ("requests", requests[:4])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    inputs = Inputs(folder)
    finish(inputs.run("prepare", folder / "data"), folder / "data.txt")
    fitted = ("--from-dataset", "--data.path", folder / "data", "--data.batch-size=2", "--data.held-out=2")
    train = Command("train", [*TRAIN, *fitted, "--train.folder", folder / "run"], folder / "run.txt")
    finish(train, folder / "run.txt")
    (folder / "w").mkdir(exist_ok=True)
    finish(inputs.run("export", folder / "w"), folder / "w.txt")
    (folder / "w/w.safetensors").rename(folder / "w.safetensors")
    return inputs


def finish(command: Command, output: Path) -> float:
    """Waits for a command; returns the seconds that it took.

    Raises:
      RuntimeError: its exit code is not 0.
    """
    command.wait()
    if command.exit_code:
        raise RuntimeError(f"A command that nobody stopped ended with {command.exit_code}, see {output}.")
    return command.seconds
