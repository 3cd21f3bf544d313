"""The transformer block by block: for models that don't fit into memory, and to look at the operations of each block.

Only one block's parameters are held at a time. The blocks, the embedding and the head are those of the model; the loop
over the blocks alone is another one than training's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from refalign_jax import alignment, flow
from refalign_jax.config import DiTConfig
from refalign_jax.models import dit
from refalign_jax.models.block import Block, Shared, Streams
from refalign_jax.models.condition import Condition
from refalign_jax.models.gradients import Product
from refalign_jax.objective import Batch, Terms, Times, batch_targets, join_terms
from refalign_jax.types import Array, Params
from refalign_jax.verify.case import Case, read_layer, select

OPERATIONS = {"attention": "self_attention", "cross_attention": "cross_attention", "ffn": "ffn"}
"""The operations of a block in their order, and the modules that compute them."""

Inputs = tuple[Array, Array, Condition]
"""Latents, times and condition: what `dit.velocity` takes beside the parameters."""


def velocity(case: Case, inputs: Inputs, draw: int = 0) -> Array:
    """The velocity as `dit.velocity` computes it, the blocks read one at a time.

    Args:
      case: the model.
      inputs: latents, times, condition.
      draw: moves parameters; see floors.py.
    """
    walk = Walk(case, inputs, draw)
    for _ in walk.blocks():
        pass
    return walk.velocity()


def loss_terms(case: Case, batch: Batch, noise: Array, times: Times, draw: int = 0) -> tuple[Terms, Array]:
    """Terms of each sample's loss, and the velocity, as `objective.terms_at` computes them."""
    config = case.config
    noisy, target = flow.corrupt(batch.video_latents, noise, times[0])
    walk = Walk(case, (noisy, times[1], batch.condition), draw)
    pulls, pushes = [jnp.zeros_like(times[1])], [jnp.zeros_like(times[1])]
    if config.alignment.weight:
        targets, pulls, pushes = batch_targets(batch, config), [], []
    for i, streams, _ in walk.blocks():
        if config.alignment.weight and i < config.alignment.num_blocks:
            projector = case.moved(case.place(read_layer(case.leaves["projectors"], i), "projectors"), draw)
            pull, push = alignment.block_terms(projector, streams[1], targets, config.alignment)
            pulls.append(pull * batch.aligned)
            pushes.append(push * batch.aligned)
    predicted = walk.velocity()
    pull, push = (jnp.mean(jnp.stack(x), axis=0) for x in (pulls, pushes))
    return join_terms(flow.flow_errors(predicted, target), pull, push, times, jnp.int32(0), config), predicted


class Walk:
    """One pass through the transformer.

    Args:
      case: the model.
      inputs: latents, times, condition.
      draw: moves parameters; see floors.py.
    """

    def __init__(self, case: Case, inputs: Inputs, draw: int = 0) -> None:
        self._case, self._draw, config = case, draw, case.config.dit
        x, t, condition = inputs
        top = jax.tree.map(lambda leaf: np.asarray(leaf[()], np.float32), select(case.leaves["dit"], "blocks"))
        self._top = case.moved(case.place(top), draw)
        with case.on_mesh():
            embedded = embed(self._top, config, x, t, condition)
        sizes = [int(np.prod(dit.token_grid(config, x.shape)))]
        if condition.reference_latents is not None:
            sizes.append(int(np.prod(dit.token_grid(config, condition.reference_latents.shape))))
        self._streams, self._e, self._shape = embedded.streams, embedded.e, x.shape
        self._shared = embedded.shared._replace(sizes=tuple(sizes))

    def blocks(self) -> Iterator[tuple[int, Streams, Mapping[str, Array]]]:
        """Runs the blocks; yields the number of each, the streams after it, and what its operations returned.

        An operation's value is [B, tokens, D], video tokens first; `block` holds the streams as one array.
        """
        leaves, config, shared = self._case.leaves["dit"]["blocks"], self._case.config.dit, self._shared
        for i in range(config.num_layers):
            params = self._case.moved(self._case.place(read_layer(leaves, i), "blocks"), self._draw)
            with self._case.on_mesh():
                self._streams, found = run_block(
                    params, self._streams, shared._replace(sizes=()), config=config, sizes=shared.sizes
                )
            yield i, self._streams, found

    def velocity(self) -> Array:
        """The velocity, after the last block."""
        with self._case.on_mesh():
            return unembed(self._top, self._streams[0], self._e, config=self._case.config.dit, shape=self._shape)


@functools.partial(jax.jit, static_argnums=1)
def embed(params: Params, config: DiTConfig, x: Array, t: Array, condition: Condition) -> dit.Inputs:
    """As `dit.embed`, without the sizes of the streams, which are no arrays."""
    inputs = dit.embed(params, config, x, t, condition)
    return inputs._replace(shared=inputs.shared._replace(sizes=()))


@functools.partial(jax.jit, static_argnames=("config", "sizes"))
def run_block(
    params: Params, streams: Streams, shared: Shared, *, config: DiTConfig, sizes: tuple[int, ...]
) -> tuple[Streams, dict[str, Array]]:
    """One block: the streams after it, and the values of its operations, float32."""
    found: dict[str, list[Array]] = {name: [] for name in OPERATIONS}
    modules = {module: name for name, module in OPERATIONS.items()}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        if context.module.name in modules and context.method_name == "__call__":
            parts = out if isinstance(out, tuple) else [out]
            found[modules[context.module.name]] += [x.compute() if isinstance(x, Product) else x for x in parts]
        return out

    with nn.intercept_methods(note):
        after: Any = Block(config).apply({"params": params}, streams, shared._replace(sizes=sizes))
    found["block"] = list(after)
    return after, {
        name: jnp.concatenate([x[:, :n].astype(jnp.float32) for x, n in zip(parts, sizes, strict=False)], axis=1)
        for name, parts in found.items()
    }


@functools.partial(jax.jit, static_argnames=("config", "shape"))
def unembed(params: Params, video: Array, e: Array, *, config: DiTConfig, shape: tuple[int, ...]) -> Array:
    """As `dit.unembed`."""
    return dit.unembed(params, config, video, e, shape)
