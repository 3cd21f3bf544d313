"""IR-101: the face recognition network whose embeddings OpenS2V-Eval's FaceSim compares.

A stem is followed by 49 residual units in four stages. A unit normalises its input, convolves it, applies PReLU,
convolves again with the unit's stride, and normalises; the shortcut is a strided 1x1 convolution with a norm where the
width changes, and every second pixel elsewhere. The embedding is a linear map of the last 7x7 grid, normalised. All of
it is float32, in evaluation mode.

Source: Deng et al. 2019 (ArcFace, arXiv 1801.07698), as CurricularFace (arXiv 2004.00288) publishes it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp

from refalign_jax.types import Array, Float, Params

IMAGE_SIZE = 112
"""Rows, and columns, of a face."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IResNetConfig:
    """Sizes and options; the defaults are IR-101.

    Attributes:
      stages: width and number of units of each stage; the first unit has stride 2.
      stem_width: channels after the stem.
      embedding_width: of the result.
      middle_norm: whether a unit normalises between its first convolution and PReLU, as some published versions do.
      last_affine: whether the norm of the embedding has a scale and a bias.
      eps: added to the variance in every norm.
    """

    stages: tuple[tuple[int, int], ...] = ((64, 3), (128, 13), (256, 30), (512, 3))
    stem_width: int = 64
    embedding_width: int = 512
    middle_norm: bool = False
    last_affine: bool = True
    eps: float = 1e-5

    @property
    def grid(self) -> int:
        """Rows, and columns, of the last feature map."""
        return IMAGE_SIZE >> len(self.stages)

    def units(self) -> list[tuple[int, int, int]]:
        """Width of input, width of output and stride of each unit."""
        rows, width = [], self.stem_width
        for depth, count in self.stages:
            for i in range(count):
                rows.append((width, depth, 1 if i else 2))
                width = depth
        return rows


def init(config: IResNetConfig, key: Array) -> Params:
    """Initialises the parameters.

    Args:
      config: sizes.
      key: random key.

    Returns:
      A nested dict, float32: `stem`, `units/0`, `units/1` and so on, `last`.
    """
    keys = iter(jax.random.split(key, 3 * len(config.units()) + 2))

    def kernel(side: int, inputs: int, outputs: int) -> Array:
        return jax.random.normal(next(keys), (side, side, inputs, outputs)) * (side * side * inputs) ** -0.5

    units: dict[str, Any] = {}
    for i, (width, depth, _) in enumerate(config.units()):
        unit = {
            "norm0": _norm_params(width),
            "kernel0": kernel(3, width, depth),
            "slope": jnp.full(depth, 0.25),
            "kernel1": kernel(3, depth, depth),
            "norm2": _norm_params(depth),
        }
        if config.middle_norm:
            unit["norm1"] = _norm_params(depth)
        if width != depth:
            unit |= {"shortcut_kernel": kernel(1, width, depth), "shortcut_norm": _norm_params(depth)}
        units[str(i)] = unit
    width, grid = config.stages[-1][0], config.grid
    return {
        "stem": {
            "kernel": kernel(3, 3, config.stem_width),
            "norm": _norm_params(config.stem_width),
            "slope": jnp.full(config.stem_width, 0.25),
        },
        "units": units,
        "last": {
            "norm": _norm_params(width),
            "kernel": jax.random.normal(next(keys), (grid, grid, width, config.embedding_width)) / (grid * width**0.5),
            "bias": jnp.zeros(config.embedding_width),
            "embedding_norm": _norm_params(config.embedding_width, config.last_affine),
        },
    }


@functools.partial(jax.jit, static_argnames="config")
def embed(params: Params, faces: Float[Array, "B 112 112 3"], config: IResNetConfig) -> Float[Array, "B E"]:
    """Computes the embeddings of faces.

    Args:
      params: as `init` returns them.
      faces: RGB in [-1, 1], aligned and cropped as insightface's `norm_crop` does.
      config: sizes.

    Returns:
      The embeddings, not normalised, float32.
    """
    stem, last = params["stem"], params["last"]
    x = _prelu(_norm(_conv(faces.astype(jnp.float32), stem["kernel"]), stem["norm"], config), stem["slope"])
    for i, (_, _, stride) in enumerate(config.units()):
        x = _unit(x, params["units"][str(i)], stride, config)
    x = _norm(x, last["norm"], config)
    x = jnp.einsum("brce,rceo->bo", x, last["kernel"], precision="highest") + last["bias"]
    return _norm(x, last["embedding_norm"], config)


def _unit(x: Float[Array, "B r c I"], unit: Params, stride: int, config: IResNetConfig) -> Float[Array, "B r2 c2 O"]:
    """One residual unit."""
    shortcut = x[:, ::stride, ::stride]
    if "shortcut_kernel" in unit:
        shortcut = _norm(_conv(x, unit["shortcut_kernel"], stride), unit["shortcut_norm"], config)
    h = _conv(_norm(x, unit["norm0"], config), unit["kernel0"])
    if config.middle_norm:
        h = _norm(h, unit["norm1"], config)
    h = _conv(_prelu(h, unit["slope"]), unit["kernel1"], stride)
    return _norm(h, unit["norm2"], config) + shortcut


def _conv(x: Array, kernel: Array, stride: int = 1) -> Array:
    """A convolution padded by (side − 1)/2 on every border, as torch's."""
    pad = (kernel.shape[0] - 1) // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(jnp.float32),
        (stride, stride),
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )


def _norm(x: Array, params: Params, config: IResNetConfig) -> Array:
    """Batch normalisation with the stored mean and variance."""
    y = (x - params["mean"]) * jax.lax.rsqrt(params["variance"] + config.eps)
    return cast(Array, y * params["scale"] + params["bias"] if "scale" in params else y)


def _prelu(x: Array, slope: Array) -> Array:
    return jnp.where(x > 0, x, slope * x)


def _norm_params(width: int, affine: bool = True) -> dict[str, Array]:
    found = {"mean": jnp.zeros(width), "variance": jnp.ones(width)}
    return found | {"scale": jnp.ones(width), "bias": jnp.zeros(width)} if affine else found
