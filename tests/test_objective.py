"""The objective can be differentiated both ways."""

import jax
import jax.numpy as jnp
from support import tiny

from refalign_jax.objective import objective


def test_forward_mode_agrees_with_reverse_mode():
    params, batch = tiny.params(), tiny.batch([3])
    noise = jax.random.normal(jax.random.key(7), batch.video_latents.shape)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    direction = structure.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])

    def loss(params):
        return objective(params, batch, noise, jnp.array([40]), jnp.int32(0), tiny.MODEL)[0]

    _, forward = jax.jit(lambda p, d: jax.jvp(loss, (p,), (d,)))(params, direction)
    gradient = jax.jit(jax.grad(loss))(params)
    reverse = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    assert abs(float(forward - reverse)) <= 1e-4 * abs(float(reverse))
