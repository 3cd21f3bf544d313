"""The mean of a dataset's targets and the push that remains on it, against token-by-token computations."""

import dataclasses

import numpy as np
import pytest
from support.examples import FLOAT32, make

from refalign_jax.config import AlignmentConfig
from refalign_jax.data.shard_writer import ShardWriter
from refalign_jax.data.shards import ShardSource
from refalign_jax.data.targets import remaining_pushes, target_mean

COUNTS = (2, 3, 1, 0, 2)
"""References of each example; those of the last show one subject."""


def examples(masks=True):
    rng = np.random.default_rng(5)
    for i, count in enumerate(COUNTS):
        features = (rng.standard_normal((count, 6, 7)) + 1).astype(np.float32)
        mask = rng.random((count, 6)) < 0.6
        ids = np.zeros(count, np.int32) if i == 4 else np.arange(count, dtype=np.int32)
        yield make(i, references=count, vfm_features=features, subject_ids=ids, subject_mask=mask if masks else None)


def write(folder, masks=True):
    with ShardWriter(folder, storage=FLOAT32, made={}) as writer:
        for example in examples(masks):
            writer.add(example)
    return ShardSource(folder)


def by_hand(kind, only, mean):
    """The mean over examples with several subjects of the push between every two tokens of different subjects."""
    pushes = []
    for example in examples():
        tokens = []
        for subject, features, mask in zip(
            example.subject_ids, example.vfm_features, example.subject_mask, strict=True
        ):
            shift = {"none": 0, "reference": features[mask].mean(0), "dataset": mean}[kind]
            for f in (features - shift)[mask if only else slice(None)].astype(np.float64):
                tokens.append((subject, f / np.linalg.norm(f)))
        if len({subject for subject, _ in tokens}) > 1:
            pushes.append(np.mean([max(0, f @ g) for i, f in tokens for j, g in tokens if i != j]))
    return np.mean(pushes), len(pushes)


def test_against_every_pair_of_tokens(tmp_path):
    source = write(tmp_path / "d")
    shown = [x[m] for example in examples() for x, m in zip(example.vfm_features, example.subject_mask, strict=True)]
    mean = target_mean(source, len(source))
    np.testing.assert_allclose(mean, np.concatenate(shown).mean(0), rtol=1e-5)
    found = remaining_pushes(source, AlignmentConfig(vfm_width=7))
    for name, kind in (
        ("as published", "none"),
        ("center_targets=reference", "reference"),
        ("center_targets=dataset", "dataset"),
    ):
        for values, only in ((found.all_patches, False), (found.subject_patches, True)):
            expected, count = by_hand(kind, only, mean)
            assert values[name] == pytest.approx(expected, rel=1e-4)
            assert found.examples == count == 2
    assert f"{found.all_patches['as published']:.3f} remains when reference tokens equal their targets" in str(found)
    assert len(str(found).splitlines()) == 6
    few = remaining_pushes(source, AlignmentConfig(), most=1)
    assert few.examples == 1
    assert few.all_patches != found.all_patches


def test_a_dataset_without_masks(tmp_path):
    found = remaining_pushes(write(tmp_path / "d", masks=False), AlignmentConfig())
    assert found.all_patches == {"as published": pytest.approx(by_hand("none", False, 0)[0], rel=1e-4)}
    assert found.subject_patches == {}
    assert "without subject masks in the dataset" in str(found)


def test_no_example_with_two_subjects(tmp_path):
    with ShardWriter(tmp_path / "d", storage=FLOAT32, made={}) as writer:
        writer.add(make(0, references=1))
    found = remaining_pushes(ShardSource(tmp_path / "d"), AlignmentConfig())
    assert found.examples == 0
    assert "nothing is pushed apart" in str(found)


def test_no_patch_that_shows_a_subject(tmp_path):
    blank = dataclasses.replace(make(0), subject_mask=np.zeros((2, 6), bool))
    with ShardWriter(tmp_path / "d", storage=FLOAT32, made={}) as writer:
        writer.add(blank)
    source = ShardSource(tmp_path / "d")
    with pytest.raises(ValueError, match="No example that was read shows a subject"):
        target_mean(source, 1)
