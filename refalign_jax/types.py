"""Array types, and the letters of their dimensions in annotations, einsums and docstrings.

B batch                     F H W latent frames, rows, columns
C latent channels           L     video tokens, F·(H/patch)·(W/patch)
R references                P     tokens per reference
S text tokens               D     width of the transformer
N heads                     K     head width
E width of the VFM          A     aligned blocks
T pixel frames, 4k+1        h w   pixel rows, columns
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Bool, Float, Int, Key

Params = Mapping[str, Any]
"""A nested dict of arrays, as flax.linen's `init(...)["params"]` returns it."""

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Params"]
