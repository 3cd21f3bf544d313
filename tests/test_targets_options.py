"""Centred targets and patches that show a subject: values, gradients, padding, what remains of the push."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny

from refalign_jax import alignment
from refalign_jax.alignment import SubjectPatches
from refalign_jax.config import AlignmentConfig
from refalign_jax.objective import objective

R, P, E = 3, 4, 6
CONFIG = AlignmentConfig(num_blocks=2, vfm_width=E)
KINDS = ("none", "reference", "dataset")


def config_of(kind, only, **changes):
    return dataclasses.replace(CONFIG, center_targets=kind, subject_patches_only=only, **changes)


@jax.jit
def terms_of(student, features, ids, count, patches):
    """Pull, push and remaining push of one sample for every combination, [kinds, 2, 3]."""

    def one(config):
        made = alignment.make_targets(features, ids, count, (2, 2), config, patches)
        pull, push = alignment.pull_push(student, made.features, ids, made.real, config, made.subject_mask)
        return [pull[0], push[0], alignment.remaining_push(made, config)[0]]

    margins = {"pull_margin": 0.1, "push_margin": 0.9}
    return jnp.array([[one(config_of(kind, only, **margins)) for only in (False, True)] for kind in KINDS])


def unit(x):
    length = np.linalg.norm(x)
    return x / length if length > 0 else x


def by_hand(student, features, ids, count, mask, mean, kind, only):
    """The same from the definitions, token by token, float64."""
    tokens = []
    for r in range(count):
        shown = features[r][mask[r]]
        shift = {"none": 0, "reference": shown.mean(0) if len(shown) else 0, "dataset": mean}[kind]
        tokens += [
            (ids[r], unit(student[r, p]), unit(features[r, p] - shift)) for p in range(P) if mask[r, p] or not only
        ]

    def push(which):
        values = [max(0, 0.9 - 1 + which(a) @ f) for a in tokens for subject, _, f in tokens if a[0] != subject]
        return np.mean(values) if values else 0.0

    pull = np.mean([max(0, 1 - s @ f - 0.1) for _, s, f in tokens]) if tokens else 0.0
    return pull, push(lambda token: token[1]), push(lambda token: token[2])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 2), min_size=R, max_size=R), st.integers(0, R), st.floats(0, 1))
def test_values_are_those_of_the_definitions(seed, subjects, count, share):
    rng = np.random.default_rng(seed)
    student, features = rng.standard_normal((2, R, P, E)).astype(np.float32) + 0.5
    mask, mean = rng.random((R, P)) < share, rng.standard_normal(E).astype(np.float32)
    patches = SubjectPatches(jnp.asarray(mask)[None], jnp.asarray(mean)[None])
    given = (jnp.asarray(x)[None] for x in (student, features, np.int32(subjects), np.int32(count)))
    ours = np.asarray(terms_of(*given, patches))
    for i, kind in enumerate(KINDS):
        for only in (False, True):
            expected = by_hand(student, features, subjects, count, mask, mean, kind, only)
            np.testing.assert_allclose(ours[i, int(only)], expected, rtol=2e-4, atol=2e-6)


def test_without_options_the_patches_do_not_matter():
    rng = np.random.default_rng(0)
    features, ids, counts = (
        jnp.asarray(rng.standard_normal((1, R, P, E)), jnp.float32),
        jnp.arange(R)[None],
        jnp.array([2]),
    )
    plain = alignment.make_targets(features, ids, counts, (2, 2), CONFIG)
    given = alignment.make_targets(features, ids, counts, (2, 2), CONFIG, SubjectPatches(jnp.zeros((1, R, P), bool)))
    assert given.subject_mask is plain.subject_mask is None
    np.testing.assert_array_equal(given.features, plain.features)


def test_centring_over_the_dataset_leaves_the_subjects_apart():
    """Tokens with a common mean push although each is at its target; without the mean they do not."""
    rng = np.random.default_rng(0)
    subjects = np.stack([np.eye(E)[0], -np.eye(E)[0], np.eye(E)[1]])
    features = 5 * np.ones(E) + subjects[:, None] + 0.01 * rng.standard_normal((R, P, E))
    ids, counts = jnp.arange(R)[None], jnp.array([R])
    patches = SubjectPatches(jnp.ones((1, R, P), bool), jnp.asarray(features.mean((0, 1)), jnp.float32)[None])
    left = {
        kind: float(
            alignment.remaining_push(
                alignment.make_targets(
                    jnp.asarray(features, jnp.float32)[None], ids, counts, (2, 2), config_of(kind, True), patches
                ),
                config_of(kind, True),
            )[0]
        )
        for kind in ("none", "dataset")
    }
    assert left["none"] > 0.9
    assert left["dataset"] < 0.05


@pytest.mark.parametrize(("kind", "only"), [("reference", False), ("dataset", True)])
def test_the_objective_with_padding_and_blank_references(kind, only):
    """Gradients are finite, padding has no effect, and a sample of blank references has no loss but is trained."""
    model = dataclasses.replace(
        tiny.MODEL, alignment=dataclasses.replace(tiny.MODEL.alignment, center_targets=kind, subject_patches_only=only)
    )
    params, batch = tiny.params(), tiny.batch([3, 2, 2])
    rng = np.random.default_rng(1)
    mask = rng.random(batch.vfm_features.shape[:3]) < 0.5
    mask[2] = False
    mean = jnp.asarray(rng.standard_normal((3, 8)), jnp.float32)
    noise, index = jax.random.normal(jax.random.key(7), batch.video_latents.shape), jnp.array([40, 300, 800])

    loss = jax.jit(jax.value_and_grad(lambda p, b: objective(p, b, noise, index, jnp.int32(0), model), has_aux=True))
    (value, terms), gradient = loss(params, batch._replace(patches=SubjectPatches(jnp.asarray(mask), mean)))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradient))
    assert float(jnp.abs(gradient["projectors"]["in"]).max()) > 0
    assert (float(terms.alignment[2]) == 0) == only
    padding = np.arange(3) >= np.array([3, 2, 2])[:, None]
    other = batch._replace(
        vfm_features=jnp.where(padding[..., None, None], -1e30, batch.vfm_features),
        patches=SubjectPatches(jnp.asarray(mask | padding[..., None]), mean),
    )
    (again, _), changed = loss(params, other)
    assert float(again) == pytest.approx(float(value), rel=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (gradient, changed)), strict=True):
        assert tiny.relative(a, b) < 1e-5


def test_the_order_of_references_and_of_tokens_does_not_matter():
    rng = np.random.default_rng(3)
    student, features = (jnp.asarray(rng.standard_normal((1, R, P, E)), jnp.float32) for _ in range(2))
    patches = SubjectPatches(
        jnp.asarray(rng.random((1, R, P)) < 0.6), jnp.asarray(rng.standard_normal((1, E)), jnp.float32)
    )
    expected = terms_of(student, features, jnp.arange(R)[None], jnp.array([R]), patches)
    order, places = rng.permutation(R), rng.permutation(P)
    moved = [x[:, order][:, :, places] for x in (student, features, patches.mask)]
    ours = terms_of(*moved[:2], jnp.asarray(order)[None], jnp.array([R]), SubjectPatches(moved[2], patches.mean))
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-6)


def test_what_is_missing_or_contradicts_itself_is_refused():
    features, ids, counts = jnp.zeros((1, R, P, E)), jnp.zeros((1, R), jnp.int32), jnp.array([R])
    for kind, only, sentence in (
        ("none", True, "subject_patches_only needs to know which patches show a subject"),
        ("reference", False, "center_targets='reference' needs to know which patches"),
    ):
        with pytest.raises(ValueError, match=sentence):
            alignment.make_targets(features, ids, counts, (2, 2), config_of(kind, only))
    patches = SubjectPatches(jnp.ones((1, R, P), bool))
    with pytest.raises(ValueError, match="center_targets='dataset' needs the mean over the dataset"):
        alignment.make_targets(features, ids, counts, (2, 2), config_of("dataset", False), patches)
    with pytest.raises(ValueError, match=r"normalize_targets subtracts a mean already; choose it or center_targets="):
        config_of("dataset", False, normalize_targets=True)
    assert not config_of("dataset", True, weight=0.0).needs_subject_mask
    assert config_of("none", True).needs_subject_mask
