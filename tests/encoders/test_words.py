"""The word hashes: one vector per word, wherever it stands."""

import numpy as np

from refalign_jax.encoders.words import WordHashes


def test_words_are_the_same_wherever_they_stand():
    encoder = WordHashes(64)
    (cat, walk, end), (dog, walk2, also, end2), (empty,), (marks,) = encoder.encode(
        ["Cat walks.", "dog walks, cat", "", " . "]
    )
    np.testing.assert_array_equal(cat, also)
    np.testing.assert_array_equal(walk, walk2)
    for other in (end2, empty, marks):
        np.testing.assert_array_equal(end, other)
    vectors = np.stack([cat, walk, dog, end])
    cosines = vectors @ vectors.T / 64
    assert np.abs(cosines - np.eye(4)).max() < 0.6
    many = np.concatenate(encoder.encode([" ".join(map(str, range(300)))]))
    assert many.shape == (301, 64)
    assert abs(many.mean()) < 0.03
    assert abs(many.std() - 1) < 0.03


def test_long_prompts_end_with_the_end_at_512():
    (rows,) = WordHashes(4).encode(["word " * 600])
    assert rows.shape == (512, 4)
    np.testing.assert_array_equal(rows[-1], WordHashes(4).encode([""])[0][0])
