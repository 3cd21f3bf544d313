"""AdamW against optax's own, the schedules' values, frozen parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import tiny

from refalign_jax.config import OptimizerConfig
from refalign_jax.initial import model_shapes
from refalign_jax.trainer.optimizer import init_optimizer, learning_rate, merge, moving_average, split, update


def rates(config: OptimizerConfig, num_steps: int) -> np.ndarray:
    return np.asarray(jax.vmap(lambda k: learning_rate(k, config, num_steps))(jnp.arange(num_steps)))


def test_constant_is_constant_from_the_first_step():
    np.testing.assert_array_equal(rates(OptimizerConfig(learning_rate=5e-5), 20), np.float32(5e-5))


def test_warmup_rises_linearly_to_the_peak_and_stays():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    np.testing.assert_allclose(rates(config, 7), [0.25, 0.5, 0.75, 1, 1, 1, 1])


def test_cosine_falls_from_the_peak_after_warmup_to_its_final_share():
    config = OptimizerConfig(learning_rate=2.0, schedule="cosine", warmup_steps=5, final_share=0.1)
    values = rates(config, 105)
    assert values[4] == values[5] == 2
    assert values[55] == pytest.approx(2 * 0.55)
    assert (np.diff(values[5:]) < 0).all()
    assert values[-1] == pytest.approx(0.2, abs=1e-3)
    assert float(learning_rate(jnp.int32(105), config, 105)) == pytest.approx(0.2)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_five_steps_are_those_of_optax_adamw(clip):
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip=clip)
    chain = [optax.clip_by_global_norm(clip)] if clip else []
    reference = optax.chain(*chain, optax.adamw(1e-2, 0.9, 0.999, 1e-8, weight_decay=0.1))
    theirs = params = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(4)}
    state, their_state = init_optimizer(params, config), reference.init(params)
    for k in range(5):
        gradient = jax.tree.map(lambda x, k=k: jnp.cos(3 * x + k) * (k + 1), params)
        params, state = update(gradient, state, params, learning_rate(k, config, 5), config)
        changes, their_state = reference.update(gradient, their_state, theirs)
        theirs = optax.apply_updates(theirs, changes)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_frozen_parameters_have_no_moments():
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), model_shapes(tiny.MODEL))
    trained, frozen = split(params, ("dit/blocks/ffn/*", "dit/*bias"))
    assert set(frozen["dit"]["blocks"]["ffn"]["in"]) == {"kernel", "bias"}
    assert set(frozen["dit"]["blocks"]["self_attention"]["query"]) == {"bias"}
    assert "ffn" not in trained["dit"]["blocks"]
    assert trained["projectors"].keys() == params["projectors"].keys()
    joined = merge(trained, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(params), strict=True):
        assert a is b
    state = init_optimizer(params, OptimizerConfig(freeze=("dit/blocks/ffn/*", "dit/*bias")))
    assert jax.tree.structure(state[1].mu) == jax.tree.structure(trained)


def test_patterns_that_freeze_nothing_or_everything_are_refused():
    with pytest.raises(ValueError, match=r"no parameter is called 'dit/block/\*'"):
        split(model_shapes(tiny.MODEL), ("dit/block/*",))
    with pytest.raises(ValueError, match="freezes every parameter"):
        split(model_shapes(tiny.MODEL), ("*",))


def test_moving_average_approaches_the_parameters():
    average = {"x": jnp.zeros(2)}
    for _ in range(3):
        average = moving_average(average, {"x": jnp.array([1.0, -2.0])}, 0.9)
    np.testing.assert_allclose(average["x"], np.array([1, -2]) * (1 - 0.9**3), rtol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("beta2", 1.0),
        ("ema_decay", -0.1),
        ("accumulation", 0),
        ("clip", -1.0),
        ("final_share", 2.0),
        ("schedule", "linear"),
    ],
)
def test_numbers_without_meaning_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"OptimizerConfig.*{field}="):
        OptimizerConfig(**{field: value})
