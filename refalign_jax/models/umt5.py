"""UMT5 text encoder: token ids to the embeddings the DiT attends to.

With x the residual stream, each block computes

    x += O · softmax(q kᵀ + b + m) v,   q, k, v = projections of RMS(x), no 1/√K,
    x += W₂ · (gelu_tanh(Wg RMS(x)) ⊙ W₁ RMS(x)),

and a last RMS norm follows. RMS(x) = w · x / √(mean x² + eps), without mean or bias. b[n, i, j] is a learned scalar
for head n and the bucket of the distance j − i; unlike in T5, every layer has its own. m masks padding.

Sources: Raffel et al. 2020 (arXiv 1910.10683), Chung et al. 2023 (UniMax, arXiv 2304.09151), Wan2.1's text encoder.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from refalign_jax.models.by_head import attend_by_head
from refalign_jax.models.layers import RMSNorm, init_stack, precision_of
from refalign_jax.models.quantise import dequantise, take_rows
from refalign_jax.types import Array, Float, Int, Params

MAX_TOKENS = 512
"""Tokens of a prompt, end token included, that Wan2.1 and RefAlign were trained with."""

_QUOTES = str.maketrans(
    dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'") | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UMT5Config:
    """Sizes of the encoder; the defaults are UMT5-XXL, the text encoder of Wan2.1.

    Attributes:
      vocab_size: rows of the token embedding.
      width: D, width of the residual stream and of the output.
      attention_width: N·K, width of all heads together.
      ffn_width: hidden width of the gated feed-forward network.
      num_heads: N.
      num_layers: number of blocks.
      num_buckets: distance buckets of the position bias, half of them for each sign.
      max_distance: all distances from this one on share the last bucket.
      eps: added to the mean square in the RMS norm.
      compute_dtype: dtype of the matrix products; norms, softmax and the residual stream are float32.
    """

    vocab_size: int = 256384
    width: int = 4096
    attention_width: int = 4096
    ffn_width: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for field in ("vocab_size", "width", "attention_width", "ffn_width", "num_heads", "num_layers"):
            if getattr(self, field) < 1:
                raise ValueError(f"UMT5Config.{field} is {getattr(self, field)}; it must be at least 1.")
        if self.attention_width % self.num_heads:
            raise ValueError(
                f"UMT5Config.attention_width is {self.attention_width}; it must be a multiple of num_heads, "
                f"{self.num_heads}."
            )
        if self.num_buckets < 4 or self.num_buckets % 4:
            raise ValueError(f"UMT5Config.num_buckets is {self.num_buckets}; it must be a multiple of 4.")
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"UMT5Config.max_distance is {self.max_distance}; it must exceed num_buckets/4,"
                f" {self.num_buckets // 4}."
            )
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"UMT5Config.compute_dtype is {self.compute_dtype!r}; it must be float32 or bfloat16.")


def relative_buckets(num_tokens: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of the distance j − i for each query i and key j, an int32 array [num_tokens, num_tokens].

    Keys after the query take the upper half of the buckets. Within a half, the first quarter of `num_buckets` holds
    one distance each; the rest are logarithmic up to `max_distance`.
    """
    half, exact = num_buckets // 2, num_buckets // 4
    distance = np.arange(num_tokens)[None, :] - np.arange(num_tokens)[:, None]
    size = np.abs(distance)
    # In float32 as in the original, so that a distance at the edge of two buckets falls into the same one.
    log_size = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact))
    large = exact + (log_size / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)).astype(np.int32)
    bucket = np.where(size < exact, size, np.minimum(large, half - 1))
    return (bucket + half * (distance > 0)).astype(np.int32)


class Block(nn.Module):
    """Self-attention with its own position bias, then the gated feed-forward network."""

    config: UMT5Config

    def _dense(self, width: int, name: str) -> nn.Dense:
        """A linear map without bias in the compute dtype."""
        dtype = jnp.dtype(self.config.compute_dtype)
        return nn.Dense(width, use_bias=False, dtype=dtype, precision=precision_of(dtype), name=name)

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], mask: Int[Array, "B S"], buckets: Int[Array, "S S"]
    ) -> Float[Array, "B S D"]:
        """Returns the residual stream after the block, float32.

        Args:
          x: residual stream, float32.
          mask: 1 for tokens, 0 for padding.
          buckets: distance bucket of every query and key.
        """
        config = self.config
        batch, tokens, _ = x.shape
        heads = (batch, tokens, config.num_heads, config.attention_width // config.num_heads)

        h = RMSNorm(config.eps, name="attention_norm")(x)
        q = self._dense(config.attention_width, "query")(h).reshape(heads)
        k = self._dense(config.attention_width, "key")(h).reshape(heads)
        v = self._dense(config.attention_width, "value")(h).reshape(heads)
        table = self.param("position_bias", nn.initializers.normal(0.02), (config.num_buckets, config.num_heads))
        bias = jnp.take(table.T.astype(jnp.float32), buckets, axis=1)
        h = attend_by_head(q, k, v, scale=1.0, bias=bias, mask=mask)
        x = x + self._dense(config.width, "out")(h.reshape(batch, tokens, config.attention_width))

        h = RMSNorm(config.eps, name="ffn_norm")(x)
        gate = jax.nn.gelu(self._dense(config.ffn_width, "ffn_gate")(h), approximate=True)
        return x + self._dense(config.width, "ffn_out")(gate * self._dense(config.ffn_width, "ffn_in")(h))


def init(config: UMT5Config, key: Array) -> dict[str, Any]:
    """Initialises the encoder's parameters.

    Args:
      config: sizes.
      key: random key.

    Returns:
      A nested dict, float32; the parameters of all blocks are stacked along a leading layer axis.
    """
    table_key, blocks_key, norm_key = jax.random.split(key, 3)
    x, mask, buckets = jnp.zeros((1, 1, config.width)), jnp.ones((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32)
    return {
        "token_embedding": nn.initializers.normal(1.0)(table_key, (config.vocab_size, config.width)),
        "blocks": init_stack(Block(config), config.num_layers, blocks_key, x, mask, buckets),
        "norm": RMSNorm(config.eps).init(norm_key, x)["params"],
    }


@functools.partial(jax.jit, static_argnames="config")
def encode_tokens(
    params: Params, ids: Int[Array, "B S"], mask: Int[Array, "B S"], config: UMT5Config
) -> Float[Array, "B S D"]:
    """Encodes token ids, padding included.

    Args:
      params: as `init` returns them, in any float dtype or quantised; each layer is cast when it runs.
      ids: token ids in [0, vocab_size); where they are split over devices by the batch, so is the work.
      mask: 1 for tokens, 0 for padding, which no token attends to.
      config: sizes and compute dtype.

    Returns:
      Embeddings, float32. Rows of padding have no meaning; `encode` sets them to 0.
    """
    x = take_rows(params["token_embedding"], ids)
    buckets = jnp.asarray(relative_buckets(ids.shape[1], config.num_buckets, config.max_distance))

    def run_block(x: Array, params: Params) -> tuple[Array, None]:
        params = dequantise(params, jnp.dtype(config.compute_dtype))
        return cast(Array, Block(config).apply({"params": params}, x, mask, buckets)), None

    x, _ = jax.lax.scan(run_block, x, params["blocks"])
    return cast(Array, RMSNorm(config.eps).apply({"params": params["norm"]}, x))


@functools.partial(jax.jit, static_argnames="config")
def encode(
    params: Params, ids: Int[Array, "B S"], mask: Int[Array, "B S"], config: UMT5Config
) -> Float[Array, "B S D"]:
    """Encodes token ids as `encode_tokens` does, and sets the rows of padding to 0."""
    return encode_tokens(params, ids, mask, config) * (mask[..., None] > 0)


def clean_prompt(prompt: str) -> str:
    """Prepares a prompt as Wan2.1 does: HTML entities decoded twice, quotes straight, whitespace single and trimmed.

    Wan2.1 runs `ftfy.fix_text` first. Here, only its straightening of curly quotes is done, the one change that affects
    ordinary English text. Not done: repairing text decoded in the wrong encoding, replacing ligatures and full-width
    letters (UMT5's tokenizer does this itself, by NFKC), removing terminal escapes and control characters.
    """
    text = html.unescape(html.unescape(prompt.translate(_QUOTES)))
    return re.sub(r"\s+", " ", text).strip()


def load_tokenizer(name: str | Path) -> Any:
    """Loads a tokenizer through transformers.

    Args:
      name: a folder that holds the tokenizer's files, or its id on the hub, such as `google/umt5-xxl`.

    Raises:
      ValueError: there is no tokenizer, or the hub can't be reached.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(name))
    except Exception as error:  # transformers and tokenizers raise whatever a damaged file leads to
        raise ValueError(
            f"No tokenizer at {str(name)!r}: give a folder that holds tokenizer.json or spiece.model, "
            "or a hub id that can be reached, such as google/umt5-xxl."
        ) from error


def tokenize(
    tokenizer: Any, prompts: Sequence[str], max_tokens: int = MAX_TOKENS
) -> tuple[Int[np.ndarray, "B S"], Int[np.ndarray, "B S"]]:
    """Cleans prompts and converts them to ids with an end token, truncated and padded to `max_tokens`.

    Args:
      tokenizer: as `load_tokenizer` returns it.
      prompts: texts in any language; an empty text becomes the end token alone.
      max_tokens: S.

    Returns:
      (ids, mask), int32; the mask is 1 for tokens and 0 for padding.

    Raises:
      ValueError: `prompts` is one string or holds none.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts is {prompts!r}; it must be a list of at least one string.")
    tokens = tokenizer(
        [clean_prompt(prompt) for prompt in prompts],
        padding="max_length",
        truncation=True,
        max_length=max_tokens,
        add_special_tokens=True,
        return_attention_mask=True,
    )
    return np.asarray(tokens["input_ids"], np.int32), np.asarray(tokens["attention_mask"], np.int32)


def count_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Counts the tokens of prompts, the end token included, as `tokenize` would give them if it did not truncate."""
    tokens = tokenizer([clean_prompt(prompt) for prompt in prompts], add_special_tokens=True, verbose=False)
    return [len(ids) for ids in tokens["input_ids"]]


def encode_prompts(
    params: Params,
    prompts: Sequence[str],
    tokenizer: Any,
    config: UMT5Config,
    max_tokens: int = MAX_TOKENS,
    sharding: jax.sharding.Sharding | None = None,
) -> tuple[Float[Array, "B S D"], Int[np.ndarray, " B"]]:
    """Embeds prompts as the DiT takes them.

    Args:
      params: as `init` returns them.
      prompts: texts, cleaned here.
      tokenizer: as `load_tokenizer` returns it.
      config: sizes.
      max_tokens: S, to which every prompt is truncated and padded.
      sharding: how the prompts are placed on devices, such as split by the batch; None: on the default device.

    Returns:
      (embeddings, lengths): float32, rows of padding 0; the number of tokens of each prompt, end token included.

    Raises:
      ValueError: an id is beyond the vocabulary, so the tokenizer is not the encoder's; or as in `tokenize`.
    """
    ids, mask = tokenize(tokenizer, prompts, max_tokens)
    if ids.max() >= config.vocab_size:
        raise ValueError(
            f"The tokenizer gives id {ids.max()}, the encoder knows {config.vocab_size}: they are not of one model."
        )
    on_devices = (jax.device_put(array, sharding) for array in (ids, mask))
    return encode(params, *on_devices, config), mask.sum(axis=1)
