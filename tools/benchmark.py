"""Measures time, FLOP/s, MFU, memory and time by operation of training or sampling, on the devices present.

    python tools/benchmark.py RECIPE --mode sample --steps 3 --repeats 3 --json FILE --model.dit.remat full
    python tools/benchmark.py RECIPE --versus model.dit.remat=full      two settings in turns
    python tools/benchmark.py gpu                                       every check of an NVIDIA GPU

It needs no data: examples are synthetic. RECIPE is a Python file, which is executed, or the bare name of one under
configs/; after it, --help shows every field with the recipe's value.
"""

from refalign_jax.command import OutputFile, override, parse_recipe, run

# isort: split
import dataclasses
import datetime
import json
import os
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from refalign_jax.atomic import write_text
from refalign_jax.config import Config, DataConfig, Mode, Plan, SamplingConfig, SyntheticConfig, without_data

GOLDEN = Path(__file__).parents[1] / "tests/golden"
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
      mode: A training step, or drawing a batch of videos.
      versus: Fields in which a second setting differs, each as model.dit.remat=full; it is measured in turns.
      json: File for all figures, with versions, flags and commit; the GPU check always writes one.
      plan: The repetitions.
      config: The recipe.
    """

    mode: Mode = "train"
    versus: tuple[str, ...] = ()
    json: OutputFile = None
    plan: Annotated[Plan, arg(name="")] = dataclasses.field(default_factory=Plan)
    config: Annotated[Config, arg(name="")] = dataclasses.field(default_factory=Config)


def main(arguments: list[str], prog: str) -> int:
    """Parses, measures, prints and writes."""
    _without_cuda_graphs()
    if arguments[:1] == ["gpu"]:
        return check_gpu(arguments[1:], f"{prog} gpu")
    given = parse_recipe(Arguments, arguments, prog, __doc__, change=without_data)
    settings = {"a": given.config}
    if given.versus:
        settings["b"] = override(given.config, given.versus)
    from refalign_jax.perf import benchmark

    results = benchmark.measure(settings, given.mode, given.plan)
    _show({f"{name} {given.mode}": result for name, result in results.items()})
    if given.json is not None:
        _write(given.json, given, results)
    return 0


def check_gpu(arguments: list[str], prog: str) -> int:
    """Checks an NVIDIA GPU; the exit code is 1 if one of the bars is not met."""
    import tyro

    given = tyro.cli(Arguments, default=Arguments(config=GPU), args=arguments, prog=prog, description=__doc__)
    if not GOLDEN.is_dir():
        raise ValueError(f"{GOLDEN} does not exist; the golden values come with a clone, so run the GPU check there.")
    import jax

    if jax.default_backend() != "gpu":
        raise ValueError(
            f"JAX finds no GPU here, only {jax.devices()[0].device_kind!r}; the GPU check needs an NVIDIA GPU and "
            "pip install -e '.[cuda]'."
        )
    from refalign_jax.perf import gpu_check

    results, verdicts = gpu_check.check(given.config, [GOLDEN / name for name in ("dit_a", "encoders_a")], given.plan)
    _show({f"train, remat {policy}": result for policy, result in results["train"].items()})
    _show({"sample": results["sample"]})
    for verdict in verdicts:
        print(f"{'ok  ' if verdict.passed else 'FALLS SHORT'} {verdict.bar}: {verdict.found}")
    device = jax.devices()[0].device_kind.lower().replace(" ", "-")
    _write(given.json or Path("benchmarks") / f"{datetime.date.today()}-{device}.json", given, results)
    return 0 if all(verdict.passed for verdict in verdicts) else 1


def _without_cuda_graphs() -> None:
    """Keeps XLA from running a GPU's kernels as CUDA graphs, in which a profile can't assign kernels to parts.

    It costs little: on an H200, a training step of RefAlign-1.3B took 2.430 s without and, in another run, 2.427 s with
    them (docs/benchmarks.md).
    """
    flag, flags = "--xla_gpu_enable_command_buffer", os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}=".strip()


def _show(results: dict[str, Any]) -> None:
    from refalign_jax.perf import benchmark

    for title, result in results.items():
        print("\n".join(benchmark.lines(title, result)) if "seconds" in result else f"{title}: {result['failed']}")


def _write(path: Path, given: Arguments, results: dict[str, Any]) -> None:
    from refalign_jax.provenance import about

    record = {"about": about(), "plan": dataclasses.asdict(given.plan), "mode": given.mode, **results}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=1) + "\n")
    print(f"Written: {path}")


if __name__ == "__main__":
    run(main)
