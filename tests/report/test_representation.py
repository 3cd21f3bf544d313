"""Numbers of tokens against what they must be."""

import numpy as np
import pytest

from refalign_jax.report import representation


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_cka_of_the_same_turned_scaled_and_moved_is_one(rng):
    x = rng.standard_normal((50, 7))
    turn, _ = np.linalg.qr(rng.standard_normal((7, 7)))
    assert representation.linear_cka(x, x) == pytest.approx(1)
    assert representation.linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1)
    stretched = representation.linear_cka(x, x * np.arange(1, 8))
    assert 0.5 < stretched < 0.95


def test_cka_is_the_cosine_between_centred_gram_matrices(rng):
    x, y = rng.standard_normal((20, 4)), rng.standard_normal((20, 9))
    grams = [(v - v.mean(0)) @ (v - v.mean(0)).T for v in (x, y)]
    cosine = np.sum(grams[0] * grams[1]) / np.linalg.norm(grams[0]) / np.linalg.norm(grams[1])
    assert representation.linear_cka(x, y) == pytest.approx(cosine)
    assert representation.linear_cka(x[:, :1] * [[1, 0]], x[:, :1] * [[0, 1]]) == pytest.approx(1)
    assert np.isnan(representation.linear_cka(x, np.ones((20, 2))))


def clusters(rng, spread):
    """Three subjects in opposite directions, far from the origin, two tokens in each of four examples."""
    subjects = np.repeat([0, 1, 2], 8)
    examples = np.tile(np.repeat(np.arange(4), 2), 3)
    return 100 + 5 * np.eye(3)[subjects] + spread * rng.standard_normal((24, 3)), subjects, examples


def test_apart_and_mixed_subjects(rng):
    x, subjects, examples = clusters(rng, 0.1)
    allowed = representation.allowed_neighbours(np.eye(24, dtype=bool), examples)
    assert representation.neighbour_accuracy(x, subjects, allowed) == 1
    assert representation.silhouette(x, subjects) > 0.9
    mixed = rng.permutation(subjects)
    assert representation.silhouette(x, mixed) < 0.1
    assert representation.neighbour_accuracy(x, mixed, allowed) < 0.7
    assert np.isnan(representation.silhouette(x, np.zeros(24, int)))


def test_neighbours_of_ones_own_example_picture_and_place_do_not_count(rng):
    """Each token is nearest to itself in another example, and next to its neighbour in its own example."""
    subjects, examples, places = np.array([0, 0, 1, 1]), np.array([0, 1, 2, 3]), np.array([0, 1, 0, 1])
    x = np.array([[1, 0, 0], [0, 0, 1], [0.9, 0.1, 0], [0, 0.1, 0.9]])
    everything = ~np.eye(4, dtype=bool)
    assert representation.neighbour_accuracy(x, subjects, everything) == 0
    elsewhere = representation.allowed_neighbours(~everything, examples, places)
    assert elsewhere.tolist() == [[False, True, False, True], [True, False, True, False]] * 2
    same = np.zeros((4, 4), bool)
    same[0, 1] = same[1, 0] = True
    allowed = representation.allowed_neighbours(same, np.array([0, 1, 2, 2]))
    assert not allowed.diagonal().any()
    assert not allowed[0, 1]
    assert not allowed[2, 3]
    assert allowed[0, 2]
    assert np.isnan(representation.neighbour_accuracy(x, subjects, allowed))  # nobody has a neighbour of its own left


def test_random_tokens_are_at_chance(rng):
    subjects, examples = rng.integers(0, 5, 1000), np.arange(1000)
    allowed = representation.allowed_neighbours(np.eye(1000, dtype=bool), examples)
    level = representation.chance(subjects, allowed)
    assert level == pytest.approx(0.2, abs=0.01)
    accuracy = representation.neighbour_accuracy(rng.standard_normal((1000, 8)), subjects, allowed)
    assert accuracy == pytest.approx(level, abs=0.05)


def test_white_belongs_to_nobody(rng):
    patches = np.concatenate([rng.standard_normal((6, 4)), np.full((3, 4), 2.5)])
    patches[7] += 1e-3
    subjects = np.array([0, 0, 1, 1, 2, 2, 0, 1, 1])
    same = representation.same_pixels(patches)
    assert same[:6, :6].sum() == 6
    assert same[6:, 6:].all()
    assert representation.background(same, subjects).tolist() == [False] * 6 + [True] * 3


def test_maps_keep_clusters_apart_and_are_the_same_twice(rng):
    x, subjects, _ = clusters(rng, 0.1)
    for project in (representation.principal_map, representation.tsne_map):
        points = project(x)
        assert points.shape == (24, 2)
        assert representation.silhouette(points, subjects) > 0.5
        np.testing.assert_array_equal(points, project(x))
