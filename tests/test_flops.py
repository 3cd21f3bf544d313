"""Operations counted from sizes against the products in the traced program."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from refalign_jax import flops
from refalign_jax.config import (
    AlignmentConfig,
    AttentionTiles,
    DiTConfig,
    ModelConfig,
    SamplingConfig,
    wan_1_3b,
    wan_14b,
)
from refalign_jax.initial import model_shapes
from refalign_jax.objective import Batch, sample_terms
from refalign_jax.sampling import num_forwards, sample

DIT = DiTConfig(
    width=48,
    num_layers=4,
    num_heads=2,
    ffn_width=80,
    text_width=20,
    frequency_width=16,
    latent_channels=6,
    remat="none",
)
SHAPE = flops.Shape(grid=(3, 8, 12), references=3, text_length=7)


def products(jaxpr, times: int = 1, batched: bool = False) -> int:
    """2·m·k·n of every product in a traced program, loops multiplied out; `batched`: of those with batch axes alone."""
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), (batch_axes, _) = equation.params["dimension_numbers"]
            if batched and not batch_axes:
                continue
            depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * depth * equation.outvars[0].aval.size * times
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            outputs = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * equation.outvars[0].aval.size * kernel.size // outputs * times
        inner = times * equation.params["length"] if name == "scan" else times
        branches = equation.params.get("branches")
        for value in [branches[0]] if branches else equation.params.values():
            for sub in value if isinstance(value, list | tuple) else [value]:
                if hasattr(sub, "jaxpr"):
                    total += products(sub.jaxpr, inner, batched)
                elif hasattr(sub, "eqns"):
                    total += products(sub, inner, batched)
    return total


def inputs(model: ModelConfig, shape: flops.Shape, samples: int = 1) -> tuple:
    """Shapes of a batch, its noise and indices, and of the step."""
    frames, rows, columns = shape.grid
    P = flops.tokens(model.dit, shape)[1] // max(shape.references, 1)

    def array(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((samples, *sizes), dtype)

    video = array(frames, rows, columns, model.dit.latent_channels)
    batch = Batch(
        video_latents=video,
        text=array(shape.text_length, model.dit.text_width),
        reference_latents=array(shape.references, rows, columns, model.dit.latent_channels),
        num_references=array(dtype=jnp.int32),
        subject_ids=array(shape.references, dtype=jnp.int32),
        vfm_features=array(shape.references, P, model.alignment.vfm_width),
        aligned=array(dtype=jnp.bool_),
    )
    return batch, video, array(dtype=jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)


@pytest.mark.parametrize("remat", ["none", "attention", "full"])
@pytest.mark.parametrize("references_attend", [False, True])
def test_products_of_attention(remat, references_attend):
    """Those between queries, keys and values have batch axes; without alignment no others have."""
    dit = dataclasses.replace(DIT, remat=remat, reference_cross_attention=references_attend)
    model = ModelConfig(dit=dit, alignment=AlignmentConfig(num_blocks=1, weight=0.0))
    gradient = jax.make_jaxpr(jax.grad(loss(model)))(model_shapes(model), *inputs(model, SHAPE)).jaxpr
    assert products(gradient, batched=True) == flops.attention_flops(model, SHAPE, "xla")
    forward = jax.make_jaxpr(loss(model))(model_shapes(model), *inputs(model, SHAPE)).jaxpr
    assert 2 * products(forward, batched=True) == flops.sample_attention_flops(dit, SHAPE, 2)


def loss(model: ModelConfig):
    return lambda params, *xs: jnp.mean(sample_terms(params, *xs, model)[0].loss)


@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_forward_pass_counts_every_product(projector):
    model = ModelConfig(dit=DIT, alignment=AlignmentConfig(num_blocks=3, vfm_width=10, projector=projector))
    traced = products(jax.make_jaxpr(loss(model))(model_shapes(model), *inputs(model, SHAPE)).jaxpr)
    assert traced == flops.forward_flops(DIT, SHAPE) + sum(flops.alignment_flops(DIT, model.alignment, SHAPE))


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_training_step_at_full_width(weight):
    """The 1.3B model with two layers; the loss is differentiated by everything but the inputs of the first layers."""
    dit = dataclasses.replace(wan_1_3b(), num_layers=2, remat="none")
    model = ModelConfig(dit=dit, alignment=AlignmentConfig(num_blocks=1, weight=weight))
    shape = flops.Shape(grid=(21, 60, 104), references=3, text_length=512)
    gradient = jax.make_jaxpr(jax.grad(loss(model)))(model_shapes(model), *inputs(model, shape)).jaxpr
    recomputed = sum(flops.alignment_flops(dit, model.alignment, shape)) if weight else 0  # alignment's own remat
    assert products(gradient) - recomputed == pytest.approx(flops.train_flops(model, shape), rel=0.01)


@pytest.mark.parametrize(("references", "scales"), [(0, (5.0, 7.5)), (2, (5.0, 7.5)), (2, (1.0, 1.0))])
def test_sampling(references, scales):
    shape = dataclasses.replace(SHAPE, references=references)
    config = SamplingConfig(num_steps=5, reference_guidance=scales[0], text_guidance=scales[1])
    model = ModelConfig(dit=DIT, alignment=AlignmentConfig(num_blocks=3, vfm_width=10))
    batch, video, *_ = inputs(model, shape)
    arguments = model_shapes(model)["dit"], video, batch.condition, batch.condition
    traced = jax.make_jaxpr(lambda *xs: sample(*xs, dit=DIT, config=config))(*arguments)
    assert products(traced.jaxpr) == flops.sample_flops(DIT, shape, num_forwards(config, references > 0))


def test_the_paper_shape():
    shape = flops.Shape(grid=(21, 60, 104), references=3, text_length=512)
    assert flops.tokens(wan_14b(), shape) == (32_760, 4_680)
    # 6 operations a parameter and token, and attention 12·layers·T²·D, are a lower bound within a sixth
    rough = 6 * 14.3e9 * 37_440 + 12 * 40 * 37_440**2 * 5120
    assert rough * 0.9 < flops.train_flops(ModelConfig(dit=wan_14b()), shape) < rough * 1.2


def test_maxdiffusion_shape():
    """Its published count for Wan2.1 14B at 81 frames of 720p, without references: 19,573 TFLOP a sample."""
    model = ModelConfig(dit=wan_14b(), alignment=AlignmentConfig(weight=0.0))
    shape = flops.Shape(grid=(21, 90, 160), references=0, text_length=512)
    assert flops.train_flops(model, shape) == pytest.approx(19_573e12, rel=0.01)


@functools.cache
def counted(remat: str, weight: float, samples: int) -> tuple[int, int]:
    """Products of a gradient with this remat policy, and those that are counted as repeated, of one sample."""
    dit = dataclasses.replace(DIT, remat=remat)
    model = ModelConfig(dit=dit, alignment=AlignmentConfig(num_blocks=2, weight=weight))
    gradient = jax.make_jaxpr(jax.grad(loss(model)))(model_shapes(model), *inputs(model, SHAPE, samples)).jaxpr
    return products(gradient) // samples, flops.repeated_flops(model, SHAPE, "xla", alone=samples == 1)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("remat", ["dots", "narrow", "attention", "full"])
def test_what_remat_repeats(remat, weight, samples):
    (all_retained, none), (some_retained, again) = counted("none", weight, samples), counted(remat, weight, samples)
    assert some_retained - all_retained == again - none


def test_kernels_that_store_no_scores_repeat_them():
    model = ModelConfig(dit=DIT, alignment=AlignmentConfig(num_blocks=1, weight=0.0))
    two = dataclasses.replace(model, dit=dataclasses.replace(model.dit, tiles=AttentionTiles(fused_backward=False)))
    T, L = sum(flops.tokens(DIT, SHAPE)), flops.tokens(DIT, SHAPE)[0]
    product = 2 * DIT.num_layers * (T * T + L * SHAPE.text_length) * DIT.width
    for config, kernel, products_again in ((two, "splash", 3), (model, "splash", 1), (model, "cudnn", 1)):
        assert flops.repeated_flops(config, SHAPE, kernel) == products_again * product
