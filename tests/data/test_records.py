"""What records mean: numbers of subjects, and random numbers that depend on ids."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco

from refalign_jax.data.records import Reference, RunLengths, subject_ids
from refalign_jax.data.seeds import random_of


def test_subjects_are_numbered_in_their_order():
    for names, expected in (
        ((), []),
        ((None, "cat", "cat"), [0, 1, 1]),
        (("b", None, "a", None, "b"), [0, 1, 2, 3, 0]),
    ):
        references = tuple(Reference(path=Path("a.png"), subject=name) for name in names)
        assert subject_ids(references).tolist() == expected


def test_random_numbers_depend_on_id_and_seed_alone():
    draws = [random_of(id, seed).random() for id, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1))]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 70))
def test_run_lengths_are_decoded_or_refused(seed, rows, columns):
    rng = np.random.default_rng(seed)
    mask = (rng.random((rows, columns)) < rng.random()) if seed % 2 else np.arange(rows * columns).reshape(rows, -1) > 9
    counts = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    np.testing.assert_array_equal(RunLengths((rows, columns), counts).decode(), mask)
    with pytest.raises(ValueError, match=r"can't be decoded: its runs have"):
        RunLengths((rows + 1, columns), counts).decode()
    for changed in (counts[:-1], counts + "1", counts[1:], "o" + counts, "\0" + counts, "é"):
        with contextlib.suppress(ValueError):
            assert RunLengths((rows, columns), changed).decode().shape == mask.shape
