"""The multistep solvers against diffusers' schedulers, on the schedulers' own noise levels."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from refalign_jax.solvers import SOLVERS

COMMON = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}


@pytest.mark.parametrize("first", [None, 0.9998])
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("dpm++", lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **COMMON)),
        ("unipc", lambda: diffusers.UniPCMultistepScheduler(solver_type="bh2", **COMMON)),
    ],
)
def test_solver(name, scheduler, first):
    """Twenty steps along a velocity that is no straight line."""
    theirs = scheduler()
    theirs.set_timesteps(20)
    if first is not None:  # Wan's own table begins there
        theirs.sigmas[0] = first
    sigmas = theirs.sigmas.double().numpy()
    assert sigmas[-1] == 0
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    solver = SOLVERS[name]
    rows = jnp.asarray(solver.tables(sigmas), jnp.float32)
    ours, memory, sample = jnp.asarray(x), solver.begin(jnp.asarray(x)), torch.from_numpy(x)
    for i, t in enumerate(theirs.timesteps):
        drive = np.float32(sigmas[i])
        memory, ours = solver.step(rows[i], memory, ours, jnp.tanh(2 * ours) + drive * ours)
        sample = theirs.step(torch.tanh(2 * sample) + drive * sample, t, sample, return_dict=False)[0]
    assert np.linalg.norm(np.asarray(ours) - sample.numpy()) <= 1e-5 * np.linalg.norm(sample.numpy())
