"""Time, FLOP/s, MFU, memory and time by operation of training or sampling, on the devices present; needs no data.

python tools/benchmark.py RECIPE [--mode sample] [--steps 3] [--repeats 3] [--json FILE] [--model.dit.remat full]
python tools/benchmark.py RECIPE --versus model.dit.remat=full      two settings in turns
python tools/benchmark.py gpu                                       all that an NVIDIA GPU has to stand
"""

import dataclasses
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from refalign_jax.command import _exit
from refalign_jax.config import Config, DataConfig, Mode, Plan, SamplingConfig, SyntheticConfig, read_recipe
from refalign_jax.perf import benchmark, gpu_check
from refalign_jax.provenance import about

ROOT = Path(__file__).parents[1]
GPU = Config(
    data=DataConfig(batch_size=1),
    synthetic=SyntheticConfig(num_examples=64),
    sampling=SamplingConfig(num_steps=2),
)
"""RefAlign-1.3B at 480x832x81, three references, batch 1, bfloat16; no moving average."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is measured, and how often.

    Attributes:
      mode: a training step, or drawing a batch of videos.
      versus: fields in which a second setting differs, each as model.dit.remat=full; it is measured in turns.
      json: file for all figures, with versions, flags and commit.
      plan: how often.
      config: the recipe.
    """

    mode: Mode = "train"
    versus: tuple[str, ...] = ()
    json: Path | None = None
    plan: Annotated[Plan, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Plan)
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


def main(arguments: list[str]) -> int:
    """Parses, measures, prints and writes."""
    what, rest = (arguments[0], arguments[1:]) if arguments and not arguments[0].startswith("-") else ("", arguments)
    if not what and not {"-h", "--help"} & set(rest):
        raise ValueError("Name a recipe first, as in: tools/benchmark.py configs/tiny.py; or: tools/benchmark.py gpu.")
    gpu = what == "gpu"
    config = GPU if gpu else _without_data(read_recipe(Path(what)) if what else Config())
    given = tyro.cli(
        Arguments,
        default=Arguments(config=config),
        args=rest,
        description=__doc__,
        prog=f"tools/benchmark.py {what or 'RECIPE'}",
    )
    if gpu:
        golden = [ROOT / "tests/golden" / name for name in ("dit_a", "encoders_a")]
        results, verdicts = gpu_check.check(given.config, golden, given.plan)
        shown = {f"train, remat {policy}": result for policy, result in results["train"].items()}
        shown["sample"] = results["sample"]
    else:
        settings = {"a": given.config}
        if given.versus:
            settings["b"] = _changed(given.config, given.versus)
        results, verdicts = benchmark.measure(settings, given.mode, given.plan), []
        shown = {f"{name} {given.mode}": result for name, result in results.items()}
    for title, result in shown.items():
        print("\n".join(benchmark.lines(title, result)) if "seconds" in result else f"{title}: {result['failed']}")
    for verdict in verdicts:
        print(f"{'ok  ' if verdict.passed else 'FALLS SHORT'} {verdict.bar}: {verdict.found}")
    path = given.json
    if gpu and path is None:
        device = jax.devices()[0].device_kind.lower().replace(" ", "-")
        path = ROOT / "benchmarks" / f"{datetime.date.today()}-{device}.json"
    if path is not None:
        _write(path, {"about": about(), "plan": dataclasses.asdict(given.plan), "mode": given.mode, **results})
    return 0 if all(verdict.passed for verdict in verdicts) else 1


def _changed(config: Config, fields: Sequence[str]) -> Config:
    """A configuration with some fields changed, each given as name=value; the values of a tuple are split by commas.

    Raises:
      ValueError: no such field, or a value that it can't have.
    """
    arguments: list[str] = []
    for field in fields:
        name, equals, value = field.partition("=")
        if not equals:
            raise ValueError(f"--versus {field}: give a field and its value, as in model.dit.remat=full.")
        switch = {"true": f"--{name}", "false": f"--{'.no-'.join(name.rpartition('.')[::2])}"}.get(value.lower())
        arguments += [switch] if switch else [f"--{name}", *value.split(",")]
    return tyro.cli(Config, default=config, args=arguments, prog="tools/benchmark.py --versus", console_outputs=True)


def _without_data(config: Config) -> Config:
    """A recipe on synthetic examples, of the training shape unless it has others, and with nothing held out."""
    synthetic = config.synthetic if config.synthetic.num_examples else SyntheticConfig(num_examples=64)
    return dataclasses.replace(
        config,
        synthetic=synthetic,
        data=dataclasses.replace(config.data, path="", held_out=0, num_workers=0),
        train=dataclasses.replace(config.train, held_out_every=0, preview_every=0),
    )


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {path}")


if __name__ == "__main__":
    _exit(lambda: main(sys.argv[1:]))
