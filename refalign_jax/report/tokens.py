"""Reference tokens of a run: read from its dataset, computed by its transformer before and after training.

The references are clean. The video beside them is noised to one time with noise that is fixed for each example, so
that runs and states of a run are compared on the same inputs.
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
from refalign_jax.data.shards import ShardSource
from refalign_jax.flow import corrupt, lookup, training_schedule
from refalign_jax.initial import random_params
from refalign_jax.models.dit import DiT, patchify
from refalign_jax.report import representation
from refalign_jax.report.run import Run
from refalign_jax.sharding import make_mesh, state_sharding
from refalign_jax.types import Array, Bool, Float, Int, Params

EXAMPLES = 64
"""At most so many of a dataset's last examples are looked at."""
TOKENS = 3000
"""At most about so many tokens, evenly spread over the references."""
SEED = 0
"""Of the noise."""
NAMELESS = "#"
"""How a made-up name of a nameless subject begins."""

Place = tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]
"""Example, reference and token of each of n tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class References:
    """Reference tokens that show a subject, n in all, and what the transformer needs to compute them."""

    rows: tuple[dict[str, np.ndarray], ...]
    """Batches of one example, as the loader gives them."""
    held_out: bool
    """Whether training never saw these examples."""
    place: Place
    """Where each token is from."""
    subjects: Int[np.ndarray, " n"]
    """Whose each is."""
    names: tuple[str, ...]
    """Of the subjects, by their number."""
    named: bool
    """Whether the dataset names subjects. If so, nameless ones are left out; if not, each is a subject of its own."""
    allowed: Mapping[str, Bool[np.ndarray, "n n"]]
    """Which token may be the neighbour of which; `elsewhere` and `anywhere` in the picture."""
    vfm: Float[np.ndarray, "n E"]
    """The VFM's tokens."""


def read_references(config: Config) -> References:
    """Reads the run's held-out examples or, where it has none, the last ones of its dataset.

    Raises:
      ValueError: there is no dataset, it can't be read, or no token in it shows a subject.
    """
    if config.synthetic.num_examples:
        raise ValueError("The run was trained on synthetic noise, which shows no subjects.")
    source = ShardSource(config.data.path)
    count = min(EXAMPLES, config.data.held_out or len(source))
    data = dataclasses.replace(config.data, batch_size=1, held_out=count, num_workers=0, dtype="float32")
    loader = make_loader(data, source, split="held_out")
    with contextlib.closing(loader):
        rows = [next(loader) for _ in range(count)]
    place = _choose(rows)
    names = [_names(source, row) for row in rows]
    labels = np.array([names[n][r] for n, r in zip(*place[:2], strict=True)], object)
    if named := any(not label.startswith(NAMELESS) for label in labels):
        kept = np.array([not label.startswith(NAMELESS) for label in labels])
        place, labels = _take(place, kept), labels[kept]
    if len(labels):
        known, subjects = np.unique(labels.astype(str), return_inverse=True)
        same = representation.same_pixels(_patches(rows, config.model.dit)[place])
        shown = ~representation.background(same, subjects if named else place[2])
        place, subjects, same = _take(place, shown), subjects[shown], same[shown][:, shown]
    if len(place[0]) < 3:
        raise ValueError(f"The last {count} examples of {config.data.path} have no references that show a subject.")
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
    """Parameters of the run's newest checkpoint, on one device, and the step it was saved after.

    Raises:
      ValueError: there is none, or it is damaged.
    """
    folder = run.config.train.checkpoint_folder or run.folder
    path, _ = find_checkpoint(folder)
    return restore_params(path, _shapes(run.config.model)), int(path.name)


def untrained_params(config: Config) -> dict[str, Any]:
    """The parameters that the run started from, made again from its seed or what it was started from.

    Raises:
      ValueError: what it was started from is gone.
    """
    init_key, _ = jax.random.split(jax.random.key(config.train.seed))  # as state.begin
    return initial_params(config.train.init, config.train.init_ema, config.model, _shapes(config.model), init_key)[0]


def features(params: Params, references: References, config: Config, desc: str) -> Float[np.ndarray, "layers n D"]:
    """The reference tokens after every block.

    Args:
      params: of the model.
      references: whose tokens.
      config: of the run.
      desc: for the progress bar.
    """
    found = []
    dit = dataclasses.replace(config.model.dit, attention="auto")  # this machine may not be the one of the training
    model = dataclasses.replace(config.model, dit=dit)
    example, reference, token = references.place
    place = reference * references.rows[0]["vfm_features"].shape[2] + token
    for n, row in enumerate(tqdm(references.rows, desc=desc, unit="example", leave=False)):
        mine = example == n
        if mine.any():
            noise = np.random.default_rng([SEED, n]).standard_normal(row["video_latents"].shape, np.float32)
            inputs = (row["video_latents"], noise, row["text"], row["reference_latents"], row["num_references"])
            tokens = _forward(params["dit"], *inputs, place[mine], model)
            found.append(np.asarray(tokens, np.float32))
    return np.concatenate(found, axis=1)


def noise_time(config: Config) -> float:
    """The time t, in [0, 1000], to which the videos are noised: the median of training."""
    return float(training_schedule(config.model.flow).timesteps[config.model.flow.num_train_steps // 2])


@functools.partial(jax.jit, static_argnames="model")
def _forward(
    dit: Params,
    latents: Float[Array, "1 F H W C"],
    noise: Float[Array, "1 F H W C"],
    text: Float[Array, "1 S text_width"],
    reference_latents: Float[Array, "1 R H W C"],
    num_references: Int[Array, " 1"],
    place: Int[Array, " n"],
    model: ModelConfig,
) -> Float[Array, "layers n D"]:
    """Reference tokens at chosen places of one example after every block."""
    sigma, t, _ = lookup(training_schedule(model.flow), jnp.array([model.flow.num_train_steps // 2]))
    noisy, _ = corrupt(latents, noise, sigma)
    outputs: Any = DiT(model.dit).apply(
        {"params": dit},
        noisy,
        t,
        text,
        reference_latents,
        num_references,
        num_feature_blocks=model.dit.num_layers,
        tap=lambda _, tokens: tokens[0, place],
    )
    return outputs[1]


@functools.cache
def _shapes(model: ModelConfig) -> Params:
    """Shapes of the parameters, all of them on the first device."""
    shapes = jax.eval_shape(lambda: random_params(model, jax.random.key(0)))
    places = state_sharding(shapes, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def _names(source: ShardSource, row: Mapping[str, np.ndarray]) -> list[str]:
    """Who each reference of an example shows; a nameless subject is nobody else."""
    index = int(row["index"][0])
    told = source[index][1]["metadata"].get("subjects") or []
    names = [*told, *[None] * row["subject_ids"].shape[1]]
    return [name or f"{NAMELESS}{index}/{number}" for name, number in zip(names, row["subject_ids"][0], strict=False)]


def _choose(rows: Sequence[Mapping[str, np.ndarray]]) -> Place:
    """About `TOKENS` tokens, equally many and evenly spread over each real reference."""
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
