"""What records mean: numbers of subjects, and random numbers that depend on ids."""

from pathlib import Path

from refalign_jax.data.records import Reference, random_of, subject_ids


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
