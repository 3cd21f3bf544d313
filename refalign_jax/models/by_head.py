"""Attention of the frozen encoders, one head after the other.

    out_i = Σ_j e_ij v_j / Σ_j e_ij,   e_ij = exp(s_ij − max_j s_ij),   s_ij = scale · q_i·k_j + bias_ij

Their sequences are short (512 tokens, 1,565 patches of 480×832 pixels) and float32 counts, which the fused kernels do
not take. The scores of one head stay in a CPU's cache, those of all heads do not, and the memory no longer grows with
the number of heads; samples of the batch are computed together, so an accelerator has its work. The sum divides the
product with v, not the scores: K numbers a query instead of as many as there are keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from refalign_jax.types import Array, Float, Int


def attend_by_head(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N K"],
    scale: float,
    bias: Float[Array, "N T T"] | None = None,
    mask: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N K"]:
    """Attends from every token to all tokens of its sample that `mask` lets through.

    Args:
      q: queries.
      k: keys.
      v: values.
      scale: factor of the scores, such as 1/√K.
      bias: added to the scores of each head, float32; None, nothing.
      mask: 1 for tokens to attend to, 0 for padding; None, all.

    Returns:
      The attended values in q's dtype; scores, softmax and sums are float32.
    """
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    q, k, v = (jnp.moveaxis(x, 2, 0) for x in (q, k, v))

    def one_head(inputs: tuple[Array, Array, Array, Array | None]) -> Array:
        q, k, v, bias = inputs
        scores = scale * jnp.einsum("bik,bjk->bij", q, k, precision=precision, preferred_element_type=jnp.float32)
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = jnp.where(mask[:, None, :] > 0, scores, jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        summed = jnp.einsum(
            "bij,bjk->bik", weights.astype(v.dtype), v, precision=precision, preferred_element_type=jnp.float32
        )
        return (summed / total).astype(q.dtype)

    return jnp.moveaxis(jax.lax.map(one_head, (q, k, v, bias)), 0, 2)
