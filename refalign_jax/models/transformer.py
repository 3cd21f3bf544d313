"""The transformer that is trained and sampled. Another one takes its place here; see docs/extending.md."""

from refalign_jax.models.dit import init as init_params
from refalign_jax.models.dit import observe, token_grid, velocity

__all__ = ["init_params", "observe", "token_grid", "velocity"]
