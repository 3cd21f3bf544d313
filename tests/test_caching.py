"""The cache of residuals: its rule written out, steps in parts, each video by itself, and branches on devices."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from refalign_jax.config import MeshConfig, SamplingConfig
from refalign_jax.models.condition import Condition
from refalign_jax.models.dit import Observer, embed, run_blocks, unembed
from refalign_jax.sampling import advance, begin, guided_steps, noise_levels, num_forwards, sample
from refalign_jax.sharding import make_mesh, replicated, state_sharding

CONFIG = SamplingConfig(num_steps=10, cache_threshold=0.4)
PARTLY = dataclasses.replace(CONFIG, guidance_interval=(0.6, 0.95))


@functools.cache
def inputs(*videos):
    """Some of two videos that change at different rates: the noise of the second is larger."""
    batch = tiny.batch([3, 2])
    negative = jnp.asarray(np.random.default_rng(5).standard_normal(batch.text.shape), jnp.float32)
    noise = batch.video_latents * jnp.array([1.0, 8.0])[:, None, None, None, None]
    prompt = Condition(batch.text, batch.reference_latents, batch.num_references)
    chosen = jnp.array(videos or (0,))
    return tiny.params()["dit"], *jax.tree.map(lambda x: x[chosen], (noise, prompt, prompt._replace(text=negative)))


def in_parts(args, config, parts=None):
    """The state after all steps, taken in parts."""
    params, noise, *conditions = args
    state = begin(params, noise, tuple(conditions), dit=tiny.DIT, config=config)
    for part in itertools.pairwise(parts or (0, config.num_steps)):
        state = advance(params, state, tuple(map(jnp.int32, part)), tuple(conditions), dit=tiny.DIT, config=config)
    return state


@functools.partial(jax.jit, static_argnums=5)
def blocks(params, x, t, condition, residual, run):
    """Velocity, residual, and time-modulated input of one video."""
    inputs = embed(params, tiny.DIT, x, t[None], condition)
    before = inputs.streams[0]
    if run:
        streams, _ = run_blocks(params["blocks"], tiny.DIT, inputs, Observer(0, lambda *_: None))
        residual = streams[0] - before
    shift, scale, *_ = jnp.split(inputs.shared.time + params["blocks"]["modulation"][0], 6, axis=1)
    velocity = unembed(params, tiny.DIT, before + residual, inputs.e, x.shape)
    centred = before - before.mean(-1, keepdims=True)
    normal = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + tiny.DIT.eps)
    return velocity, residual, normal * (1 + scale) + shift


def written_out(args, config):
    """Euler with three branches by the rule of the module's docstring, step by step; also the steps that ran."""
    params, x, prompt, negative = args
    guided = guided_steps(config)
    sigmas = np.append(noise_levels(config), 0)
    l1 = lambda a: float(jnp.abs(a).sum())  # noqa: E731
    residuals, gain, change, m, ran = [jnp.zeros((1, 12, 24))] * 3, np.inf, 0.0, None, []
    for i, sigma in enumerate(sigmas[:-1]):
        t = jnp.float32(1000 * sigma)
        now = blocks(params, x, t, prompt, residuals[0], False)[2]
        change += 0.0 if m is None else l1(now - m) / l1(m)
        m = now
        forced = i in (0, len(guided) - 1) or guided[i] != guided[i - 1]
        run = bool(forced or not gain * change < config.cache_threshold)
        ran += [i] if run else []
        used = (0, 1, 2) if guided[i] else (2,)
        found = {}
        for k in used:
            condition = (negative.without_references(), negative, prompt)[k]
            found[k] = blocks(params, x, t, condition, residuals[k], run)
        if run:
            old = {k: l1(residuals[k]) for k in used}
            new = [l1(found[k][1] - residuals[k]) / old[k] if old[k] else np.inf for k in used]
            gain, change = (max(new) / change if change else np.inf), 0.0
            residuals = [found[k][1] if k in found else residuals[k] for k in range(3)]
        v = {k: found[k][0] for k in used}
        total = v[0] + 5.0 * (v[1] - v[0]) + 7.5 * (v[2] - v[1]) if guided[i] else v[2]
        x = x + np.float32(sigmas[i + 1] - sigma) * total
    return x, ran


@pytest.mark.parametrize("config", [CONFIG, PARTLY], ids=["all", "interval"])
def test_the_rule(config):
    expected, ran = written_out(inputs(), config)
    state = in_parts(inputs(), config)
    assert 3 <= len(ran) < config.num_steps
    assert int(state.cache.runs) == sum(3 if guided_steps(config)[i] else 1 for i in ran)
    assert tiny.relative(state.x, expected) <= 1e-5


@pytest.mark.parametrize("solver", ["euler", "dpm++", "unipc"])
def test_steps_in_parts_are_the_whole(solver):
    config = dataclasses.replace(PARTLY, solver=solver, text_guidance=0.0 if solver == "dpm++" else 7.5)
    whole = in_parts(inputs(), config)
    assert int(whole.cache.runs) < num_forwards(config, references=True)
    np.testing.assert_array_equal(in_parts(inputs(), config, (0, 1, 5, 6, 10)).x, whole.x)


def test_a_threshold_that_nothing_passes_changes_nothing():
    config = dataclasses.replace(CONFIG, cache_threshold=1e-9, num_steps=4)
    state = in_parts(inputs(), config)
    assert int(state.cache.runs) == 3 * 4
    without = sample(*inputs(), dit=tiny.DIT, config=dataclasses.replace(config, cache_threshold=0.0))
    assert tiny.relative(state.x, without) <= 1e-6


def test_a_video_does_not_depend_on_its_batch():
    """Each reuses its residuals when it may; the blocks run when one of them needs it."""
    config = dataclasses.replace(CONFIG, cache_threshold=0.2)
    alone, together = [in_parts(inputs(i), config) for i in (0, 1)], in_parts(inputs(0, 1), config)
    runs = [int(state.cache.runs) for state in (*alone, together)]
    assert runs[0] != runs[1]
    assert runs[2] >= max(runs[:2])
    for i, state in enumerate(alone):
        assert tiny.relative(together.x[i], state.x[0]) <= 1e-5


def test_branches_of_one_video_run_on_different_devices():
    """With the interval and the cache too; each device does a third of the work of one after the other."""
    config = dataclasses.replace(PARTLY, batched_guidance=True)
    alone = in_parts(inputs(), PARTLY)
    mesh = make_mesh(MeshConfig())
    params, *rest = inputs()
    placed = jax.device_put(params, state_sharding(params, mesh)), *jax.device_put(tuple(rest), replicated(mesh))
    with jax.set_mesh(mesh):
        spread = in_parts(placed, config, (0, 1, 10))
        assert tiny.relative(spread.x, alone.x) <= 1e-5
        assert int(spread.cache.runs) == int(alone.cache.runs)
        plain = dataclasses.replace(CONFIG, cache_threshold=0.0)
        split, in_turn = (
            sample.lower(*placed, dit=tiny.DIT, config=dataclasses.replace(plain, batched_guidance=batched))
            .compile()
            .cost_analysis()["flops"]
            for batched in (True, False)
        )
    assert split < 0.4 * in_turn


def test_another_transformer_is_refused(monkeypatch):
    from refalign_jax.models import transformer

    monkeypatch.setattr(transformer, "velocity", lambda *_: None)
    with pytest.raises(ValueError, match="cache_threshold is for the transformer"):
        in_parts(inputs(), CONFIG)
