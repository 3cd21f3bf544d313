"""EfficientNet-lite: a small convolutional network trained on ImageNet, as a classifier and as features on a grid.

A stem convolution of stride 2 is followed by inverted bottlenecks. Each widens its input with a 1x1 convolution,
filters every channel by itself, narrows with a 1x1 convolution, and adds its input where stride and width allow. Every
convolution is followed by batch normalisation with the stored mean and variance and, except the narrowing one, by
ReLU6. The lite networks have neither squeeze-and-excitation nor swish. Padding is TensorFlow's SAME: an even side that
is halved is padded at its end only. The classifier is one more 1x1 convolution, the mean over space, and a linear map.
All of it is float32: the network is small, and in bfloat16 lite0's features are 6% off.

Source: Tan and Le 2019 (arXiv 1905.11946) and the TensorFlow TPU repository's efficientnet/lite.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from refalign_jax.types import Array, Float, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A row of equal blocks; the stride is the first block's.

    Attributes:
      num_blocks: number of blocks.
      kernel: side of the filters.
      stride: of the first block, 1 or 2.
      expansion: factor by which a block widens its input; 1 leaves out the widening convolution.
      width: channels of the outputs.
    """

    num_blocks: int
    kernel: int
    stride: int
    expansion: int
    width: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientNetConfig:
    """Sizes and options; the defaults are lite0.

    Attributes:
      stem_width: channels after the stem.
      stages: the rows of blocks.
      head_width: channels before the mean over space.
      num_classes: number of logits.
      eps: added to the variance in every batch normalisation.
    """

    stem_width: int = 32
    stages: tuple[Stage, ...] = (
        Stage(num_blocks=1, kernel=3, stride=1, expansion=1, width=16),
        Stage(num_blocks=2, kernel=3, stride=2, expansion=6, width=24),
        Stage(num_blocks=2, kernel=5, stride=2, expansion=6, width=40),
        Stage(num_blocks=3, kernel=3, stride=2, expansion=6, width=80),
        Stage(num_blocks=3, kernel=5, stride=1, expansion=6, width=112),
        Stage(num_blocks=4, kernel=5, stride=2, expansion=6, width=192),
        Stage(num_blocks=1, kernel=3, stride=1, expansion=6, width=320),
    )
    head_width: int = 1280
    num_classes: int = 1000
    eps: float = 1e-3

    @property
    def width(self) -> int:
        """E, channels of the last block."""
        return self.stages[-1].width

    @property
    def stride(self) -> int:
        """Pixels per cell of the last block's grid, 32 for lite0."""
        total = 2
        for stage in self.stages:
            total *= stage.stride
        return total

    def blocks(self) -> list[tuple[int, Stage]]:
        """Each block's width of input, and its sizes, as a stage of one block."""
        rows, width = [], self.stem_width
        for stage in self.stages:
            for i in range(stage.num_blocks):
                rows.append((width, dataclasses.replace(stage, num_blocks=1, stride=1 if i else stage.stride)))
                width = stage.width
        return rows


class ConvNorm(nn.Module):
    """A convolution without bias and batch normalisation in evaluation mode, float32.

    Attributes:
      width: channels of the output.
      kernel: side of the filters.
      stride: 1 or 2.
      depthwise: filter every channel by itself.
      eps: added to the variance.
    """

    width: int
    kernel: int
    stride: int
    depthwise: bool
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "B rows columns I"]) -> Float[Array, "B rows_ columns_ O"]:
        """Returns scale·(conv(x) − mean) / √(variance + eps) + bias."""
        groups = x.shape[-1] if self.depthwise else 1
        shape = (self.kernel, self.kernel, x.shape[-1] // groups, self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        mean = self.param("mean", nn.initializers.zeros, (self.width,))
        variance = self.param("variance", nn.initializers.ones, (self.width,))
        scale = self.param("scale", nn.initializers.ones, (self.width,))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        y = jax.lax.conv_general_dilated(
            x,
            kernel.astype(jnp.float32),
            (self.stride, self.stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            precision="highest",
        )
        return (y - mean) * (jax.lax.rsqrt(variance + self.eps) * scale) + bias


class Block(nn.Module):
    """An inverted bottleneck.

    Attributes:
      stage: its sizes.
      eps: of the batch normalisations.
    """

    stage: Stage
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "B rows columns I"]) -> Float[Array, "B rows_ columns_ O"]:
        """Returns the block's output, float32."""
        sizes, I = self.stage, x.shape[-1]  # noqa: E741
        conv = functools.partial(ConvNorm, eps=self.eps)
        wide, h = I * sizes.expansion, x
        if sizes.expansion > 1:
            h = jax.nn.relu6(conv(wide, 1, 1, depthwise=False, name="expand")(h))
        h = jax.nn.relu6(conv(wide, sizes.kernel, sizes.stride, depthwise=True, name="filter")(h))
        h = conv(sizes.width, 1, 1, depthwise=False, name="narrow")(h)
        return h + x if sizes.stride == 1 and sizes.width == I else h


def init(config: EfficientNetConfig, key: Array) -> Params:
    """Initialises the parameters.

    Args:
      config: sizes.
      key: random key.

    Returns:
      A nested dict, float32: `stem`, `blocks/0`, `blocks/1` and so on, `head`, `classifier`.
    """
    keys = iter(jax.random.split(key, len(config.blocks()) + 3))

    def pixels(width: int) -> Float[Array, "1 2 2 width"]:
        return jnp.zeros((1, 2, 2, width))

    return {
        "stem": _stem(config).init(next(keys), pixels(3))["params"],
        "blocks": {
            str(i): _block(stage, config).init(next(keys), pixels(width))["params"]
            for i, (width, stage) in enumerate(config.blocks())
        },
        "head": _head(config).init(next(keys), pixels(config.width))["params"],
        "classifier": {
            "kernel": nn.initializers.lecun_normal()(next(keys), (config.head_width, config.num_classes)),
            "bias": jnp.zeros(config.num_classes),
        },
    }


def normalize(pixels: Float[Array, "*B h w 3"]) -> Float[Array, "*B h w 3"]:
    """Scales RGB in [-1, 1], the range of videos here, to (x − 127) / 128 of x in [0, 255], float32."""
    return (127.5 * (pixels.astype(jnp.float32) + 1) - 127) / 128


@functools.partial(jax.jit, static_argnames="config")
def encode_blocks(
    params: Params, pixels: Float[Array, "B h w 3"], config: EfficientNetConfig
) -> list[Float[Array, "B _ _ _"]]:
    """Computes the output of every block.

    Args:
      params: as `init` returns them.
      pixels: RGB, normalised as by `normalize`.
      config: sizes.

    Returns:
      The blocks' outputs, first to last, float32.

    Raises:
      ValueError: height or width is not a positive multiple of the network's stride.
    """
    height, width = pixels.shape[1:3]
    if height % config.stride or width % config.stride or not height or not width:
        raise ValueError(f"The image is {height}x{width} pixels; EfficientNet needs multiples of {config.stride}.")
    x = jax.nn.relu6(_apply(_stem(config), params["stem"], pixels))
    outputs = []
    for i, (_, stage) in enumerate(config.blocks()):
        x = _apply(_block(stage, config), params["blocks"][str(i)], x)
        outputs.append(x)
    return outputs


@functools.partial(jax.jit, static_argnames="config")
def classify(params: Params, pixels: Float[Array, "B h w 3"], config: EfficientNetConfig) -> Float[Array, "B classes"]:
    """Computes logits over ImageNet's classes, float32; arguments and errors as in `encode_blocks`."""
    x = encode_blocks(params, pixels, config)[-1]
    x = jax.nn.relu6(_apply(_head(config), params["head"], x))
    last = params["classifier"]
    return jnp.matmul(jnp.mean(x, axis=(1, 2)), last["kernel"], precision="highest") + last["bias"]


@functools.partial(jax.jit, static_argnames="config")
def encode(
    params: Params, pixels: Float[Array, "B h w 3"], config: EfficientNetConfig
) -> Float[Array, "B rows columns E"]:
    """Computes features on a grid of half the network's stride: a token per 16x16 pixels with lite0.

    The image is enlarged to twice its size, bilinearly, so that the stride of 32 pixels is 16 of the given ones. Where
    pixels change, the change of the features has its centre within 2 pixels of theirs (with lite0's published weights,
    photographs and noise), although SAME padding shifts the fields of view: training has made up for the shift.

    Args:
      params: as `init` returns them.
      pixels: RGB in [-1, 1], not normalised.
      config: sizes.

    Returns:
      The last block's output, float32.

    Raises:
      ValueError: height or width is not a positive multiple of half the stride.
    """
    batch, height, width, _ = pixels.shape
    patch = config.stride // 2
    if height % patch or width % patch or not height or not width:
        raise ValueError(f"The image is {height}x{width} pixels; EfficientNet's features need multiples of {patch}.")
    x = jax.image.resize(pixels.astype(jnp.float32), (batch, 2 * height, 2 * width, 3), "bilinear")
    return encode_blocks(params, normalize(x), config)[-1]


def _apply(module: nn.Module, params: Params, x: Array) -> Array:
    return cast(Array, module.apply({"params": params}, x))


def _stem(config: EfficientNetConfig) -> ConvNorm:
    return ConvNorm(config.stem_width, 3, 2, depthwise=False, eps=config.eps)


def _head(config: EfficientNetConfig) -> ConvNorm:
    return ConvNorm(config.head_width, 1, 1, depthwise=False, eps=config.eps)


def _block(stage: Stage, config: EfficientNetConfig) -> Block:
    return Block(stage, config.eps)
