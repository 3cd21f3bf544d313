"""Encodes or decodes a video in chunks of time and tiles of space, with temporary memory that does not grow with T.

The network is a function of one chunk and of its memories of the earlier chunks; this module is the loop around it.
Chunks are sliced from the source and results are written into place inside the loop, because stacking the chunks
outside of it would copy both whole videos.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refalign_jax.types import Array, Float

Step = Callable[[Array, Mapping[str, Any], bool], tuple[Array, Mapping[str, Any]]]
"""(chunk, memories, whether it is the first) -> (the coded chunk, memories after it)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Square tiles.

    Attributes:
      size: side of a tile, pixels.
      overlap: pixels that neighbouring tiles share, at least, over which they are blended.

    Raises:
      ValueError: the overlap is negative or as large as a tile.
    """

    size: int = 256
    overlap: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.size:
            raise ValueError(f"overlap is {self.overlap}; it must be at least 0 and below the tile size {self.size}.")


def cut_axis(cells: int, tile: int, overlap: int, unit: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts one axis into n equal tiles, of which the last ends where the axis ends.

    Args:
      cells: length of the axis in latent cells.
      tile: length of a tile in cells.
      overlap: cells that neighbouring tiles share, at least.
      unit: positions of the result per cell.

    Returns:
      The first cell of each tile [n], int32, and the weight of each of its positions [n, tile·unit], float32: linear
      over the overlaps, with a sum of 1 at each position of the axis.
    """
    if cells <= tile:
        return np.zeros(1, np.int32), np.ones((1, cells * unit), np.float32)
    count = math.ceil((cells - overlap) / (tile - overlap))
    starts = np.minimum(np.arange(count) * (tile - overlap), cells - tile)
    ramp = (np.arange(overlap * unit) + 0.5) / max(overlap * unit, 1)
    weights = np.ones((count, tile * unit))
    weights[1:, : len(ramp)] *= ramp
    weights[:-1, tile * unit - len(ramp) :] *= ramp[::-1]
    total = np.zeros(cells * unit)
    spans = [slice(start * unit, (start + tile) * unit) for start in starts]
    for span, weight in zip(spans, weights, strict=True):
        total[span] += weight
    weights /= np.stack([total[span] for span in spans])
    return starts.astype(np.int32), weights.astype(np.float32)


def stream(
    step: Step,
    source: Float[Array, "B T h w c"],
    shape: tuple[int, ...],
    *,
    frames: tuple[int, int],
    cells: tuple[int, int],
    tiling: Tiling | None,
) -> Float[Array, "B T2 h2 w2 c2"]:
    """Runs `step` over the chunks of each tile in order and sums the weighted tiles.

    Args:
      step: codes one chunk.
      source: the video or latents to code.
      shape: shape of the result.
      frames: frames per chunk after the first, in the source and in the result.
      cells: positions per latent cell along rows and columns, in the source and in the result.
      tiling: tiles; None for a single one.

    Returns:
      The result, float32.

    Raises:
      ValueError: size or overlap of the tiles is not a multiple of a latent cell.
    """
    rows, columns = source.shape[2] // cells[0], source.shape[3] // cells[0]
    side = max(cells)
    if tiling is not None and (tiling.size % side or tiling.overlap % side):
        raise ValueError(f"Tiling: size {tiling.size} and overlap {tiling.overlap} must be multiples of {side} pixels.")
    tile, overlap = (tiling.size // side, tiling.overlap // side) if tiling else (max(rows, columns), 0)
    window = (min(tile, rows) * cells[0], min(tile, columns) * cells[0])
    down, across = cut_axis(rows, tile, overlap, cells[1]), cut_axis(columns, tile, overlap, cells[1])
    row, column = (index.reshape(-1) for index in np.indices((len(down[0]), len(across[0]))))
    chunks = (source.shape[1] - 1) // frames[0]

    def code_tile(result: Array, tile: tuple[Array, ...]) -> tuple[Array, None]:
        top, left, row_weights, column_weights = tile
        weights = row_weights[:, None, None] * column_weights[:, None]

        def code_chunk(result: Array, cache: Mapping[str, Any], number: Array | int, first: bool) -> tuple[Array, Any]:
            begin, length = (0, 1) if first else (1 + (number - 1) * frames[0], frames[0])
            corner = (0, begin, top * cells[0], left * cells[0], 0)
            chunk = jax.lax.dynamic_slice(source, corner, (source.shape[0], length, *window, source.shape[-1]))
            piece, cache = step(chunk, cache, first)
            corner = (0, 0 if first else 1 + (number - 1) * frames[1], top * cells[1], left * cells[1], 0)
            blended = jax.lax.dynamic_slice(result, corner, piece.shape) + weights * piece
            return jax.lax.dynamic_update_slice(result, blended, corner), cache

        def next_chunk(carry: tuple[Array, Any, Array], _: None) -> tuple[tuple[Array, Any, Array], None]:
            result, cache, number = carry
            return (*code_chunk(result, cache, number, first=False), number + 1), None

        result, cache = code_chunk(result, {}, 0, first=True)
        if chunks:
            (result, _, _), _ = jax.lax.scan(next_chunk, (result, cache, jnp.int32(1)), length=chunks)
        return result, None

    tiles = (down[0][row], across[0][column], down[1][row], across[1][column])
    return jax.lax.scan(code_tile, jnp.zeros(shape, jnp.float32), tuple(map(jnp.asarray, tiles)))[0]
