"""A training run over two datasets: stopped and resumed, and its held-out losses of each."""

import dataclasses

import numpy as np
from support import tiny
from support.runs import recipe

from refalign_jax.command import override
from refalign_jax.data.mixture import Mixture
from refalign_jax.data.synthetic import SyntheticSource
from refalign_jax.trainer.compare import differences
from refalign_jax.trainer.log import read_metrics
from refalign_jax.trainer.loop import train
from refalign_jax.trainer.preflight import synthetic_spec


def mixed(folder, **train_settings):
    config = recipe(folder, preview_every=0, **train_settings)
    data = dataclasses.replace(config.data, mix=(("x/opens2v", 6.0), ("x/phantom", 4.0)))
    constant = dataclasses.replace(config.optimizer, schedule="constant")  # a cosine depends on the number of steps
    return dataclasses.replace(config, data=data, optimizer=constant)


def source():
    spec = synthetic_spec(recipe(""))
    parts = [dataclasses.replace(spec, num_examples=size, video_latents=(*tiny.GRID, 16)) for size in (19, 12)]
    return Mixture([SyntheticSource(part, seed) for seed, part in enumerate(parts)])


def test_a_stopped_run_ends_as_one_that_was_not(tmp_path):
    """Seven steps and then five are twelve, bit for bit; the order of the examples is the same."""
    train(mixed(tmp_path / "whole"), source())
    train(mixed(tmp_path / "parts", steps=7), source())
    train(mixed(tmp_path / "parts"), source())
    assert differences(tmp_path / "whole", tmp_path / "parts") == []

    steps = [line for line in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "step" in line]
    last = [line for line in steps if "held_out_loss" in line][-1]
    for term in ("loss", "flow", "pull", "push"):
        both = 5 * last[f"held_out_{term}/opens2v"] + 3 * last[f"held_out_{term}/phantom"]
        np.testing.assert_allclose(both / 8, last[f"held_out_{term}"], rtol=1e-5)


def test_the_command_line_names_a_mixture():
    config = override(recipe(""), ["data.mix=a,6,b,4", "synthetic.num_examples=0", "data.grown_from=30,20"])
    assert config.data.mix == (("a", 6.0), ("b", 4.0))
    assert config.data.grown_from == (30, 20)
    assert override(recipe(""), ["data.grown_from=30"]).data.grown_from == 30
