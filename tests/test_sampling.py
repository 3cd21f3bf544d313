"""Sampling: guidance, its two executions, and a program without a trace of alignment."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from refalign_jax.config import AlignmentConfig, MeshConfig, ModelConfig, SamplingConfig
from refalign_jax.models.condition import Condition
from refalign_jax.models.transformer import velocity
from refalign_jax.sampling import guided_velocity, sample, velocities
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
