"""Linear and norm layers, and the stacks of layers of every network.

A network of N equal layers has the parameters of one layer, each array with a leading axis of length N. `init_stack`
draws them; the network runs them with `jax.lax.scan` over that axis, so that one layer is compiled, whatever N is.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from refalign_jax.sharding import TOKENS, constrain, is_split
from refalign_jax.types import Array, Float

LINEAR_OUTPUT = "linear"
"""Checkpoint name of the outputs of linear layers."""

HIDDEN_OUTPUT = "hidden"
"""Checkpoint name of the feed-forward network's hidden layer, which is the widest."""


def init_stack(layer: nn.Module, num_layers: int, key: Array, *inputs: Any) -> dict[str, Any]:
    """Initialises a stack of layers, each at random by itself.

    Args:
      layer: one layer; it has no parent module.
      num_layers: N.
      key: random key.
      *inputs: what the layer is called with; their shapes alone matter.

    Returns:
      The parameters of one layer, float32, each array with a leading axis of length N.
    """
    return jax.vmap(lambda key: layer.init(key, *inputs)["params"])(jax.random.split(key, num_layers))


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision:
    """Returns the precision of a product in `dtype`: float32 without TF32 and without bfloat16 passes."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def matmul(x: Float[Array, "B T I"], kernel: Float[Array, "I O"]) -> Float[Array, "B T O"]:
    """Returns x @ kernel.

    Unless the axes of x are split over devices, B and T are flattened first, because XLA:CPU is slow at the kernel's
    gradient, which contracts both. This is what a mesh of CPU devices costs: without flattening, value and gradient of
    an MLP take 1.3 to 1.5 times as long (jax 0.10.2, widths 240 to 4,096). In a training step of the size of
    configs/demo.py, the difference is below the noise of the measurement, 5%.
    """
    precision = precision_of(x.dtype)
    if is_split():
        return jnp.einsum("bti,io->bto", x, kernel, precision=precision)
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, precision=precision)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


class Linear(nn.Module):
    """Maps [B, T, I] to x @ kernel + bias, computed in `dtype`; parameters are float32.

    Attributes:
      features: O, width of the output.
      dtype: compute dtype.
      place: how the output is split over the mesh.
      kept_as: checkpoint name of the output.
      use_bias: whether there is a bias.
      kernel_init: distribution of the initial kernel.
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


Affine = tuple[Float[Array, "I O"], Float[Array, " O"]]
"""A kernel in the compute dtype, and a bias in float32."""


class LinearParams(nn.Module):
    """The parameters of a `Linear`, for an operation that does more than one linear map."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, inputs: int) -> Affine:
        """Returns the kernel [inputs, features] and the bias."""
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), (inputs, self.features))
        return kernel.astype(self.dtype), self.param("bias", nn.initializers.zeros, (self.features,))


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


class MLP(nn.Module):
    """Linear, GELU (tanh), Linear."""

    hidden: int
    features: int
    dtype: jnp.dtype
    hidden_place: PartitionSpec
    place: PartitionSpec

    @nn.compact
    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """Returns [B, T, features]."""
        x = Linear(self.hidden, self.dtype, self.hidden_place, name="in")(x)
        return Linear(self.features, self.dtype, self.place, name="out")(nn.gelu(x, approximate=True))
