"""The multistep solvers against diffusers' schedulers, on the schedulers' own noise levels."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from refalign_jax.config import SamplingConfig
from refalign_jax.sampling import noise_levels
from refalign_jax.solvers import SOLVERS

COMMON = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
SCHEDULERS = {
    "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **COMMON),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(solver_type="bh2", **COMMON),
}


@pytest.mark.parametrize("table", ["diffusers-0.36", "diffusers-0.37", "wan"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_solver(name, table):
    """Twenty steps along a velocity that is no straight line, at our table of noise levels."""
    theirs = SCHEDULERS[name]()
    theirs.set_timesteps(20)
    levels = noise_levels(SamplingConfig(solver=name, num_steps=20, sigmas=table))
    theirs.sigmas = torch.from_numpy(np.append(levels, 0).astype(np.float32))
    sigmas = theirs.sigmas.double().numpy()
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    solver = SOLVERS[name]
    rows = jnp.asarray(solver.tables(sigmas), jnp.float32)
    ours, memory, sample = jnp.asarray(x), solver.begin(jnp.asarray(x)), torch.from_numpy(x)
    for i, t in enumerate(theirs.timesteps):
        drive = np.float32(sigmas[i])
        memory, ours = solver.step(rows[i], memory, ours, jnp.tanh(2 * ours) + drive * ours)
        sample = theirs.step(torch.tanh(2 * sample) + drive * sample, t, sample, return_dict=False)[0]
    assert np.linalg.norm(np.asarray(ours) - sample.numpy()) <= 1e-5 * np.linalg.norm(sample.numpy())


@pytest.mark.parametrize("steps", [4, 8, 20, 50])
@pytest.mark.parametrize(("name", "table"), [("unipc", "diffusers-0.37"), ("dpm++", "diffusers-0.36")])
def test_tables_are_diffusers(name, table, steps):
    """DPM++ of diffusers has kept the table that its UniPC had up to 0.36."""
    theirs = SCHEDULERS[name]()
    theirs.set_timesteps(steps)
    levels = noise_levels(SamplingConfig(solver=name, num_steps=steps, sigmas=table))
    np.testing.assert_array_equal(np.append(levels, 0).astype(np.float32), theirs.sigmas.numpy())
    np.testing.assert_array_equal(np.trunc(1000 * levels), theirs.timesteps.numpy())
