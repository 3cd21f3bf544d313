"""Solvers of the probability-flow equation dx/dσ = v, each a table of coefficients and a step.

`sampling.sample` scans a solver over the steps of a schedule. Another solver is a new file here, one line in `SOLVERS`
and its name in `SamplingConfig.solver`; see docs/extending.md.
"""

from refalign_jax.solvers.dpm import DPM_2M
from refalign_jax.solvers.euler import EULER
from refalign_jax.solvers.interface import Solver
from refalign_jax.solvers.unipc import UNIPC

SOLVERS: dict[str, Solver] = {"euler": EULER, "dpm++": DPM_2M, "unipc": UNIPC}
"""The solvers by the name that `SamplingConfig.solver` gives."""

__all__ = ["SOLVERS", "Solver"]
