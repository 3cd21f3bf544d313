"""The reference alignment loss: properties, options, gradient, memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refalign_jax import alignment
from refalign_jax.config import AlignmentConfig

CONFIG = AlignmentConfig(num_blocks=2, vfm_width=6)
R, P, E = 3, 4, 6
pull_push = jax.jit(alignment.pull_push, static_argnames="config")


def draw(seed, batch=2):
    rng = np.random.default_rng(seed)
    student, teacher = (jnp.asarray(rng.standard_normal((batch, R, P, E)), jnp.float32) for _ in range(2))
    return student, teacher, jnp.tile(jnp.arange(R), (batch, 1)), jnp.ones((batch, R), bool)


def plain(student, teacher, subject_ids, real, config):
    """Both terms of one sample from a matrix of all tokens, as the equations stand."""
    s, f = (np.asarray(x, np.float64) for x in (student, teacher))
    s, f = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (s, f))
    cosine = np.einsum("rpe,qte->rptq", s, f).transpose(0, 1, 3, 2)  # [R, P, R, P]
    own = np.einsum("rprp->rp", cosine)
    pull = np.maximum(0, 1 - own - config.pull_margin)[np.asarray(real)].mean()
    pairs = [
        np.maximum(0, config.push_margin - (1 - cosine[a, :, b]))
        for a in range(R)
        for b in range(R)
        if real[a] and real[b] and subject_ids[a] != subject_ids[b]
    ]
    return pull, np.mean(pairs) if pairs else 0.0


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, 2), min_size=R, max_size=R),
    st.integers(1, R),
    st.sampled_from([(0.0, 1.0), (0.2, 0.7), (0.5, 1.5)]),
)
def test_it_is_the_equations(seed, subjects, count, margins):
    student, teacher, _, _ = draw(seed, batch=1)
    ids, real = jnp.asarray([subjects]), (jnp.arange(R) < count)[None]
    config = dataclasses.replace(CONFIG, pull_margin=margins[0], push_margin=margins[1])
    pull, push = pull_push(student, teacher, ids, real, config)
    expected = plain(student[0], teacher[0], subjects, np.asarray(real[0]), config)
    np.testing.assert_allclose([pull[0], push[0]], expected, rtol=2e-5, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_scale_and_order_of_references_do_not_matter(seed, scale):
    student, teacher, ids, real = draw(seed)
    expected = pull_push(student, teacher, ids, real, CONFIG)
    np.testing.assert_allclose(pull_push(student * scale, teacher / scale, ids, real, CONFIG), expected, rtol=2e-5)
    order = jnp.asarray(np.random.default_rng(seed).permutation(R))
    permuted = pull_push(student[:, order], teacher[:, order], ids[:, order], real[:, order], CONFIG)
    np.testing.assert_allclose(permuted, expected, rtol=2e-5)


def test_one_subject_is_never_pushed():
    student, teacher, _, real = draw(0)
    same = jnp.zeros((2, R), jnp.int32)
    assert (pull_push(student, teacher, same, real, CONFIG)[1] == 0).all()
    _, two = pull_push(student, teacher, jnp.asarray([[0, 0, 1], [0, 0, 0]]), real, CONFIG)
    assert two[0] > 0
    assert two[1] == 0


def test_the_gradient_is_that_of_finite_differences():
    student, teacher, ids, real = draw(1)
    with jax.enable_x64(True):
        inputs = (jnp.asarray(teacher, jnp.float64), ids, real)

        def loss(student):
            pull, push = plain_jax(student, *inputs)
            return jnp.sum(pull + push)

        exact = jax.grad(loss)(jnp.asarray(student, jnp.float64))
        step = 1e-6
        rng = np.random.default_rng(0)
        for _ in range(5):
            direction = rng.standard_normal(student.shape)
            difference = (loss(student + step * direction) - loss(student - step * direction)) / (2 * step)
            np.testing.assert_allclose(jnp.vdot(exact, direction), difference, rtol=1e-5)
    ours = jax.grad(lambda s: sum(jnp.sum(x) for x in pull_push(s, teacher, ids, real, CONFIG)))(student)
    np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-6)


def plain_jax(student, teacher, ids, real):
    """The equations over one matrix of all tokens, differentiable, in the inputs' precision."""
    s, f = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (student, teacher))
    cosine = jnp.einsum("brpe,bqte->brpqt", s, f)
    own = jnp.einsum("brprp->brp", cosine)
    opposed = ids[:, :, None] != ids[:, None, :]
    push = jnp.sum(jax.nn.relu(cosine) * opposed[:, :, None, :, None], axis=(1, 2, 3, 4))
    return jnp.mean(1 - own, axis=(1, 2)), push / (P * P * jnp.sum(opposed, axis=(1, 2)))


def test_terms_of_an_empty_sample_are_zero():
    student, teacher, ids, _ = draw(0)
    none = jnp.zeros((2, R), bool)
    loss = lambda s: sum(jnp.sum(x) for x in pull_push(s, teacher, ids, none, CONFIG))  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(student)
    assert value == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_projectors_of_both_kinds_learn_to_align(projector):
    config = dataclasses.replace(CONFIG, projector=projector, normalize_targets=projector == "conv")
    params = alignment.init_projectors(config, 8, jax.random.key(0))
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.standard_normal((2, 1, R, P, 8)), jnp.float32)
    targets = jnp.asarray(rng.standard_normal((1, R, P, E)), jnp.float32)
    ids, counts = jnp.arange(R)[None], jnp.array([R])

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        made = alignment.make_targets(targets, ids, counts, (2, 2), config)
        pull, push = alignment.alignment_terms(params, features, made, config)
        return alignment.alignment_loss(pull, push, config)[0]

    first, gradient = loss(params)
    for _ in range(30):
        value, gradient = loss(params)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)
    assert value < 0.7 * first


def test_the_convolution_sees_neighbours_and_the_perceptron_does_not():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, P, 8)), jnp.float32)
    moved = x.at[0, 3].add(1.0)
    for projector, reaches in (("mlp", False), ("conv", True)):
        config = dataclasses.replace(CONFIG, projector=projector)
        params = jax.tree.map(lambda p: p[0], alignment.init_projectors(config, 8, jax.random.key(0)))
        a, b = (alignment.project(params, y, (2, 2), config)[0, 0] for y in (x, moved))
        assert bool(jnp.any(a != b)) == reaches, projector


def test_normalised_targets_have_no_spatial_mean_and_unit_deviation():
    targets = jnp.asarray(np.random.default_rng(0).standard_normal((2, R, P, E)) * 3 + 5, jnp.float32)
    out = alignment.normalize_targets(targets, 1.0)
    np.testing.assert_allclose(out.mean(axis=2), 0, atol=1e-5)
    np.testing.assert_allclose(out.std(axis=2), 1, atol=1e-4)
    assert abs(float(alignment.normalize_targets(targets, 0.5).mean(axis=2).mean())) > 0.1


def test_pull_alone_push_alone_and_weights():
    pull, push = jnp.array([0.5]), jnp.array([0.25])
    for weights, expected in (((1, 1), 0.75), ((1, 0), 0.5), ((0, 1), 0.25), ((2, 3), 1.75)):
        config = AlignmentConfig(pull_weight=weights[0], push_weight=weights[1])
        assert alignment.alignment_loss(pull, push, config)[0] == expected


def test_alignment_stops_at_its_step():
    config = AlignmentConfig(weight=0.5, stop_step=10)
    assert [float(alignment.schedule_weight(jnp.int32(s), config)) for s in (0, 9, 10, 99)] == [0.5, 0.5, 0, 0]
    assert alignment.schedule_weight(jnp.int32(10**6), AlignmentConfig()) == 1


def test_the_gate_is_the_cube_of_time():
    np.testing.assert_allclose(alignment.gate(jnp.array([0.0, 500, 1000]), AlignmentConfig()), [0, 0.125, 1])


@pytest.mark.parametrize(
    ("width", "tokens", "sentence"), [(5, P, "AlignmentConfig.vfm_width=6"), (E, 5, "5 tokens a reference")]
)
def test_targets_that_do_not_fit_are_refused(width, tokens, sentence):
    features, ids = jnp.zeros((1, R, tokens, width)), jnp.zeros((1, R), jnp.int32)
    with pytest.raises(ValueError, match=sentence):
        alignment.make_targets(features, ids, jnp.array([R]), (2, 2), CONFIG)


@pytest.mark.parametrize(("field", "value"), [("push_margin", 3.0), ("weight", -1.0), ("target_mean_removed", 2.0)])
def test_impossible_values_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        AlignmentConfig(**{field: value})


def test_memory_grows_with_one_pair_of_references_not_with_all():
    def temporary(references, tokens):
        shape = (1, references, tokens, 32)
        ids = jnp.arange(references)[None]

        def loss(student, teacher):
            pull, push = alignment.pull_push(student, teacher, ids, jnp.ones((1, references), bool), CONFIG)
            return jnp.sum(pull + push)

        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        return jax.jit(jax.grad(loss)).lower(x, x).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary(2, 512), temporary(6, 512)
    one_pair = 512 * 512 * 4
    assert few >= one_pair, "this would not notice a matrix"
    assert many - few < 3 * one_pair, "a matrix of all tokens would take 32 pairs more"
