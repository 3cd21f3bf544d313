"""Every solver follows a velocity whose solution is known, at its order; Euler is its equation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refalign_jax.flow import schedule
from refalign_jax.solvers import SOLVERS


def solve(name, velocity, x, sigmas):
    """Runs a solver over sigmas, which end with 0."""
    solver = SOLVERS[name]
    rows = jax.tree.map(lambda table: jnp.asarray(table, jnp.float32), solver.tables(np.asarray(sigmas, np.float64)))

    def step(carry, inputs):
        memory, x = carry
        sigma, row = inputs
        return solver.step(row, memory, x, velocity(x, sigma)), None

    (_, x), _ = jax.lax.scan(step, (solver.begin(x), x), (jnp.asarray(sigmas[:-1], jnp.float32), rows))
    return x


def gaussian(x, sigma):
    """The velocity E[noise - x₀ | x] for data of mean 1 and deviation ½."""
    alpha = 1 - sigma
    gain = (sigma - alpha / 4) / (alpha**2 / 4 + sigma**2)
    return gain * (x - alpha) - 1


def moved(x, first, last=0.0):
    """Where the flow of `gaussian` takes x: the same number of deviations from the mean."""
    deviation = lambda s: np.sqrt((1 - s) ** 2 / 4 + s**2)  # noqa: E731
    return (x - (1 - first)) * deviation(last) / deviation(first) + (1 - last)


def error(name, steps):
    sigmas = np.append(schedule(steps, 3.0).sigmas, 0)
    sigmas[0] = 0.999
    x = np.linspace(-2, 2, 9)
    return float(np.abs(solve(name, gaussian, jnp.asarray(x, jnp.float32), sigmas) - moved(x, 0.999)).max())


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("dpm++", 2), ("unipc", 2)])
def test_error_falls_at_the_order(name, order):
    coarse, fine = error(name, 20), error(name, 40)
    assert fine < 0.1 / order
    assert coarse / fine > 0.8 * 2**order


def test_euler_is_its_equation():
    sigmas = np.append(schedule(4, 5.0).sigmas, np.float32(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal(5), jnp.float32)
    expected = x
    for now, following in itertools.pairwise(sigmas):
        expected = expected + (following - now) * jnp.tanh(expected)
    np.testing.assert_allclose(solve("euler", lambda x, _: jnp.tanh(x), x, sigmas), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_a_schedule_may_begin_with_noise_alone(name):
    sigmas = np.append(schedule(10, 5.0).sigmas, 0)
    assert sigmas[0] == 1
    x = solve(name, gaussian, jnp.linspace(-2, 2, 9), sigmas)
    assert bool(jnp.isfinite(x).all())
