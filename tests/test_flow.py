"""Schedules, corruption, target."""

import jax.numpy as jnp
import numpy as np
import pytest

from refalign_jax import flow
from refalign_jax.config import FlowConfig


def test_the_training_schedule_is_the_published_one(golden):
    values = np.load(golden / "dit_a" / "values.npz")
    table = flow.training_schedule(FlowConfig())
    np.testing.assert_allclose(table.timesteps, values["train_timesteps"], rtol=3e-7)
    np.testing.assert_allclose(table.weights, values["train_weights"], atol=2e-6)


@pytest.mark.parametrize(("steps", "shift"), [(1000, 5.0), (50, 5.0), (8, 1.0), (1, 3.0)])
def test_every_schedule_falls_from_noise_and_weighs_one_on_average(steps, shift):
    table = flow.schedule(steps, shift)
    assert table.sigmas[0] == 1
    assert (np.diff(table.sigmas) < 0).all()
    assert table.sigmas[-1] > 0
    assert len(set(table.timesteps.tolist())) == steps
    np.testing.assert_allclose(table.weights.mean(), 1, rtol=1e-5)


def test_a_step_along_the_target_recovers_the_data():
    rng = np.random.default_rng(0)
    x, noise = (jnp.asarray(rng.standard_normal((2, 2, 4, 4, 3)), jnp.float32) for _ in range(2))
    sigma = jnp.array([0.25, 1.0])
    noisy, target = flow.corrupt(x, noise, sigma)
    np.testing.assert_allclose(noisy - sigma[:, None, None, None, None] * target, x, atol=1e-6)
    np.testing.assert_allclose(noisy[1], noise[1], atol=1e-7)


def test_time_stays_float32_even_for_16_bit_latents():
    x = jnp.ones((1, 1, 2, 2, 1), jnp.bfloat16)
    noisy, target = flow.corrupt(x, jnp.zeros_like(x), jnp.array([0.001]))
    assert noisy.dtype == target.dtype == jnp.float32
    assert float(noisy[0, 0, 0, 0, 0]) == pytest.approx(0.999, abs=1e-7)
