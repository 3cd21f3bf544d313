"""Measures the memory of the alignment loss beside the plain formulation over one matrix of all reference tokens.

    python tools/benchmark_alignment.py --references 3 --tokens 1560

Both are compiled, run and compared: temporary memory, loss, and the relative difference of the gradients.
"""

from refalign_jax.command import run

# isort: split
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from refalign_jax.alignment import alignment_loss, alignment_terms, init_projectors, make_targets, project
from refalign_jax.config import AlignmentConfig
from refalign_jax.types import Array, Float, Params


def plain_loss(
    projectors: Params, features: Float[Array, "A 1 R P D"], targets: Float[Array, "1 R P E"], config: AlignmentConfig
) -> Float[Array, ""]:
    """The published formulation: all tokens against all tokens, other subjects picked from the (R·P)² matrix."""
    R, P, E = targets.shape[1:]
    subject = jnp.repeat(jnp.arange(R), P)
    other = subject[:, None] != subject[None, :]
    f = targets.reshape(R * P, E)
    f = f / jnp.linalg.norm(f, axis=-1, keepdims=True)
    total = jnp.zeros(())
    for block in range(features.shape[0]):
        params = jax.tree.map(lambda x, i=block: x[i], projectors)
        s = project(params, features[block].reshape(1, R * P, -1), (P, 1), config)[0]
        s = s / jnp.linalg.norm(s, axis=-1, keepdims=True)
        cosine = jnp.matmul(s, f.T, precision="highest")
        pull = jnp.mean(jax.nn.relu(1 - jnp.diagonal(cosine) - config.pull_margin))
        push = jnp.sum(jax.nn.relu(config.push_margin - 1 + cosine) * other) / jnp.sum(other)
        total += config.pull_weight * pull + config.push_weight * push
    return total / features.shape[0]


def benchmark_alignment(
    *, references: int = 3, tokens: int = 1560, width: int = 1536, vfm_width: int = 1024, num_blocks: int = 9
) -> None:
    """Compiles value and gradient of both, prints their temporary memory, runs them and compares.

    Args:
      references: R, the number of references.
      tokens: P, the tokens of one reference.
      width: D, the width of the transformer.
      vfm_width: E, the width of the VFM's features.
      num_blocks: A, the number of aligned blocks.
    """
    config = AlignmentConfig(num_blocks=num_blocks, vfm_width=vfm_width)
    projectors = init_projectors(config, width, jax.random.key(0))
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.standard_normal((num_blocks, 1, references, tokens, width)), jnp.float32)
    targets = jnp.asarray(rng.standard_normal((1, references, tokens, vfm_width)), jnp.float32)

    def ours(projectors: Params, features: Array, targets: Array) -> Array:
        ids, counts = jnp.arange(references)[None], jnp.full((1,), references)
        made = make_targets(targets, ids, counts, (tokens, 1), config)
        return alignment_loss(*alignment_terms(projectors, features, made, config), config)[0]

    results = {}

    def plain(projectors: Params, features: Array, targets: Array) -> Array:
        return plain_loss(projectors, features, targets, config)

    for name, loss in (("ours", ours), ("plain", plain)):
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(projectors, features, targets).compile()
        analysis: Any = compiled.memory_analysis()
        temporary = analysis.temp_size_in_bytes
        started = time.perf_counter()
        value, gradient = jax.block_until_ready(compiled(projectors, features, targets))
        seconds = time.perf_counter() - started
        results[name] = (temporary, gradient)
        print(f"{name}: {temporary / 2**20:,.0f} MiB temporary, loss {value:.7f}, {seconds:.1f} s")
    (ours_bytes, a), (plain_bytes, b) = results["ours"], results["plain"]
    errors = [
        float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    ]
    print(f"memory ratio 1/{plain_bytes / ours_bytes:.1f}; gradients differ by at most {max(errors):.1e} (relative)")


def main(arguments: list[str], prog: str) -> None:
    """Parses and measures."""
    tyro.cli(benchmark_alignment, args=arguments, prog=prog, description=__doc__)


if __name__ == "__main__":
    run(main)
