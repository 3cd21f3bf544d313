"""Names of adapters against diffusers' own conversion of those that other frameworks write."""

import numpy as np
import pytest
from support import tiny

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers.loaders import lora_conversion_utils as theirs
from safetensors.torch import save_file

from refalign_jax.convert.dit import dit_table
from refalign_jax.convert.lora import merge, open_adapter
from refalign_jax.convert.table import to_published

RANK, ALPHA = 4, 2.0
LAYERS = [f"{kind}.{part}" for kind in ("self_attn", "cross_attn") for part in "qkvo"] + ["ffn.0", "ffn.2"]


def factors():
    """A and B of every layer that published adapters change, by Wan's names."""
    rng = np.random.default_rng(0)
    shapes = {name: value.shape for name, value in to_published(dit_table(tiny.DIT), tiny.params()["dit"])}
    for block in range(tiny.DIT.num_layers):
        for layer in LAYERS:
            name = f"blocks.{block}.{layer}"
            out, into = shapes[f"{name}.weight"]
            yield name, *(torch.tensor(rng.standard_normal(s, np.float32)) for s in ((RANK, into), (out, RANK)))


def merged(path):
    adapter = open_adapter(path, 0.7, tiny.DIT)
    return dict(to_published(dit_table(tiny.DIT), merge(tiny.params()["dit"], [adapter])))


def original():
    found = {}
    for name, a, b in factors():
        found |= {f"diffusion_model.{name}.lora_down.weight": a, f"diffusion_model.{name}.lora_up.weight": b}
        found |= {f"diffusion_model.{name}.alpha": torch.tensor(ALPHA)}
        found[f"diffusion_model.{name}.diff_b"] = 0.1 * b[:, 0]
    return found


def musubi():
    found = {}
    for name, a, b in factors():
        layer = f"lora_unet_{name.replace('.', '_')}"
        found |= {f"{layer}.lora_down.weight": a, f"{layer}.lora_up.weight": b, f"{layer}.alpha": torch.tensor(ALPHA)}
    return found


@pytest.mark.parametrize(
    ("write", "convert"),
    [
        (original, theirs._convert_non_diffusers_wan_lora_to_diffusers),
        (musubi, theirs._convert_musubi_wan_lora_to_diffusers),
    ],
    ids=["original", "musubi"],
)
def test_the_same_adapter_under_diffusers_names(tmp_path, write, convert):
    save_file(write(), tmp_path / "ours.safetensors")
    converted = convert(dict(write()))
    biases = {name: value for name, value in converted.items() if name.endswith("lora_B.bias")}
    names = {name.removesuffix(".lora_B.bias") + ".diff_b": value for name, value in biases.items()}
    factors = {name: value for name, value in converted.items() if name not in biases}
    save_file({name: x.contiguous() for name, x in (factors | names).items()}, tmp_path / "theirs.safetensors")
    ours, base = merged(tmp_path / "ours.safetensors"), dict(to_published(dit_table(tiny.DIT), tiny.params()["dit"]))
    for name, value in merged(tmp_path / "theirs.safetensors").items():
        assert tiny.relative(ours[name], value) <= 1e-6, name
    assert sum(not np.array_equal(ours[name], base[name]) for name in base) >= 30
