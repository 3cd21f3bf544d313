"""What storing VFM targets as int8 does to the alignment loss."""

import jax.numpy as jnp
import numpy as np
import pytest

from refalign_jax.alignment import pull_push
from refalign_jax.config import AlignmentConfig
from refalign_jax.data.examples import cosines, quantize


@pytest.mark.parametrize("likeness", [0.0, 0.5, 0.9])
def test_int8_targets_hardly_change_the_loss(likeness):
    """Gaussian targets as wide as ViT-L's; students at several cosines to them."""
    rng = np.random.default_rng(0)
    targets = rng.standard_normal((1, 3, 64, 1024)).astype(np.float32)
    noise = rng.standard_normal(targets.shape).astype(np.float32)
    student = jnp.asarray(likeness * targets + (1 - likeness**2) ** 0.5 * noise)
    q, scales = quantize(targets)
    rounded = q * scales
    assert cosines(targets, rounded).mean() >= 0.9999
    ids, real = jnp.arange(3)[None], jnp.ones((1, 3), bool)
    exact, stored = (
        np.array(pull_push(student, jnp.asarray(f), ids, real, AlignmentConfig())) for f in (targets, rounded)
    )
    change = np.abs(stored.sum() - exact.sum()) / exact.sum()
    print(f"student at cosine {likeness}: L_RA {exact.sum():.5f}, relative change {change:.1e}")
    assert change <= 1e-3
