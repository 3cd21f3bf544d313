"""UMT5 with its tokenizer as a `TextEncoder`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from refalign_jax.config import ComputeDtype, QuantisedDType
from refalign_jax.convert.files import open_weights
from refalign_jax.convert.quantise import read_quantised
from refalign_jax.convert.table import Tensors, read_stored, stored
from refalign_jax.convert.umt5 import umt5_names, umt5_table, untied
from refalign_jax.encoders.network import Resident, device_batch, find_file, replicate
from refalign_jax.models import umt5
from refalign_jax.types import Float, Params


class UMT5:
    """UMT5's encoder; its sizes are those of the weights.

    Args:
      path: a folder with weights and tokenizer as Wan2.1 or diffusers publish it, or the file of weights.
      compute_dtype: dtype of the matrix products.
      batch_size: prompts a call, rounded up to a multiple of the devices.
      quantised: dtype of the quantised weights; None for the weights as they are.

    Raises:
      ValueError: a file that is not whole, or not this model's; or no tokenizer. The first `encode` raises it for
        numbers that are not finite.
    """

    def __init__(
        self, path: Path, compute_dtype: ComputeDtype, batch_size: int, quantised: QuantisedDType | None = None
    ) -> None:
        weights = untied(open_weights(find_file(path, ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder", "."))))
        self._config = infer_umt5_config(weights, compute_dtype)
        check_umt5(self._config, weights)
        self.width = self._config.width
        place = _tokenizer_folder(path)
        self._tokenizer = umt5.load_tokenizer(place)
        self._tokenizer_files = [] if path in (place, *place.parents) else _tokenizer_files(place)
        self._params = Resident(lambda: replicate(load_umt5(self._config, weights, quantised)))
        self._batch_size, self._path, self._quantised = batch_size, path, quantised

    def describe(self) -> dict[str, Any]:
        """Returns JSON that identifies the encoder."""
        dtype = self._config.compute_dtype
        about = {"name": "umt5", "path": str(self._path), "width": self.width, "compute_dtype": dtype}
        if self._quantised:
            about["weights_dtype"] = self._quantised
        return about | ({"tokenizer": self._tokenizer_files} if self._tokenizer_files else {})

    def encode(self, prompts: Sequence[str]) -> list[Float[np.ndarray, "S width"]]:
        """Embeds prompts as `TextEncoder.encode` specifies; the last row is the end token's."""
        size, sharding = device_batch(self._batch_size)
        rows: list[np.ndarray] = []
        for start in range(0, len(prompts), size):
            part = list(prompts[start : start + size])
            padded = part + [""] * (size - len(part))
            embeddings, lengths = umt5.encode_prompts(
                self._params(), padded, self._tokenizer, self._config, sharding=sharding
            )
            rows += [row[:length] for row, length in zip(np.asarray(embeddings), lengths, strict=True)][: len(part)]
        return rows

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Counts tokens as `TextEncoder.count_tokens` specifies, the end token included."""
        return umt5.count_tokens(self._tokenizer, prompts)

    def release(self) -> None:
        """Frees the parameters' memory, as `TextEncoder.release` specifies."""
        self._params.release()


def infer_umt5_config(weights: Tensors, compute_dtype: ComputeDtype) -> umt5.UMT5Config:
    """Infers the sizes from the shapes of the first block and the number of blocks.

    Args:
      weights: as `convert.umt5.untied` returns them.
      compute_dtype: dtype of the matrix products.

    Raises:
      ValueError: the weights are not this model's.
    """
    names = umt5_names(weights.shapes)
    table = umt5_table(umt5.UMT5Config(num_layers=1), names)
    first = {entry.path: weights.shapes.get(entry.names[0]) for entry in table}
    lacking = [path for path, shape in first.items() if shape is None]
    if lacking:
        raise ValueError(f"{weights.source} does not hold a UMT5 encoder: it lacks {lacking[0]} under either name.")
    shapes = {path: shape for path, shape in first.items() if shape is not None}
    buckets, heads = shapes["blocks/position_bias"]
    return umt5.UMT5Config(
        vocab_size=shapes["token_embedding"][0],
        width=shapes["token_embedding"][1],
        attention_width=shapes["blocks/query/kernel"][0],
        ffn_width=shapes["blocks/ffn_in/kernel"][0],
        num_heads=heads,
        num_layers=sum(table[-1].name.format(i=i) in weights.shapes for i in range(1000)),
        num_buckets=buckets,
        compute_dtype=compute_dtype,
    )


def check_umt5(config: umt5.UMT5Config, weights: Tensors) -> Params:
    """Finds the parameters under Wan2.1's names or transformers', each a `table.Stored`, without reading them.

    Raises:
      ValueError: tensors that are missing, extra or misshapen, listed with their shapes.
    """
    shapes = jax.eval_shape(lambda: umt5.init(config, jax.random.key(0)))
    return stored(umt5_table(config, umt5_names(weights.shapes)), shapes, untied(weights))


def load_umt5(config: umt5.UMT5Config, weights: Tensors, quantised: QuantisedDType | None = None) -> Params:
    """Reads the parameters as numpy arrays, quantised if asked to; arguments and errors as in `check_umt5`."""
    found = check_umt5(config, weights)
    return read_quantised(found, quantised) if quantised else read_stored(found)


def _tokenizer_files(folder: Path) -> list[str]:
    """The files of a tokenizer, for a digest; beside them there may be weights."""
    names = ("tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    return [str(folder / name) for name in names if (folder / name).is_file()]


def _tokenizer_folder(path: Path) -> Path:
    """Finds the tokenizer of UMT5's folder or file: in the folder, in one of its folders, or beside it."""
    folder = path if path.is_dir() else path.parent
    for place in (folder / "google" / "umt5-xxl", folder / "tokenizer", folder, folder.parent / "tokenizer"):
        if any((place / name).is_file() for name in ("tokenizer.json", "spiece.model", "tokenizer_config.json")):
            return place
    raise ValueError(f"{path} has no tokenizer; put tokenizer.json or spiece.model into {folder / 'tokenizer'}.")
