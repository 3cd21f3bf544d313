"""Wan2.1's causal video VAE: pixels to normalised latents and back, in chunks of time.

    encode   video [B, T, h, w, 3] in [-1, 1]  ->  z [B, F, H, W, C],  z = (mu(video) - mean_c) / std_c
    decode   z  ->  video [B, T, h, w, 3], about [-1, 1] (clip it before showing it)

with T = 4k+1, F = k+1, H = h/8, W = w/8 for the published sizes. mu is the mean of the posterior; nothing is sampled.

Every convolution in time is causal: an output frame depends on its own and the two earlier input frames, which are zero
before the first. So a video is processed in chunks, first one frame and then four at a time (one latent frame each),
where each such convolution remembers the last two frames of its input. These memories are the flax collection "cache".
The chunks run in `jax.lax.scan`, so that temporary memory does not grow with T. Chunks also define the result: the
first frame skips the convolutions that halve and double the number of frames, and the doubling ones start from zeros
at the second chunk, as if there had been no first one.

In space, a video can be cut into overlapping tiles, which are coded separately and blended linearly; this is an
approximation.

Sources: Wan2.1 (arXiv 2503.20314) and its published code; diffusers' AutoencoderKLWan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from refalign_jax.models.layers import precision_of
from refalign_jax.models.streaming import Tiling, stream
from refalign_jax.types import Array, Float, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Sizes of the VAE; the defaults are Wan2.1's.

    Attributes:
      width: channels of the first level.
      latent_channels: C.
      width_multipliers: width of each level as a multiple of `width`; between levels, rows and columns halve.
      num_res_blocks: residual blocks per level in the encoder; the decoder has one more.
      temporal_downsample: after each level but the last, whether the number of frames halves too.
      latent_mean: mean of each latent channel over the training data of Wan2.1.
      latent_std: its standard deviation.
      compute_dtype: dtype of convolutions and attention: "float32" or "bfloat16".
    """

    width: int = 96
    latent_channels: int = 16
    width_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] = (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
    latent_std: tuple[float, ...] = (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    )
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.width < 2 or self.width % 2:
            raise ValueError(f"width is {self.width}; it must be even, because each upsampling halves the channels.")
        if self.num_res_blocks < 1:
            raise ValueError(f"num_res_blocks is {self.num_res_blocks}; a level needs at least 1.")
        if not self.width_multipliers or min(self.width_multipliers) < 1:
            raise ValueError(f"width_multipliers is {self.width_multipliers}; it must hold positive numbers.")
        if len(self.temporal_downsample) != len(self.width_multipliers) - 1:
            raise ValueError(
                f"temporal_downsample has {len(self.temporal_downsample)} values; {len(self.width_multipliers)} "
                f"width_multipliers need {len(self.width_multipliers) - 1}."
            )
        for field in ("latent_mean", "latent_std"):
            if len(getattr(self, field)) != self.latent_channels:
                raise ValueError(
                    f"{field} has {len(getattr(self, field))} values; latent_channels is {self.latent_channels}."
                )
        if min(self.latent_std) <= 0:
            raise ValueError(f"latent_std holds {min(self.latent_std)}; a standard deviation must be above 0.")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute_dtype is {self.compute_dtype!r}; it must be 'float32' or 'bfloat16'.")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell along rows and along columns (8)."""
        return 2 ** (len(self.width_multipliers) - 1)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame after the first, which is one frame (4)."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def dtype(self) -> Any:
        """`compute_dtype` as a JAX dtype."""
        return jnp.dtype(self.compute_dtype)


def _convolve(
    frames: Float[Array, "n h w i"], kernel: Float[Array, "y x i o"], stride: int, padding: tuple[int, int]
) -> Float[Array, "n H W o"]:
    """A 2-D convolution, summed in float32; float32 inputs are not rounded on accelerators."""
    return jax.lax.conv_general_dilated(
        frames,
        kernel,
        window_strides=(stride, stride),
        padding=(padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision_of(frames.dtype),
        preferred_element_type=jnp.float32,
    )


class Convolution(nn.Module):
    """A convolution over rows and columns and, causally, over frames.

    It is computed as a sum of 2-D convolutions over the kernel's frames, with time as part of the batch. This is faster
    than a 3-D convolution on CPUs, and 2-D convolutions are the best tuned ones on accelerators.

    Attributes:
      features: output channels.
      kernel: frames, rows and columns of the kernel; unless `stride` is 2, padding preserves rows and columns.
      time_stride: 1, or 2 to halve the frames; (kernel frames - stride) frames are remembered between chunks.
      stride: 1, or 2 to halve rows and columns, which are then padded by one zero at their end only.
      dtype: compute dtype.
    """

    features: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    time_stride: int = 1
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B t h w i"], first: bool = False) -> Float[Array, "B t2 h2 w2 o"]:
        """Convolves one chunk; `first` if it is the first frame, with only zeros before it."""
        taps = self.kernel[0]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (*self.kernel, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        remembered = taps - self.time_stride
        past = jnp.zeros((x.shape[0], remembered, *x.shape[2:]), x.dtype)
        if remembered:
            joined = jnp.concatenate([self.get_variable("cache", "frames", past) if not first else past, x], axis=1)
            self.put_variable("cache", "frames", joined[:, -remembered:])
            if first:  # the earlier frames are zero, so that only the kernel's last frame contributes
                kernel, taps = kernel[-1:], 1
            else:
                x = joined
        steps = (x.shape[1] - taps) // self.time_stride + 1
        padding = (0, 1) if self.stride == 2 else (self.kernel[1] // 2, self.kernel[1] // 2)
        total = bias.astype(jnp.float32)
        for tap in range(taps):
            frames = x[:, tap : tap + (steps - 1) * self.time_stride + 1 : self.time_stride]
            total = total + _convolve(frames.reshape(-1, *x.shape[2:]), kernel[tap], self.stride, padding)
        return total.astype(self.dtype).reshape(x.shape[0], steps, *total.shape[1:])


class ChannelNorm(nn.Module):
    """x / max(‖x‖₂, 1e-12) · √channels · scale over the last axis, in float32."""

    @nn.compact
    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """Returns x normalised, in its shape and dtype."""
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],)).astype(jnp.float32)
        y = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(jnp.square(y), axis=-1, keepdims=True))
        return (y / jnp.maximum(length, 1e-12) * (scale * math.sqrt(x.shape[-1]))).astype(x.dtype)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); where the channels change, x passes through a 1×1×1 convolution."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B t h w i"], first: bool) -> Float[Array, "B t h w o"]:
        """Maps one chunk."""
        y = Convolution(self.features, dtype=self.dtype, name="conv1")(nn.silu(ChannelNorm(name="norm1")(x)), first)
        y = Convolution(self.features, dtype=self.dtype, name="conv2")(nn.silu(ChannelNorm(name="norm2")(y)), first)
        if x.shape[-1] != self.features:
            x = Convolution(self.features, kernel=(1, 1, 1), dtype=self.dtype, name="shortcut")(x)
        return x + y


class FrameAttention(nn.Module):
    """Self-attention with one head among the cells of each frame."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B t h w c"]) -> Float[Array, "B t h w c"]:
        """Adds the attention to x."""
        B, t, h, w, c = x.shape
        qkv = Convolution(3 * c, kernel=(1, 1, 1), dtype=self.dtype, name="qkv")(ChannelNorm(name="norm")(x))
        q, k, v = jnp.split(qkv.reshape(B * t, h * w, 3 * c), 3, axis=-1)
        precision = precision_of(self.dtype)
        scores = jnp.einsum("nqc,nkc->nqk", q, k, precision=precision, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores / math.sqrt(c), axis=-1).astype(self.dtype)
        y = jnp.einsum("nqk,nkc->nqc", weights, v, precision=precision)
        return x + Convolution(c, kernel=(1, 1, 1), dtype=self.dtype, name="out")(y.reshape(x.shape))


class Downsample(nn.Module):
    """Halves rows and columns and, if `temporal`, the number of frames, except the single frame of the first chunk."""

    temporal: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B t h w c"], first: bool) -> Float[Array, "B t2 h2 w2 c"]:
        """Maps one chunk."""
        c = x.shape[-1]
        x = Convolution(c, kernel=(1, 3, 3), stride=2, dtype=self.dtype, name="space")(x)
        if not self.temporal:
            return x
        halved = Convolution(c, kernel=(3, 1, 1), time_stride=2, dtype=self.dtype, name="time")(x, first)
        return x if first else halved


class Upsample(nn.Module):
    """Doubles rows and columns, halves the channels and, if `temporal`, doubles the frames after the first chunk.

    The doubling convolution computes 2c channels, which are two frames of c channels. Its memory excludes the first
    chunk: for the second chunk, the earlier frames are zero.
    """

    temporal: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B t h w c"], first: bool) -> Float[Array, "B t2 h2 w2 c2"]:
        """Maps one chunk."""
        c = x.shape[-1]
        if self.temporal:
            seen = jnp.zeros_like(x) if first else x
            pairs = Convolution(2 * c, kernel=(3, 1, 1), dtype=self.dtype, name="time")(seen, first)
            if not first:
                pairs = pairs.reshape(*x.shape[:4], 2, c)
                x = jnp.moveaxis(pairs, 4, 2).reshape(x.shape[0], 2 * x.shape[1], *x.shape[2:])
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return Convolution(c // 2, kernel=(1, 3, 3), dtype=self.dtype, name="space")(x)


class Encoder(nn.Module):
    """One chunk of pixels to the mean of one latent frame, not yet normalised."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B t h w 3"], first: bool) -> Float[Array, "B 1 H W C"]:
        """Maps the first frame (`first`) or the next `temporal_factor` frames, and updates the collection "cache"."""
        config, dtype = self.config, self.config.dtype
        widths = [config.width * multiplier for multiplier in config.width_multipliers]
        x = Convolution(config.width, dtype=dtype, name="conv_in")(x, first)
        for level, width in enumerate(widths):
            for block in range(config.num_res_blocks):
                x = ResidualBlock(width, dtype, name=f"level{level}_block{block}")(x, first)
            if level < len(widths) - 1:
                x = Downsample(config.temporal_downsample[level], dtype, name=f"level{level}_down")(x, first)
        x = ResidualBlock(widths[-1], dtype, name="middle_block0")(x, first)
        x = FrameAttention(dtype, name="middle_attention")(x)
        x = ResidualBlock(widths[-1], dtype, name="middle_block1")(x, first)
        x = nn.silu(ChannelNorm(name="norm_out")(x))
        x = Convolution(2 * config.latent_channels, dtype=dtype, name="conv_out")(x, first)
        moments = Convolution(2 * config.latent_channels, kernel=(1, 1, 1), dtype=dtype, name="moments")(x)
        return moments[..., : config.latent_channels]  # the rest is the logarithm of the variance


class Decoder(nn.Module):
    """One latent frame, not normalised, to one chunk of pixels, not clipped."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B 1 H W C"], first: bool) -> Float[Array, "B t h w 3"]:
        """Maps the first latent frame to one frame, others to `temporal_factor`, and updates the collection "cache"."""
        config, dtype = self.config, self.config.dtype
        widths = [config.width * multiplier for multiplier in reversed(config.width_multipliers)]
        x = Convolution(config.latent_channels, kernel=(1, 1, 1), dtype=dtype, name="latents")(x)
        x = Convolution(widths[0], dtype=dtype, name="conv_in")(x, first)
        x = ResidualBlock(widths[0], dtype, name="middle_block0")(x, first)
        x = FrameAttention(dtype, name="middle_attention")(x)
        x = ResidualBlock(widths[0], dtype, name="middle_block1")(x, first)
        for level, width in enumerate(widths):
            for block in range(config.num_res_blocks + 1):
                x = ResidualBlock(width, dtype, name=f"level{level}_block{block}")(x, first)
            if level < len(widths) - 1:
                x = Upsample(config.temporal_downsample[-1 - level], dtype, name=f"level{level}_up")(x, first)
        x = nn.silu(ChannelNorm(name="norm_out")(x))
        return Convolution(3, dtype=dtype, name="conv_out")(x, first)


def init(config: VAEConfig, key: Array) -> dict[str, Any]:
    """Initialises the parameters.

    Args:
      config: sizes.
      key: random key.

    Returns:
      {"encoder": ..., "decoder": ...}, float32.
    """
    side = config.spatial_factor
    chunk = jnp.zeros((1, config.temporal_factor, side, side, 3))
    latent = jnp.zeros((1, 1, 1, 1, config.latent_channels))
    encoder_key, decoder_key = jax.random.split(key)
    return {
        "encoder": Encoder(config).init(encoder_key, chunk, False)["params"],
        "decoder": Decoder(config).init(decoder_key, latent, False)["params"],
    }


def encode(
    params: Params, video: Float[Array, "B T h w 3"], config: VAEConfig, tiling: Tiling | None = None
) -> Float[Array, "B F H W C"]:
    """Encodes videos, or images as videos of one frame, into normalised latents.

    Args:
      params: as `init` returns them; only "encoder" is used.
      video: RGB in [-1, 1], 4k+1 frames, rows and columns divisible by 8.
      config: sizes and compute dtype.
      tiling: tiles, encoded one by one; None: whole frames.

    Returns:
      (mu - latent_mean) / latent_std in float32.

    Raises:
      ValueError: the video has another rank or number of channels, or its frames, rows or columns do not divide; or
        the tiles are not multiples of a cell.
    """
    side, span = config.spatial_factor, config.temporal_factor
    if video.ndim != 5 or video.shape[-1] != 3:
        raise ValueError(f"video has shape {video.shape}; expected [batch, frames, rows, columns, 3].")
    B, T, h, w, _ = video.shape
    if T % span != 1 % span:
        raise ValueError(f"video has {T} frames; the VAE needs {span}k+1, such as {T // span * span + 1}.")
    if h % side or w % side or not h or not w:
        raise ValueError(f"video is {h}x{w} pixels; rows and columns must be positive multiples of {side}.")
    mean, std = jnp.asarray(config.latent_mean), jnp.asarray(config.latent_std)

    def step(chunk: Array, cache: Mapping[str, Any], first: bool) -> tuple[Array, Mapping[str, Any]]:
        mu, cache = Encoder(config).apply({"params": params["encoder"], **cache}, chunk, first, mutable=["cache"])
        return (mu.astype(jnp.float32) - mean) / std, cache

    shape = (B, (T - 1) // span + 1, h // side, w // side, config.latent_channels)
    return stream(step, video, shape, frames=(span, 1), cells=(side, 1), tiling=tiling)


def decode(
    params: Params, latents: Float[Array, "B F H W C"], config: VAEConfig, tiling: Tiling | None = None
) -> Float[Array, "B T h w 3"]:
    """Decodes normalised latents into videos.

    Args:
      params: as `init` returns them; only "decoder" is used.
      latents: (mu - latent_mean) / latent_std.
      config: sizes and compute dtype.
      tiling: tiles, decoded one by one; None: whole frames.

    Returns:
      RGB in float32, 4(F-1)+1 frames, mostly in [-1, 1] and not clipped to it.

    Raises:
      ValueError: the latents have another rank or number of channels, or an axis of length 0; or the tiles are not
        multiples of a cell.
    """
    side, span = config.spatial_factor, config.temporal_factor
    if latents.ndim != 5 or latents.shape[-1] != config.latent_channels or 0 in latents.shape:
        raise ValueError(
            f"latents have shape {latents.shape}; expected [batch, frames, rows, columns, {config.latent_channels}]."
        )
    B, F, H, W, _ = latents.shape
    mean, std = jnp.asarray(config.latent_mean), jnp.asarray(config.latent_std)

    def step(latent: Array, cache: Mapping[str, Any], first: bool) -> tuple[Array, Mapping[str, Any]]:
        z = latent.astype(jnp.float32) * std + mean
        video, cache = Decoder(config).apply({"params": params["decoder"], **cache}, z, first, mutable=["cache"])
        return video.astype(jnp.float32), cache

    shape = (B, (F - 1) * span + 1, H * side, W * side, 3)
    return stream(step, latents, shape, frames=(1, span), cells=(1, side), tiling=tiling)
