"""Attention one head after the other against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refalign_jax.models.by_head import attend_by_head

Q, K, V = (jax.random.normal(key, (2, 9, 3, 8)) for key in jax.random.split(jax.random.key(0), 3))
BIAS = jax.random.normal(jax.random.key(1), (3, 9, 9))
MASK = (jnp.arange(9) < jnp.asarray([[9], [4]])).astype(jnp.int32)


@pytest.mark.parametrize("bias", [None, BIAS], ids=["plain", "bias"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "mask"])
def test_equals_attention_of_all_heads_at_once(bias, mask):
    ours = attend_by_head(Q, K, V, 0.7, bias, mask)
    theirs = jax.nn.dot_product_attention(
        Q, K, V, None if bias is None else bias[None], None if mask is None else mask[:, None, None, :] > 0, scale=0.7
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_scores_beyond_the_range_of_exp():
    ours = attend_by_head(100 * Q, 100 * K, V, 1.0)
    np.testing.assert_allclose(ours, jax.nn.dot_product_attention(100 * Q, 100 * K, V, scale=1.0), atol=1e-5)


def test_a_sample_that_is_all_padding_stays_finite():
    assert bool(jnp.isfinite(attend_by_head(Q, K, V, 1.0, BIAS, MASK * 0)).all())


def test_bfloat16_keeps_its_dtype_and_sums_in_float32():
    tokens = 2000
    ones = jnp.ones((1, tokens, 1, 8), jnp.bfloat16)
    ours = attend_by_head(ones, ones, ones, 1.0)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, jnp.ones_like(ours))  # a bfloat16 sum of 2,000 ones would stop at 256
