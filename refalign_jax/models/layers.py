"""Linear and norm layers shared by the transformer's parts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from refalign_jax.sharding import TOKENS, constrain
from refalign_jax.types import Array, Float

LINEAR_OUTPUT = "linear"
"""Name under which a remat policy can keep the outputs of linear layers."""

HIDDEN_OUTPUT = "hidden"
"""The same of the feed-forward network's hidden layer, which is the widest."""


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision:
    """float32 means float32 on every platform: no TF32, no bfloat16 passes."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


@jax.custom_vjp
def matmul(x: Float[Array, "B T I"], kernel: Float[Array, "I O"]) -> Float[Array, "B T O"]:
    """Returns x @ kernel, with a weight gradient that is fast on CPUs too.

    XLA:CPU contracts two axes at once naively, 2.5 times slower for a whole MLP than the same product over
    flattened tokens; other platforms want the axes apart, since they may be sharded differently.
    """
    return jnp.einsum("bti,io->bto", x, kernel, precision=precision_of(x.dtype))


def _matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, kernel), (x, kernel)


def _matmul_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    precision = precision_of(x.dtype)

    def flattened(x: Array, g: Array) -> Array:
        return jnp.einsum("ti,to->io", x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]), precision=precision)

    def apart(x: Array, g: Array) -> Array:
        return jnp.einsum("bti,bto->io", x, g, precision=precision)

    dx = jnp.einsum("bto,io->bti", g, kernel, precision=precision)
    return dx, jax.lax.platform_dependent(x, g, cpu=flattened, default=apart)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nn.Module):
    """Maps to x @ kernel + bias over the last axis of [B, T, I], in `dtype`; parameters start as float32.

    The output lies on the mesh at `place` and is kept by remat policies that keep `kept_as`.
    """

    features: int
    dtype: jnp.dtype
    place: PartitionSpec = TOKENS
    kept_as: str = LINEAR_OUTPUT
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """Returns [B, T, features]."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = constrain(matmul(x.astype(self.dtype), kernel.astype(self.dtype)), self.place)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return checkpoint_name(y, self.kept_as)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32; returns x's dtype."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Returns x normalised, shape kept."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


def layer_norm(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """(x - mean) / std over the last axis without affine, in and to float32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
