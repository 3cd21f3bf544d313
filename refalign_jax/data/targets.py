"""What a dataset's VFM targets have in common, and how far the alignment loss contradicts itself on them.

Both read examples spread evenly over the dataset, one at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from refalign_jax.alignment import SubjectPatches, make_targets, remaining_push
from refalign_jax.config import AlignmentConfig
from refalign_jax.data.examples import MASK, fill
from refalign_jax.data.mixture import Source
from refalign_jax.types import Array, Float, Int

MEAN_EXAMPLES = 256
"""Most examples over which `target_mean` is taken."""
PUSH_EXAMPLES = 64
"""Most examples over which `remaining_pushes` are taken by default."""

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "as published": {},
    "center_targets=reference": {"center_targets": "reference"},
    "center_targets=dataset": {"center_targets": "dataset"},
}
"""Targets that are compared, and the fields of `AlignmentConfig` that make them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemainingPush:
    """The push that remains when tokens equal their targets, by variant."""

    examples: int
    """Number of examples with two subjects or more, over which the means are taken."""
    all_patches: Mapping[str, float]
    """Over all patches, by the names of `VARIANTS`; only the published one where the dataset has no subject masks."""
    subject_patches: Mapping[str, float]
    """Over patches that show a subject; empty where the dataset has no subject masks."""

    def __str__(self) -> str:
        """A sentence and a table."""
        if not self.examples:
            return "push        nothing is pushed apart: no example that was read has two subjects"
        lines = [
            f"push        {self.all_patches['as published']:.3f} remains when reference tokens equal their targets: "
            "by so much the published loss",
            f"            contradicts itself (mean L₋ of {self.examples} examples of two subjects or more)",
        ]
        if not self.subject_patches:
            return "\n".join(
                [*lines, "            without subject masks in the dataset, other targets can't be compared"]
            )
        lines.append(f"            {'targets':26s}{'all patches':>12s}  subject_patches_only")
        for name, value in self.all_patches.items():
            lines.append(f"            {name:26s}{value:12.3f}{self.subject_patches[name]:22.3f}")
        return "\n".join(lines)


def target_mean(source: Source, count: int) -> Float[np.ndarray, " E"]:
    """Mean of the VFM tokens that show a subject, float32; computed once for each source.

    Args:
      source: examples with subject masks.
      count: the mean is over the first so many, or `MEAN_EXAMPLES` spread evenly over them.

    Raises:
      ValueError: none of the examples shows a subject.
      CorruptRecordError: an example can't be read.
    """
    hashable: Any = source  # which its protocol does not say
    return _target_mean(hashable, count)


@functools.lru_cache(maxsize=4)
def _target_mean(source: Any, count: int) -> Float[np.ndarray, " E"]:
    total, number = np.zeros(source.spec.vfm_width, np.float64), 0
    for index in tqdm(_spread(count, MEAN_EXAMPLES), desc="mean of targets", unit="example", delay=5):
        arrays, _ = source[index]
        shown = arrays[MASK].astype(bool)
        total += _features(arrays)[shown].sum(0, dtype=np.float64)
        number += int(shown.sum())
    if not number:
        raise ValueError("No example that was read shows a subject, so that there is no mean to subtract from targets.")
    return (total / number).astype(np.float32)


def remaining_pushes(
    source: Source, config: AlignmentConfig, most: int = PUSH_EXAMPLES, count: int | None = None
) -> RemainingPush:
    """Measures the push that remains at perfect alignment on a dataset, for each kind of targets.

    Args:
      source: the examples.
      config: the margins; centring and patches are varied, a normalisation stays.
      most: largest number of examples that are read, spread evenly; 0 for all.
      count: the first so many examples are those of `target_mean`; None for all.

    Raises:
      CorruptRecordError: an example can't be read.
    """
    spec = source.spec
    config = dataclasses.replace(
        config, weight=1.0, vfm_width=spec.vfm_width, center_targets="none", subject_patches_only=False
    )
    names = [name for name in VARIANTS if spec.subject_mask or not VARIANTS[name]]
    if config.normalize_targets:  # which excludes centring
        names = names[:1]
    mean = target_mean(source, count or len(source)) if len(names) > 1 else np.zeros(spec.vfm_width, np.float32)
    sums, examples = np.zeros((2, len(names))), 0
    for index in tqdm(_spread(len(source), most), desc="remaining push", unit="example", delay=5):
        arrays, _ = source[index]
        ids = np.asarray(arrays["subject_ids"])
        if len(set(ids.tolist())) > 1:
            features, padding = _features(arrays), spec.most_references - len(ids)
            mask = arrays[MASK].astype(bool) if spec.subject_mask else np.ones(features.shape[:2], bool)
            rows = [np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))[None] for x in (features, ids, mask)]
            counts = np.array([len(ids)], np.int32)
            sums += np.asarray(_pushes(*rows, counts, mean[None], (config, tuple(names))))
            examples += 1
    means = sums / max(examples, 1)
    found = [dict(zip(names, row, strict=True)) for row in means.tolist()]
    return RemainingPush(examples=examples, all_patches=found[0], subject_patches=found[1] if spec.subject_mask else {})


@functools.partial(jax.jit, static_argnames="variants")
def _pushes(
    features: Float[Array, "1 R P E"],
    ids: Int[Array, "1 R"],
    mask: Array,
    count: Int[Array, " 1"],
    mean: Float[Array, "1 E"],
    variants: tuple[AlignmentConfig, tuple[str, ...]],
) -> Float[Array, "2 variants"]:
    """The push of one example over all patches and over those that show a subject, for each kind of targets."""
    config, names = variants
    grid, patches = (features.shape[2], 1), SubjectPatches(mask, mean)

    def push(name: str, only: bool) -> Array:
        varied = dataclasses.replace(config, subject_patches_only=only, **VARIANTS[name])
        return remaining_push(make_targets(features, ids, count, grid, varied, patches), varied)[0]

    return jnp.array([[push(name, only) for name in names] for only in (False, True)])


def _features(arrays: Mapping[str, np.ndarray]) -> Float[np.ndarray, "R P E"]:
    """The VFM features of an example, float32."""
    out = np.empty(arrays["vfm_features"].shape, np.float32)
    fill(out, arrays, "vfm_features")
    return out


def _spread(count: int, most: int) -> list[int]:
    """Indices of at most `most` of `count` examples, spread evenly; of all where `most` is 0."""
    number = min(count, most or count)
    return np.unique(np.linspace(0, count - 1, number).round().astype(int)).tolist()
