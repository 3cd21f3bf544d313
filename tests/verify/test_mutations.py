"""Each line of the method, changed by itself, makes verification of the golden values fail.

A mutant is the whole package with one line changed (support/mutants.py). It runs without compilation, which would take
longer than the few operations themselves, except where gradients or many steps are needed.
"""

import contextlib
import importlib
import shutil

import jax
import numpy as np
import pytest
from support.mutants import mutant

pytestmark = pytest.mark.slow

VELOCITY, LOSS = ("velocity_t437.5_refs2",), ("step600_scalars",)
TABLES = ("train_timesteps", "train_weights")
RA, SAMPLE, ADAMW = ("ra3_loss",), ("sample_latents",), ("weights_after_3_adamw",)
CORRUPTION = ("step600_noisy", "step600_target")

BLOCK, LAYERS, ROPE, DIT = (f"models/{name}.py" for name in ("block", "layers", "rope", "dit"))
GRADIENTS = "models/gradients.py"
ATTENTION, EULER, OPTIMIZER = "models/attention.py", "solvers/euler.py", "trainer/optimizer.py"
NAMES = "shift1, scale1, gate1, shift2, scale2, gate2 = "
MODULATE, GATED = "(streams, (1 + scale1, shift1), shared)", "added = y.times("
SELF_QUERY, SELF_KEY = "query_norm(_heads(_kept(*q), c), turn)", "key_norm(_heads(_kept(*k), c), turn)"
CROSS_QUERY, CROSS_KEY = (
    'HeadsNorm(c.eps, name="query_norm")(_heads(_kept(*query), c))',
    'HeadsNorm(c.eps, name="key_norm")(_heads(key(text), c))',
)
SHARE = "jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))"
TIME = "[cos * jnp.cos(rest) - sin * jnp.sin(rest), sin * jnp.cos(rest) + cos * jnp.sin(rest)]"
PATCHES = "x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(B, -1, config.patch_values)"
UNPATCH = "x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(-1, frames"
SHIFT = "shift * uniform / (1 + (shift - 1) * uniform)"
BELL, GUIDED = (
    "np.exp(-2 * np.square((timesteps - 500) / 1000))",
    "v_n0 + s_ref * (v_nr - v_n0) + s_text * (v_cr - v_nr)",
)
LOSS_LINE = "weight * errors + alignment.schedule_weight(step, config.alignment) * gate * aligned"

MUTATIONS = {
    # the block
    "scale subtracted": (BLOCK, MODULATE, "(streams, (1 - scale1, shift1), shared)", VELOCITY),
    "scale without 1": (BLOCK, MODULATE, "(streams, (scale1, shift1), shared)", VELOCITY),
    "shift subtracted": (BLOCK, MODULATE, "(streams, (1 + scale1, -shift1), shared)", VELOCITY),
    "shift before scale": (BLOCK, MODULATE, "(streams, (1 + scale1, shift1 * (1 + scale1)), shared)", VELOCITY),
    "epsilon of the modulated norms": (
        GRADIENTS,
        "normal, scale = _centred(x, eps)",
        "normal, scale = _centred(x, 1e-5)",
        VELOCITY,
    ),
    "no gate": (GRADIENTS, GATED, f"gate = gate * 0 + 1; {GATED}", VELOCITY),
    "gate subtracted": (GRADIENTS, GATED, f"gate = -gate; {GATED}", VELOCITY),
    "gate plus 1": (GRADIENTS, GATED, f"gate = 1 + gate; {GATED}", VELOCITY),
    "shift and scale swapped": (BLOCK, NAMES, NAMES.replace("shift1, scale1", "scale1, shift1"), VELOCITY),
    "attention and network swapped": (BLOCK, NAMES, "shift2, scale2, gate2, shift1, scale1, gate1 = ", VELOCITY),
    "gates swapped": (BLOCK, NAMES, "shift1, scale1, gate2, shift2, scale2, gate1 = ", VELOCITY),
    "gate before scale": (BLOCK, NAMES, "shift1, gate1, scale1, shift2, gate2, scale2 = ", VELOCITY),
    "no block modulation": (BLOCK, "(shared.time + modulation)", "(shared.time + 0 * modulation)", VELOCITY),
    "no time in the block": (BLOCK, "(shared.time + modulation)", "(0 * shared.time + modulation)", VELOCITY),
    "no query norm": (BLOCK, SELF_QUERY, f"_heads(_kept(*q), c) + 0 * {SELF_QUERY}", VELOCITY),
    "no key norm": (BLOCK, SELF_KEY, f"_heads(_kept(*k), c) + 0 * {SELF_KEY}", VELOCITY),
    "queries not rotated": (BLOCK, SELF_QUERY, "query_norm(_heads(_kept(*q), c))", VELOCITY),
    "keys not rotated": (BLOCK, SELF_KEY, "key_norm(_heads(_kept(*k), c))", VELOCITY),
    "key norm for queries": (
        BLOCK,
        SELF_QUERY,
        f"key_norm(_heads(_kept(*q), c), turn) + 0 * {SELF_QUERY}",
        VELOCITY,
    ),
    "no cross query norm": (BLOCK, CROSS_QUERY, "_heads(_kept(*query), c) + 0 * " + CROSS_QUERY, VELOCITY),
    "no cross key norm": (BLOCK, CROSS_KEY, "_heads(key(text), c) + 0 * " + CROSS_KEY, VELOCITY),
    "keys as cross values": (
        BLOCK,
        "_heads(value(text), c), c)",
        "_heads(key(text) + 0 * value(text), c), c)",
        VELOCITY,
    ),
    "cross epsilon": (BLOCK, "(kernel,), c.eps, number)", "(kernel,), 1e-3, number)", VELOCITY),
    "no cross residual": (BLOCK, "(video + jnp.pad(added", "(0 * video + jnp.pad(added", VELOCITY),
    "cross attention doubled": (BLOCK, "(video + jnp.pad(added", "(video + 2 * jnp.pad(added", VELOCITY),
    "no cross attention": (BLOCK, "(video + jnp.pad(added", "(video + 0 * jnp.pad(added", VELOCITY),
    "exact gelu": (GRADIENTS, SHARE, "0.5 * (1 + jax.lax.erf(x / math.sqrt(2)))", VELOCITY),
    "silu for gelu": (GRADIENTS, SHARE, "jax.nn.sigmoid(x)", VELOCITY),
    "head without time": (BLOCK, "(e[:, None] + modulation)", "(0 * e[:, None] + modulation)", VELOCITY),
    "head without modulation": (BLOCK, "(e[:, None] + modulation)", "(e[:, None] + 0 * modulation)", VELOCITY),
    "head swapped": (BLOCK, "shift, scale = jnp.split((e", "scale, shift = jnp.split((e", VELOCITY),
    # its layers
    "epsilon of queries and keys": (
        GRADIENTS,
        "axis=(2, 3), keepdims=True) + eps)",
        "axis=(2, 3), keepdims=True) + 1e-5)",
        VELOCITY,
    ),
    "norm scale plus 1": (
        GRADIENTS,
        "    wide = x.astype(jnp.float32)\n    inv",
        "    weight, wide = 1 + weight, 1.0 * x\n    inv",
        VELOCITY,
    ),
    "mean not removed": (GRADIENTS, "x = x - jnp.mean(x, axis=-1, keepdims=True)", "x = x + 0", VELOCITY),
    "unbiased variance": (
        GRADIENTS,
        "jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps",
        "jnp.var(x, axis=-1, keepdims=True, ddof=1) + eps",
        VELOCITY,
    ),
    "no bias of the values": (BLOCK, "common=constants[0]", "common=0 * constants[0]", VELOCITY),
    "no bias": (LAYERS, "(self.features,)).astype(self.dtype)", "(self.features,)).astype(self.dtype) * 0", VELOCITY),
    # attention, positions, time
    "unscaled scores": (ATTENTION, "implementation=fused)", "implementation=fused, scale=1.0)", VELOCITY),
    "causal": (ATTENTION, "implementation=fused)", "implementation=fused, is_causal=True)", VELOCITY),
    "rotated backwards": (GRADIENTS, "y = y * cos + partner(x)", "y = y * cos - partner(x)", VELOCITY),
    "pairs of halves": (ROPE, "np.repeat(np.outer(", "(lambda a, n, axis: np.tile(a, n))(np.outer(", VELOCITY),
    "base of the rotation": (ROPE, "width, config.rope_theta)", "width, 1e3)", VELOCITY),
    "frequencies off by one": (ROPE, "np.arange(0, width, 2,", "np.arange(1, width + 1, 2,", VELOCITY),
    "rows and columns swapped": (ROPE, "for part in parts]", "for part in (parts[0], parts[2], parts[1])]", VELOCITY),
    "references at time 0": (DIT, "frames + jnp.arange(count)[None]", "jnp.arange(count)[None]", VELOCITY),
    "references one late": (DIT, "frames + jnp.arange(count)[None]", "1 + frames + jnp.arange(count)[None]", VELOCITY),
    "sine before cosine": (ROPE, TIME, f"{TIME}[::-1]", VELOCITY),
    "time frequencies": (ROPE, "dtype=np.float64) / half)", "dtype=np.float64) / (half - 1))", VELOCITY),
    "base of time": (ROPE, "10000.0 ** (", "1000.0 ** (", VELOCITY),
    "time in whole numbers": (ROPE, "(t - whole)[:, None]", "0 * (t - whole)[:, None]", VELOCITY),
    "no silu before the projection": (DIT, '"time_projection", nn.silu(e)', '"time_projection", e', VELOCITY),
    "no silu in the embedding": (DIT, 'nn.silu(layer("time_in"', '(layer("time_in"', VELOCITY),
    "patch transposed": (DIT, PATCHES, PATCHES.replace("4, 3, 5, 6", "4, 5, 3, 6"), VELOCITY),
    "velocity transposed": (DIT, UNPATCH, UNPATCH.replace("2, 4, 3, 5", "2, 5, 3, 4"), VELOCITY),
    "velocity negated": (DIT, "return unpatchify(", "return -unpatchify(", VELOCITY),
    # flow matching
    "no shift": ("flow.py", f"sigmas = {SHIFT}", "sigmas = uniform", TABLES),
    "shifted twice": ("flow.py", f"sigmas = {SHIFT}", f"uniform = {SHIFT}; sigmas = {SHIFT}", TABLES),
    "schedule begins one late": ("flow.py", "dtype=np.float64)[:-1]", "dtype=np.float64)[1:]", TABLES),
    "schedule one shorter": ("flow.py", "num_steps + 1, dtype=np.float64)[:-1]", "num_steps)", TABLES),
    "999 times": ("flow.py", "timesteps = 1000 * sigmas", "timesteps = 999 * sigmas", TABLES),
    "bell elsewhere": ("flow.py", BELL, BELL.replace("500", "499.9"), TABLES),
    "bell of another width": ("flow.py", BELL, BELL.replace("-2", "-1.999"), TABLES),
    "minimum kept": ("flow.py", "bell -= bell.min()", "bell -= 0", TABLES),
    "weights not normalised": ("flow.py", "(num_steps / bell.sum())", "(1 / bell.max())", TABLES),
    "one weight wrong": ("flow.py", "bell -= bell.min()", "bell -= bell.min(); bell[998] *= 1.002", TABLES),
    "noise and data swapped": (
        "flow.py",
        "(1 - sigma) * x + sigma * noise",
        "sigma * x + (1 - sigma) * noise",
        CORRUPTION,
    ),
    "target negated": ("flow.py", "sigma * noise, noise - x", "sigma * noise, x - noise", CORRUPTION),
    "target is the noise": ("flow.py", "sigma * noise, noise - x", "sigma * noise, noise", CORRUPTION),
    "sum of squares": ("flow.py", "jnp.mean(jnp.square(velocity", "jnp.sum(jnp.square(velocity", LOSS),
    "absolute error": ("flow.py", "jnp.mean(jnp.square(velocity", "jnp.mean(jnp.abs(velocity", LOSS),
    # the alignment loss
    "pull negated": ("alignment.py", "relu(1 - cosine -", "relu(1 + cosine -", RA),
    "pull margin": ("alignment.py", "1 - cosine - config.pull_margin", "1 - cosine - 0.1", RA),
    "push margin": ("alignment.py", "config.push_margin - 1 + cosine", "config.push_margin - 1.1 + cosine", RA),
    "push of everything": ("alignment.py", "jax.nn.relu(config.push_margin - 1 + cosine)", "(cosine)", RA),
    "subjects push themselves": ("alignment.py", "(subject_ids[:, :, None] != subj", "(-1 != subj", RA),
    "mean over tokens once": ("alignment.py", "total / jnp.maximum(pairs, 1)", "total / jnp.sqrt(pairs)", RA),
    "sum over tokens": (
        "alignment.py",
        "jnp.sum(distances, axis=(1, 2)) / jnp",
        "jnp.sum(distances, axis=(1, 2)) / 2 / jnp",
        RA,
    ),
    "features not normalised": ("alignment.py", "(_unit(jnp.where(shown", "((jnp.where(shown", RA),
    "push subtracted": ("alignment.py", "+ config.push_weight * push", "- config.push_weight * push", RA),
    "student and teacher swapped in the push": (
        "alignment.py",
        '"bpe,bqe->bpq", s[:, i], f[:, j]',
        '"bpe,bqe->bpq", s[:, i], s[:, j]',
        RA,
    ),
    "gate squared": ("alignment.py", "** config.gate_power", "** 2", LOSS),
    "gelu in the projector": ("alignment.py", "jax.nn.silu(constrain(x", "jax.nn.gelu(constrain(x", LOSS),
    "no activation in the projector": ("alignment.py", "jax.nn.silu(constrain(x", "(constrain(x", LOSS),
    "sum over blocks": ("objective.py", "jnp.mean(x, axis=0) * batch.aligned", "jnp.sum(x, axis=0)", LOSS),
    "no weight": ("objective.py", LOSS_LINE, LOSS_LINE.replace("weight * errors", "errors"), LOSS),
    "no gate on the loss": ("objective.py", LOSS_LINE, LOSS_LINE.replace(" * gate", ""), LOSS),
    "alignment negated": ("objective.py", LOSS_LINE, LOSS_LINE.replace("errors +", "errors -"), LOSS),
    # sampling
    "reference guidance negated": ("sampling.py", GUIDED, GUIDED.replace("(v_nr - v_n0)", "(v_n0 - v_nr)"), SAMPLE),
    "guidance from the references": ("sampling.py", GUIDED, GUIDED.replace("v_n0 + s_ref", "v_nr + s_ref"), SAMPLE),
    "text guidance from nothing": ("sampling.py", GUIDED, GUIDED.replace("(v_cr - v_nr)", "(v_cr - v_n0)"), SAMPLE),
    "scales swapped": ("sampling.py", "s_ref, s_text = ", "s_text, s_ref = ", SAMPLE),
    "last time not 0": (
        "sampling.py",
        "np.append(sigmas, 0)",
        "np.append(sigmas, 1e-3)",
        SAMPLE,
    ),
    "backwards": (EULER, "x + width * v", "x - width * v", SAMPLE),
    # the optimizer
    "no weight decay": (OPTIMIZER, "add_decayed_weights(config.weight_decay)", "add_decayed_weights(0.0)", ADAMW),
    "ascent": (OPTIMIZER, "x - rate * d", "x + rate * d", ADAMW),
    "epsilon": (OPTIMIZER, "config.beta2, config.eps)", "config.beta2, 1e-6)", ADAMW),
    "root epsilon": (OPTIMIZER, "config.beta2, config.eps)", "config.beta2, 1e-8, 1e-8)", ADAMW),
}
"""Name: file, its line or a part of it, what stands there instead, and the values that are verified."""

COMPILED = (ADAMW, SAMPLE)
"""Values whose program is compiled."""


@pytest.fixture(scope="module")
def folders(golden, tmp_path_factory):
    """Golden folders that hold the inputs and a few values each."""
    made = {}
    with np.load(golden / "dit_a" / "values.npz") as file:
        values = {name: file[name] for name in file.files}
    inputs = ["video_latents", "noise", "text", "negative_text", "reference_latents", "vfm_features", "sample_noise"]
    for names in {names for *_, names in MUTATIONS.values()}:
        folder = made[names] = tmp_path_factory.mktemp("values")
        for name in ("config.json", "weights.safetensors", *(f"{name}.safetensors" for name in names)):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(golden / "dit_a" / name, folder / name)
        kept = {n: v for n, v in values.items() if n in inputs or n in names or n[:4] in [x[:3] + "_" for x in names]}
        kept |= {n: v for n, v in values.items() if names == RA and n.startswith("ra3_") and n != "ra3_grad"}
        np.savez(folder / "values.npz", **kept)
    return made


def verify(folder, compiled):
    """The report of a fresh import of the package."""
    module = importlib.import_module("refalign_jax.verify.folder")
    with contextlib.nullcontext() if compiled else jax.disable_jit():
        return module.verify(folder)


def test_there_are_enough_mutations():
    assert len(MUTATIONS) >= 60
    assert len({(file, old, new) for file, old, new, _ in MUTATIONS.values()}) == len(MUTATIONS)


@pytest.mark.parametrize("names", sorted({names for *_, names in MUTATIONS.values()}))
def test_unchanged_code_passes(folders, names):
    with mutant("flow.py", "Flow matching:", "Flow matching:"):
        assert verify(folders[names], compiled=names in COMPILED).passed


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught(folders, name):
    file, old, new, names = MUTATIONS[name]
    with mutant(file, old, new):
        report = verify(folders[names], compiled=names in COMPILED)
    assert report.failed, f"{[(row.name, row.relative, row.tolerance + row.floor) for row in report.rows][:3]}"
