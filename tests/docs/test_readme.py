"""The Python examples of the README, run at tiny size."""

import json
import re

import jax
import jax.numpy as jnp
from support.pages import blocks
from support.places import ROOT

from refalign_jax.config import AlignmentConfig, DiTConfig, ModelConfig
from refalign_jax.convert.checkpoint import save_params
from refalign_jax.convert.transfer import export_weights
from refalign_jax.initial import random_params

LOSS, SAMPLE = blocks(ROOT / "README.md", "python")


def _replaced(code: str, **changes: tuple[str, str]) -> str:
    for name, (pattern, new) in changes.items():
        code, count = re.subn(pattern, new, code)
        assert count == 1, f"the example has no {name} to make smaller"
    return code


def test_alignment_loss_of_other_features():
    code = _replaced(LOSS, sizes=(r"= 9, 1, 3, 30, 52, 1536, 1024\b", "= 2, 1, 3, 2, 3, 8, 4"))
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["loss"].shape == (1,)
    assert jnp.isfinite(names["loss"]).all()
    # Two references of three are one subject, and they do not repel each other: 4 of the 6 ordered pairs push.
    assert names["push"] > 0


def test_weights_are_loaded_and_sampled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dit = DiTConfig(width=128, num_layers=2, num_heads=1, ffn_width=32, text_width=256, compute_dtype="float32")
    model = ModelConfig(dit=dit, alignment=AlignmentConfig(num_blocks=1, weight=0.0))
    save_params(tmp_path / "checkpoint", random_params(model, jax.random.key(0)), model)
    export_weights(tmp_path / "checkpoint", tmp_path / "refalign.safetensors")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "A cat walks.", "id": "cat"}))
    code = _replaced(
        SAMPLE,
        vae=(r'"Wan2\.1_VAE\.pth"', '"dct"'),
        text_encoder=(r'"umt5/"', '"words"'),
        num_steps=(r"num_steps=50", "num_steps=2, height=32, width=32, num_frames=5"),
    )
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "out" / "cat.mp4").stat().st_size > 0
