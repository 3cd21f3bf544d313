"""The objective can be differentiated both ways."""

import dataclasses

import jax
import jax.numpy as jnp
from support import tiny

from refalign_jax.models import block, gradients
from refalign_jax.objective import objective


def test_forward_mode_agrees_with_reverse_mode(monkeypatch):
    """Forward mode derives the functions for which reverse mode has gradients written by hand."""
    params, batch = tiny.params(), tiny.batch([3])
    noise = jax.random.normal(jax.random.key(7), batch.video_latents.shape)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    direction = structure.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])

    def loss(params):
        return objective(params, batch, noise, jnp.array([40]), jnp.int32(0), tiny.MODEL)[0]

    gradient = jax.jit(jax.grad(loss))(params)
    written = [(m, n, f) for m in (gradients, block) for n, f in vars(m).items() if isinstance(f, jax.custom_vjp)]
    assert {name for _, name, _ in written} >= {"layer_norm", "rms_norm", "gelu_product", "stored_gradient"}
    for module, name, function in written:
        monkeypatch.setattr(module, name, function.fun)
    _, forward = jax.jit(lambda p, d: jax.jvp(loss, (p,), (d,)))(params, direction)
    reverse = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    assert abs(float(forward - reverse)) <= 1e-4 * abs(float(reverse))


def test_a_batch_without_padding_may_leave_out_the_number_of_references():
    params, batch = tiny.params(), tiny.batch([3, 3])
    noise = jax.random.normal(jax.random.key(7), batch.video_latents.shape)

    @jax.jit
    def value_and_gradient(batch):
        loss = lambda params: objective(params, batch, noise, jnp.array([40, 700]), jnp.int32(0), tiny.MODEL)[0]  # noqa: E731
        return jax.value_and_grad(loss)(params)

    counted, left_out = (value_and_gradient(b) for b in (batch, batch._replace(num_references=None)))
    for ours, theirs in zip(*map(jax.tree.leaves, (left_out, counted)), strict=True):
        assert tiny.relative(ours, theirs) <= 1e-6
    assert batch._replace(num_references=None).counts.tolist() == [3, 3]
    fewer = value_and_gradient(batch._replace(num_references=jnp.array([3, 2])))
    assert abs(float(fewer[0] - counted[0])) > 1e-4


def test_no_aligned_block_is_computed_after_the_stop():
    """After the step, projectors of NaN change neither the loss nor a gradient: what is not computed can't spread."""
    config = dataclasses.replace(tiny.MODEL, alignment=dataclasses.replace(tiny.MODEL.alignment, stop_step=10))
    params, batch = tiny.params(), tiny.batch([3])
    noise = jax.random.normal(jax.random.key(7), batch.video_latents.shape)

    @jax.jit
    def value_and_gradient(params, step):
        def loss(params):
            loss, terms = objective(params, batch, noise, jnp.array([40]), step, config)
            return loss, terms

        return jax.value_and_grad(loss, has_aux=True)(params)

    broken = {**params, "projectors": jax.tree.map(lambda x: x * jnp.nan, params["projectors"])}
    (before, _), _ = value_and_gradient(broken, jnp.int32(9))
    (after, terms), gradient = value_and_gradient(broken, jnp.int32(10))
    assert jnp.isnan(before)
    assert jnp.allclose(after, jnp.mean(terms.weight * terms.flow))
    assert float(terms.pull[0]) == float(terms.push[0]) == 0
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient))
    (aligned, _), _ = value_and_gradient(params, jnp.int32(9))
    assert aligned > after
