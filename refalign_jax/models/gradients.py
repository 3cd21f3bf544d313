"""Operations of a block in forms that take few passes over the tokens, forwards and backwards.

    modulated product   (x̂·w + b) W = x̂ (w·W) + b W,   x̂ = (x − mean x)/σ
    gated product       γ·(a W + c) = a (W·γ) + γ·c
    RMS norm            R(x·w/rms x), R a rotation
    GELU product        g(a + c) W,   g(x) = x·(1 + tanh u)/2,  u = √(2/π)·(x + 0.044715·x³)

Where one device has a single sample, modulation and gate are multiplied into the kernels, which are smaller than the
tokens. Their gradients are then sums over the kernels' gradients rather than over all tokens, and the gated product
need not be computed again for the backward pass. Norms and GELU have gradients of their own, in float32 and rounded
once; derived ones would store results in between. On GPUs, the tokens' layout and what is stored are fixed, so that XLA
computes a norm, or its gradient and the sum with the residual's, in one pass.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from refalign_jax.models.layers import LINEAR_OUTPUT, Affine, matmul, precision_of
from refalign_jax.models.rope import Rotation, partner
from refalign_jax.sharding import BATCH, CONTEXT, DATA, FSDP, RING, TENSOR, axis_size, constrain, is_split, on_gpu
from refalign_jax.types import Array, Float

STATISTICS = "statistics"
"""Checkpoint name of 1/rms of every token."""

Modulation = tuple[Float[Array, "#B 1 D"], Float[Array, "#B 1 D"]]
"""What a normalised token is multiplied with, and what is added then, float32."""


@dataclasses.dataclass(frozen=True)
class Product:
    """(f(inputs) + common) @ kernel + bias, not computed yet.

    Attributes:
      inputs: in the compute dtype.
      kernel: in the compute dtype.
      bias: float32.
      common: what is added to all tokens of a sample, or of all samples, float32; None: nothing.
      inner: f(x) is GELU(x + inner), float32; None: f(x) is x.
    """

    inputs: Float[Array, "B T I"]
    kernel: Float[Array, "I O"]
    bias: Float[Array, " O"]
    common: Float[Array, "#B 1 I"] | None = None
    inner: Float[Array, "#B 1 I"] | None = None

    def times(self, kernel: Float[Array, "*each I O"]) -> Float[Array, "B T O"]:
        """Returns f(inputs) @ kernel, for any kernel, in the compute dtype."""
        return _product(self.inputs, kernel) if self.inner is None else gelu_product(self.inputs, self.inner, kernel)

    def compute(self) -> Float[Array, "B T O"]:
        """Returns the product in the compute dtype."""
        bias = self.bias if self.common is None else self.bias + _constant(self.common, self.kernel)
        return self.times(self.kernel) + bias.astype(self.inputs.dtype)


def modulated_products(
    x: Float[Array, "B T D"],
    modulation: Modulation,
    layers: tuple[Affine, ...],
    eps: float,
    number: int | None = None,
) -> list[tuple[Float[Array, "B U _"], Float[Array, "#B 1 _"]]]:
    """(LN(x)·weight + shift) @ kernel + bias for every layer, as a product and what is still to be added to it.

    Args:
      x: tokens, any float dtype.
      modulation: weight and shift, of each sample or of all.
      layers: kernels and biases.
      eps: added to the variance.
      number: U, how many tokens the products are for, the first ones; None: all. All are normalised, so that in the
        gradient norm and residual are one pass.

    Returns:
      Of every layer, the product in the kernel's dtype, and what all tokens of a sample, or of all samples, have in
      common, float32.
    """
    weight, shift = modulation
    dtype, shape = layers[0][0].dtype, (x.shape[0], 1, x.shape[2])
    if not is_alone(x.shape[0]):
        normal = modulated_norm(x, weight, shift, eps).astype(dtype)[:, :number]
        return [(matmul(normal, kernel), bias[None, None]) for kernel, bias in layers]
    normal, products = layer_norm(x, eps, dtype)[:, :number], []
    for kernel, bias in layers:
        weights, shifts = jnp.broadcast_to(weight, shape).swapaxes(1, 2), jnp.broadcast_to(shift, shape)
        scaled, constant = _weighted(kernel, weights, shifts)
        products.append((_product(normal, scaled), constant + bias))
    return products


def add_gated(x: Float[Array, "B T D"], gate: Float[Array, "B 1 D"], y: Product) -> Float[Array, "B T D"]:
    """x + gate·y, summed in float32, in x's dtype.

    Args:
      x: residual stream.
      gate: float32.
      y: what is added.
    """
    if is_alone(x.shape[0]):
        common = jnp.zeros((x.shape[0], 1, y.kernel.shape[0])) if y.common is None else y.common
        scaled, constant = _weighted(y.kernel, gate, common)
        added = y.times(scaled) + (gate * (constant + y.bias)).astype(y.inputs.dtype)
        return (x + checkpoint_name(added, LINEAR_OUTPUT)).astype(x.dtype)
    return (x + gate * checkpoint_name(y.compute(), LINEAR_OUTPUT)).astype(x.dtype)


def is_alone(samples: int) -> bool:
    """Whether a device has one sample, and modulations and gates are multiplied into kernels.

    Args:
      samples: how many there are on all devices of the ambient mesh.
    """
    if not is_split():
        return samples == 1
    return on_gpu() and axis_size(CONTEXT, RING, TENSOR) == 1 and samples == axis_size(DATA, FSDP)


@jax.custom_vjp
def _weighted(
    kernel: Float[Array, "I O"], weight: Float[Array, "B _ _"], shift: Float[Array, "B 1 I"]
) -> tuple[Float[Array, "B I O"], Float[Array, "B 1 O"]]:
    """The kernel with its input or output channels multiplied by the weights of each sample; and shift @ kernel."""
    kernel = _gathered(kernel)
    scaled = (kernel.astype(jnp.float32) * weight).astype(kernel.dtype)
    return constrain(scaled, BATCH), _constant(shift, kernel)


def _gathered(kernel: Float[Array, "I O"]) -> Float[Array, "I O"]:
    """The kernel on every device. Without a barrier it would be gathered in float32, after what is done to it."""
    return jax.lax.optimization_barrier(constrain(kernel, PartitionSpec())) if is_split() else kernel


def _weighted_backward(kept: tuple[Array, ...], gradients: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    kernel, weight, shift = kept
    dscaled, dconstant = gradients
    wide, dscaled = _gathered(kernel).astype(jnp.float32), dscaled.astype(jnp.float32)
    # rounded before it is summed over the devices
    dkernel = (dscaled * weight + shift.swapaxes(1, 2) * dconstant).astype(kernel.dtype)
    dkernel = jax.lax.reduce(dkernel, jnp.zeros((), kernel.dtype), jax.lax.add, (0,))
    dweight = jnp.sum(dscaled * wide, 2 if weight.shape[2] == 1 else 1, keepdims=True)
    return dkernel, dweight, jnp.sum(dconstant * wide, 2)[:, None]


_weighted.defvjp(lambda *inputs: (_weighted(*inputs), inputs), _weighted_backward)


def _product(x: Float[Array, "B T I"], kernel: Float[Array, "*each I O"]) -> Float[Array, "B T O"]:
    """x @ kernel, of all samples or of each."""
    if kernel.ndim == 2:
        return matmul(x, kernel)
    if len(x) == 1:
        return matmul(x, kernel[0])
    return jnp.einsum("bti,bio->bto", x, kernel, precision=precision_of(x.dtype))


def _constant(y: Float[Array, "#B 1 I"], kernel: Float[Array, "I O"]) -> Float[Array, "#B 1 O"]:
    """y @ kernel, float32."""
    return jnp.sum(y.swapaxes(1, 2) * kernel.astype(jnp.float32), axis=1, keepdims=True)


def modulated_norm(
    x: Float[Array, "B T D"], weight: Float[Array, "#B 1 D"], shift: Float[Array, "#B 1 D"], eps: float
) -> Float[Array, "B T D"]:
    """LN(x)·weight + shift, float32."""
    return layer_norm(x, eps, jnp.float32) * weight + shift


def by_token(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """x, which GPUs store token by token, like its gradient.

    Left to itself, XLA:GPU stores the residual stream channel by channel. Then mean, variance and result of a norm are
    a pass each, and so are those of its gradient; here they are one pass. TPUs store arrays in tiles, which their
    compiler chooses.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if on_gpu() else x


def stored(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """x, which is stored on GPUs rather than computed again by all that read it; likewise its gradient."""
    return jax.lax.optimization_barrier(x) if on_gpu() else x


@jax.custom_vjp
def stored_gradient(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """x, whose gradient alone is `stored`."""
    return x


stored_gradient.defvjp(lambda x: (x, None), lambda _, gradient: (stored(gradient),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def layer_norm(x: Float[Array, "B T D"], eps: float, dtype: Any) -> Float[Array, "B T D"]:
    """(x − mean x)/σ over the last axis, computed in float32, as `dtype`."""
    normal, scale = _centred(x, eps)
    return (normal * scale).astype(dtype)


def _centred(x: Array, eps: float) -> tuple[Array, Array]:
    """x − mean x and 1/σ, float32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x, jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def _layer_norm_backward(eps: float, dtype: Any, x: Array, gradient: Array) -> tuple[Array]:
    del dtype
    # Halving x is exact. Otherwise XLA would store the sums of the norm above, instead of fusing norm and sums.
    centred, scale = _centred(0.5 * x, eps / 4)
    normal, g = centred * scale, gradient.astype(jnp.float32)
    g = g - jnp.mean(g, axis=-1, keepdims=True) - normal * jnp.mean(g * normal, axis=-1, keepdims=True)
    return ((0.5 * scale * g).astype(x.dtype),)


layer_norm.defvjp(lambda x, eps, dtype: (layer_norm(x, eps, dtype), x), _layer_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def rms_norm(
    x: Float[Array, "B T N K"], weight: Float[Array, "N K"], turn: Rotation | None, eps: float
) -> Float[Array, "B T N K"]:
    """x / rms(x) · weight, the mean taken over all heads; then rotated.

    Args:
      x: queries or keys.
      weight: float32.
      turn: cosines and sines of each token, which get no gradient; None: not rotated.
      eps: added to the mean square.

    Returns:
      The result in x's dtype.
    """
    return _rms_forward(x, weight, turn, eps)[0]


def _rms_forward(x: Array, weight: Array, turn: Rotation | None, eps: float) -> tuple[Array, Any]:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=(2, 3), keepdims=True) + eps)
    inverse = checkpoint_name(inverse, STATISTICS)
    y = wide * weight
    if turn is not None:
        cos, sin = turn
        swapped = jnp.flip(weight.reshape(*weight.shape[:-1], -1, 2), axis=-1).reshape(weight.shape)
        y = y * cos + partner(x) * swapped * sin
    y = (y * inverse).astype(x.dtype)
    return y, (x, y, weight, turn, inverse)


def _rms_backward(eps: float, kept: Any, gradient: Array) -> tuple[Array, Array, Any]:
    del eps
    x, y, weight, turn, inverse = kept
    g, wide = gradient.astype(jnp.float32), x.astype(jnp.float32)
    y = jax.lax.optimization_barrier(y).astype(jnp.float32)  # or XLA would store y before it was rounded, too
    inner = jnp.mean(g * y, axis=(2, 3), keepdims=True)  # mean(g·x·w)/rms: rotating both is nothing
    if turn is not None:
        cos, sin = turn
        turned = (g * cos - partner(gradient) * sin).astype(x.dtype)  # stored for two uses, so rounded
        g = jax.lax.optimization_barrier(turned).astype(jnp.float32)
    dweight = jnp.sum(g * (wide * inverse), axis=(0, 1))
    tables = None if turn is None else tuple(jnp.zeros_like(table) for table in turn)
    return (inverse * (g * weight - wide * (inverse * inner))).astype(x.dtype), dweight, tables


rms_norm.defvjp(_rms_forward, _rms_backward)


@jax.custom_vjp
def gelu_product(
    x: Float[Array, "B T I"], bias: Float[Array, "#B 1 I"], kernel: Float[Array, "*each I O"]
) -> Float[Array, "B T O"]:
    """GELU(x + bias) @ kernel, with GELU in its tanh form.

    Args:
      x: in the compute dtype.
      bias: float32, rounded to x's dtype.
      kernel: in the compute dtype, of all samples or of each.

    Returns:
      The product in the compute dtype. For its gradient, GELU and its derivative are computed in one pass over x.
    """
    wide = _biased(x, bias)
    return _product((wide * _gelu_share(wide)).astype(x.dtype), kernel)


def _biased(x: Array, bias: Array) -> Array:
    """x + bias, rounded to x's dtype, as float32."""
    return (x + bias.astype(x.dtype)).astype(jnp.float32)


def _gelu_share(x: Array) -> Array:
    """(1 + tanh u)/2, as the logistic function of 2u, which XLA computes again rather than storing it."""
    return jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def _gelu_product_backward(kept: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    x, bias, kernel = kept
    (g,) = jax.linear_transpose(lambda y: _product(y, kernel), x)(gradient)
    if on_gpu():  # or XLA would compute GELU before g is there, in a pass of its own; for TPUs, within the product
        x, g = jax.lax.optimization_barrier((x, g))
    wide = _biased(x, bias)
    share = _gelu_share(wide)
    inner = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * jnp.square(wide))
    dx = (g.astype(jnp.float32) * (share + wide * share * (1 - share) * inner)).astype(x.dtype)
    y = (wide * share).astype(x.dtype)
    (dkernel,) = jax.linear_transpose(lambda kernel: _product(y, kernel), kernel)(gradient)
    axes = (0, 1) if bias.shape[0] == 1 else (1,)
    return dx, jnp.sum(dx.astype(jnp.float32), axes, keepdims=True), dkernel


gelu_product.defvjp(lambda *inputs: (gelu_product(*inputs), inputs), _gelu_product_backward)
