"""Reference tokens of a run: read from its dataset, computed by its transformer before and after training.

The references are clean. The video beside them is noised to one time, with noise that is fixed for each example, so
that runs, and states of a run, are compared on the same inputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from refalign_jax.config import Config, DiTConfig, MeshConfig, ModelConfig
from refalign_jax.convert.checkpoint import find_checkpoint, restore_params
from refalign_jax.convert.load import initial_params
from refalign_jax.data.loader import make_loader
from refalign_jax.data.mixture import Source, open_dataset
from refalign_jax.flow import corrupt, lookup, training_schedule
from refalign_jax.initial import random_params
from refalign_jax.models.condition import Condition
from refalign_jax.models.dit import Observer, observe, patchify
from refalign_jax.report import representation
from refalign_jax.report.run import Run
from refalign_jax.sharding import make_mesh, place_shapes
from refalign_jax.types import Array, Bool, Float, Int, Params

EXAMPLES = 64
"""The largest number of examples, taken from the end of the dataset."""
TOKENS = 3000
"""The approximate largest number of tokens, evenly spread over the references."""
SEED = 0
"""Seed of the noise."""
UNNAMED = "#"
"""Prefix of the name that is made up for a subject without a name."""

Place = tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]
"""Number of the example, of its reference and of the token in the reference, for each of n tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class References:
    """The n reference tokens that show a subject, and the transformer's inputs from which they are computed."""

    rows: tuple[dict[str, np.ndarray], ...]
    """Batches of one example, as the loader returns them."""
    held_out: bool
    """Whether the examples were held out from training."""
    place: Place
    """Origin of each token."""
    subjects: Int[np.ndarray, " n"]
    """Number of each token's subject."""
    names: tuple[str, ...]
    """Names of the subjects, by number."""
    named: bool
    """Whether the dataset names subjects. If so, unnamed ones are left out; otherwise each reference has its own."""
    allowed: Mapping[str, Bool[np.ndarray, "n n"]]
    """Which tokens may be neighbours, by rule: `elsewhere`, only at another position; `anywhere`, at any position."""
    vfm: Float[np.ndarray, "n E"]
    """The VFM's tokens."""


def read_references(config: Config) -> References:
    """Reads the run's held-out examples or, if it has none, the last ones of its dataset.

    Raises:
      ValueError: there is no dataset, it can't be read, or none of its tokens shows a subject.
    """
    if config.synthetic.num_examples:
        raise ValueError("The run was trained on synthetic noise, which shows no subjects.")
    source = open_dataset(config.data)
    count = min(EXAMPLES, config.data.held_out or len(source))
    data = dataclasses.replace(config.data, batch_size=1, held_out=count, num_workers=0, dtype="float32")
    loader = make_loader(data, source, split="held_out")
    with contextlib.closing(loader):
        rows = [next(loader) for _ in range(count)]
    place = _choose(rows)
    names = [_names(source, row) for row in rows]
    labels = np.array([names[n][r] for n, r in zip(*place[:2], strict=True)], object)
    if named := any(not label.startswith(UNNAMED) for label in labels):
        kept = np.array([not label.startswith(UNNAMED) for label in labels])
        place, labels = _take(place, kept), labels[kept]
    if len(labels):
        known, subjects = np.unique(labels.astype(str), return_inverse=True)
        same = representation.same_pixels(_patches(rows, config.model.dit)[place])
        shown = ~representation.background(same, subjects if named else place[2])
        place, subjects, same = _take(place, shown), subjects[shown], same[shown][:, shown]
    if len(place[0]) < 3:
        raise ValueError(
            f"The last {count} examples of {' and '.join(config.data.paths)} have no references that show a subject."
        )
    return References(
        rows=tuple(rows),
        held_out=bool(config.data.held_out),
        place=place,
        subjects=subjects,
        names=tuple(known.tolist()),
        named=named,
        allowed={
            "elsewhere": representation.allowed_neighbours(same, place[0], place[2]),
            "anywhere": representation.allowed_neighbours(same, place[0]),
        },
        vfm=np.concatenate([row["vfm_features"] for row in rows])[place],
    )


def trained_params(run: Run) -> tuple[dict[str, Any], int]:
    """Restores the parameters of the run's newest checkpoint on one device.

    Returns:
      The parameters, and the number of steps after which they were saved.

    Raises:
      ValueError: there is no checkpoint, or it is damaged.
    """
    path, _ = find_checkpoint(run.folder)
    return restore_params(path, _shapes(run.config.model)), int(path.name)


def untrained_params(config: Config) -> dict[str, Any]:
    """Recreates the parameters that the run started from, from its seed or from its `train.init`.

    Raises:
      ValueError: the weights named by `train.init` are missing.
    """
    init_key, _ = jax.random.split(jax.random.key(config.train.seed))  # as state.begin
    return initial_params(config.train.init, config.train.init_ema, config.model, _shapes(config.model), init_key)[0]


def features(params: Params, references: References, config: Config, desc: str) -> Float[np.ndarray, "layers n D"]:
    """Computes the reference tokens after every block.

    Args:
      params: parameters of the model.
      references: the tokens and the transformer's inputs.
      config: recipe of the run.
      desc: label of the progress bar.
    """
    found = []
    dit = dataclasses.replace(config.model.dit, attention="auto")  # this machine may differ from the training's
    model = dataclasses.replace(config.model, dit=dit)
    example, reference, token = references.place
    place = reference * references.rows[0]["vfm_features"].shape[2] + token
    most = int(np.bincount(example).max())  # one size of all examples, so that there is one program
    for n, row in enumerate(tqdm(references.rows, desc=desc, unit="example", leave=False)):
        mine = example == n
        if mine.any():
            noise = np.random.default_rng([SEED, n]).standard_normal(row["video_latents"].shape, np.float32)
            condition = Condition(row["text"], row["reference_latents"], row["num_references"])
            chosen = np.resize(place[mine], most)
            tokens = _forward(params["dit"], row["video_latents"], noise, condition, chosen, model)
            found.append(np.asarray(tokens, np.float32)[:, : mine.sum()])
    return np.concatenate(found, axis=1)


def noise_time(config: Config) -> float:
    """The time t, in [0, 1000], to which the videos are noised: the median time of training."""
    return float(training_schedule(config.model.flow).timesteps[config.model.flow.num_train_steps // 2])


@functools.partial(jax.jit, static_argnames="model")
def _forward(
    dit: Params,
    latents: Float[Array, "1 F H W C"],
    noise: Float[Array, "1 F H W C"],
    condition: Condition,
    place: Int[Array, " n"],
    model: ModelConfig,
) -> Float[Array, "layers n D"]:
    """Reference tokens at chosen places of one example after every block."""
    sigma, t, _ = lookup(training_schedule(model.flow), jnp.array([model.flow.num_train_steps // 2]))
    noisy, _ = corrupt(latents, noise, sigma)
    observer = Observer(model.dit.num_layers, lambda streams, _: streams[1][0, place])
    return observe(dit, model.dit, noisy, t, condition, observer)[1]


@functools.cache
def _shapes(model: ModelConfig) -> Params:
    """Shapes of the parameters, placed on the first device."""
    shapes = jax.eval_shape(lambda: random_params(model, jax.random.key(0)))
    return place_shapes(shapes, make_mesh(MeshConfig(data=1), jax.devices()[:1]))


def _names(source: Source, row: Mapping[str, np.ndarray]) -> list[str]:
    """Subject of each reference of an example; each unnamed one is a subject of its own."""
    index = int(row["index"][0])
    given = source[index][1]["metadata"].get("subjects") or []
    names = [*given, *[None] * row["subject_ids"].shape[1]]
    return [name or f"{UNNAMED}{index}/{number}" for name, number in zip(names, row["subject_ids"][0], strict=False)]


def _choose(rows: Sequence[Mapping[str, np.ndarray]]) -> Place:
    """Chooses about `TOKENS` tokens: the same number, evenly spaced, from each real reference."""
    example, reference = (
        np.array([(n, r) for n, row in enumerate(rows) for r in range(int(row["num_references"][0]))], np.int64)
        .reshape(-1, 2)
        .T
    )
    tokens = rows[0]["vfm_features"].shape[2]
    each = min(tokens, max(TOKENS // max(len(example), 1), 1))
    token = np.linspace(0, tokens - 1, each).round().astype(np.int64)
    return example.repeat(each), reference.repeat(each), np.tile(token, len(example))


def _patches(rows: Sequence[Mapping[str, np.ndarray]], dit: DiTConfig) -> Float[np.ndarray, "N R P V"]:
    """Clean latents of every reference token."""
    latents = np.concatenate([row["reference_latents"] for row in rows])
    return np.asarray(patchify(jnp.asarray(latents), dit)).reshape(*latents.shape[:2], -1, dit.patch_values)


def _take(place: Place, kept: Bool[np.ndarray, " n"]) -> Place:
    example, reference, token = place
    return example[kept], reference[kept], token[kept]
