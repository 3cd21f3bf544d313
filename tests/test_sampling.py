"""Sampling: guidance, its two executions, and a program without a trace of alignment."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from refalign_jax.config import AlignmentConfig, MeshConfig, ModelConfig, SamplingConfig
from refalign_jax.models.condition import Condition
from refalign_jax.models.transformer import velocity
from refalign_jax.sampling import (
    advance,
    begin,
    guided_steps,
    guided_velocity,
    noise_levels,
    num_forwards,
    sample,
    velocities,
)
from refalign_jax.sharding import make_mesh, replicated, state_sharding

STEPS = SamplingConfig(num_steps=3)


def inputs(counts=None, references=True):
    batch = tiny.batch([3])
    negative = jnp.asarray(np.random.default_rng(5).standard_normal(batch.text.shape), jnp.float32)
    prompt = Condition(batch.text, batch.reference_latents, counts) if references else Condition(batch.text)
    return tiny.params()["dit"], batch.video_latents, prompt, prompt._replace(text=negative)


@pytest.mark.parametrize("references", [True, False])
def test_one_batched_forward_equals_one_after_the_other(references):
    args = inputs(references=references)
    apart = sample(*args, dit=tiny.DIT, config=STEPS)
    batched = sample(*args, dit=tiny.DIT, config=dataclasses.replace(STEPS, batched_guidance=True))
    assert tiny.relative(batched, apart) <= 1e-5


def test_guidance_is_its_equation():
    params, x, prompt, negative = inputs()
    t = jnp.array([700.0])

    def v(text, references):
        return velocity(params, tiny.DIT, x, t, Condition(text, references))

    references = prompt.reference_latents
    n0, nr, cr = v(negative.text, 0 * references), v(negative.text, references), v(prompt.text, references)
    each = functools.partial(velocities, params, tiny.DIT, x, t, batched=False)
    guided = guided_velocity(lambda *conditions: each(conditions), prompt, negative, STEPS)
    assert tiny.relative(guided, n0 + 5.0 * (nr - n0) + 7.5 * (cr - nr)) <= 1e-5
    assert tiny.relative(n0, v(negative.text, None)) > 1e-4, "zero references are not the absence of references"


def test_one_video_over_eight_devices_is_the_same_video():
    """Its tokens and heads are split; a batch of one can't be."""
    dit = dataclasses.replace(tiny.DIT, width=64, num_heads=8, num_layers=1)
    params = tiny.params(ModelConfig(dit=dit, alignment=AlignmentConfig(num_blocks=1, vfm_width=8)))["dit"]
    args = (params, *inputs(counts=jnp.array([2]))[1:])
    alone = sample(*args, dit=dit, config=STEPS)
    mesh = make_mesh(MeshConfig(context=4, tensor=2))
    placed = (jax.device_put(params, state_sharding(params, mesh)), *jax.device_put(args[1:], replicated(mesh)))
    with jax.set_mesh(mesh):
        spread = sample(*placed, dit=dit, config=STEPS)
    assert tiny.relative(spread, alone) <= 1e-5


def test_padded_references_change_no_sample():
    args = inputs(counts=jnp.array([1]))
    padded = sample(*args, dit=tiny.DIT, config=STEPS)
    params, noise, *conditions = args
    one = [c._replace(reference_latents=c.reference_latents[:, :1], num_references=None) for c in conditions]
    alone = sample(params, noise, *one, dit=tiny.DIT, config=STEPS)
    assert tiny.relative(padded, alone) <= 1e-5


@pytest.mark.parametrize("solver", ["euler", "dpm++", "unipc"])
def test_steps_in_parts_are_the_whole(solver):
    params, noise, *conditions = inputs(counts=jnp.array([2]))
    config = dataclasses.replace(STEPS, num_steps=4, solver=solver)
    state = begin(params, noise, tuple(conditions), dit=tiny.DIT, config=config)
    for part in itertools.pairwise((0, 1, 3, 4)):
        state = advance(params, state, tuple(map(jnp.int32, part)), tuple(conditions), dit=tiny.DIT, config=config)
    whole = sample(params, noise, *conditions, dit=tiny.DIT, config=config)
    assert tiny.relative(state.x, whole) <= 1e-6


@pytest.mark.parametrize(
    ("reference", "text", "references", "branches"),
    [(5.0, 7.5, True, 3), (1.0, 7.5, True, 2), (1.0, 1.0, True, 1), (5.0, 0.0, True, 2), (5.0, 1.0, False, 1)],
)
def test_a_branch_whose_factor_is_0_is_not_computed(reference, text, references, branches):
    params, x, prompt, negative = inputs(references=references)
    config = dataclasses.replace(STEPS, reference_guidance=reference, text_guidance=text)
    counts = []

    def v(*conditions):
        counts.append(len(conditions))
        return velocities(params, tiny.DIT, x, jnp.array([700.0]), conditions, batched=False)

    guided = guided_velocity(v, prompt, negative, config)
    assert counts == [branches]
    n0, nr, cr = v(negative.without_references(), negative, prompt)
    expected = n0 + reference * (nr - n0) + text * (cr - nr) if references else nr + text * (cr - nr)
    assert tiny.relative(guided, expected) <= 1e-5


@pytest.mark.parametrize(("interval", "guided"), [((0.8, 0.95), [1, 2]), ((0.95, 1.0), [0])])
def test_guidance_between_two_noise_levels(interval, guided):
    params, x, prompt, negative = inputs()
    config = dataclasses.replace(STEPS, num_steps=4, guidance_interval=interval)
    found = sample(params, x, prompt, negative, dit=tiny.DIT, config=config)
    each = jax.jit(functools.partial(velocities, dit=tiny.DIT, batched=False))
    sigmas = np.append(noise_levels(config), 0)
    for i, sigma in enumerate(sigmas[:-1]):
        t = jnp.full(1, 1000 * sigma, jnp.float32)
        n0, nr, cr = each(params, x=x, t=t, conditions=(negative.without_references(), negative, prompt))
        x = x + np.float32(sigmas[i + 1] - sigma) * (n0 + 5.0 * (nr - n0) + 7.5 * (cr - nr) if i in guided else cr)
    assert tiny.relative(found, x) <= 1e-5
    assert num_forwards(config, references=True) == 3 * len(guided) + 4 - len(guided)


def equations(jaxpr):
    """All equations of a traced program, those of its parts too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, tuple) else [value]:
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def test_outside_the_interval_one_branch_is_computed():
    """A step chooses between two programs, one of which has a third of the other's products."""
    config = dataclasses.replace(STEPS, guidance_interval=(0.8, 0.95))
    params, *rest = inputs()
    program = jax.make_jaxpr(functools.partial(sample, dit=tiny.DIT, config=config))(params, *rest)
    choices = [equation.params["branches"] for equation in equations(program.jaxpr) if "branches" in equation.params]
    counts = [[sum(e.primitive.name == "dot_general" for e in equations(b.jaxpr)) for b in each] for each in choices]
    plain, guided = max(counts, key=sum)
    assert 0 < 3 * plain == guided


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"guidance_interval": (0.9, 0.3)}, "guidance_interval=(0.9, 0.3) must be a noise level and a larger one"),
        ({"guidance_interval": (0.0, 1.5)}, "guidance_interval=(0.0, 1.5) must be at least 0 and at most 1"),
        ({"guidance_interval": (0.0, 0.1)}, "holds none of the 3 noise levels, which go from 1 to 0.7143"),
        ({"cache_threshold": -0.1}, "cache_threshold=-0.1 must be at least 0 and at most 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_can_not_be_is_one_sentence(change, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        guided_steps(dataclasses.replace(STEPS, **change))


@pytest.mark.parametrize(
    ("solver", "table", "first", "last"),
    [
        ("unipc", "refalign", 1.0, 0.208333),
        ("dpm++", "wan", 1.0, 0.208333),
        ("unipc", "wan", 0.999800, 0.208160),
        ("unipc", "diffusers-0.36", 0.999800, 0.208160),
        ("unipc", "diffusers-0.37", 0.999999, 0.211622),
    ],
)
def test_published_tables(solver, table, first, last):
    """The first and the last noise level at 20 steps and shift 5."""
    levels = noise_levels(SamplingConfig(num_steps=20, shift=5.0, solver=solver, sigmas=table))
    assert (round(levels[0], 6), round(levels[-1], 6)) == (first, last)
    assert (np.diff(levels) < 0).all()


def test_four_steps_are_those_of_distilled_models():
    """At shift 5: 1000, 937.5, 833.3 and 625, cut to whole numbers if asked."""
    levels = noise_levels(SamplingConfig(num_steps=4))
    np.testing.assert_allclose(1000 * levels, [1000, 937.5, 2500 / 3, 625])
    given = SamplingConfig(num_steps=4, sigma_values=tuple(levels.tolist()))
    np.testing.assert_array_equal(noise_levels(given), levels)


def program(config):
    """The optimised HLO of sampling with the transformer of a model, source metadata stripped."""
    params = tiny.params(config)
    lowered = sample.lower(params["dit"], *inputs()[1:], dit=config.dit, config=STEPS)
    text = lowered.compile().as_text()
    tables = r"^(FileNames|FunctionNames|FileLocations|StackFrames)\n(.+\n)*"
    return re.sub(r",? ?metadata=\{[^}]*\}", "", re.sub(tables, "", text, flags=re.MULTILINE))


def test_the_sampling_program_has_no_trace_of_alignment():
    aligned = tiny.MODEL
    unaligned = dataclasses.replace(aligned, alignment=AlignmentConfig(weight=0.0, num_blocks=1, vfm_width=3))
    text = program(aligned)
    jax.clear_caches()
    assert program(unaligned) == text
    assert "fusion" in text
    assert not re.search(r"align|projector|vfm", text, re.IGNORECASE)
