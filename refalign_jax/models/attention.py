"""Scaled dot-product attention behind one function; the kernels are JAX's.

    attention(q, k, v)_i = Σ_j softmax_j(q_i·k_j / √K) v_j

Padding is a suffix of the sequence and is given as a length a sample, never as a mask of tokens by tokens.
"""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from refalign_jax.config import AttentionKernel
from refalign_jax.types import Array, Float, Int

ATTENTION_OUTPUT = "attention"
"""Name under which a remat policy can keep attention outputs."""


def attention(
    q: Float[Array, "B Q N K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N K"],
    lengths: Int[Array, " B"] | None = None,
    kernel: AttentionKernel = "auto",
) -> Float[Array, "B Q N K"]:
    """Attends from every query to the first `lengths` keys of its sample.

    Args:
      q: queries.
      k: keys.
      v: values; behind `lengths` any finite number, which changes nothing.
      lengths: keys that count in each sample; None, all.
      kernel: `xla`, `cudnn` (NVIDIA, 16-bit), or `auto`: the fast one of the platform.

    Returns:
      The attended values in q's dtype; softmax runs in float32.
    """
    if kernel == "auto":
        kernel = "cudnn" if jax.default_backend() == "gpu" and q.dtype != jnp.float32 else "xla"
    exact = jax.default_matmul_precision("highest") if q.dtype == jnp.float32 else contextlib.nullcontext()
    with exact:
        out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation=kernel)
    return checkpoint_name(out, ATTENTION_OUTPUT)
