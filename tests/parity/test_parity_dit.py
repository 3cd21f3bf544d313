"""The transformer without references against diffusers' WanTransformer3DModel, weights through our tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from refalign_jax.config import ExportConfig
from refalign_jax.convert.checkpoint import load_params
from refalign_jax.convert.transfer import export_weights, import_weights
from refalign_jax.models.condition import Condition
from refalign_jax.models.dit import velocity


@pytest.mark.parametrize("size", [(2, 12, 3), (2, 128, 2)], ids=["narrow", "published head width"])
def test_plain_text_to_video_is_diffusers_model(tmp_path, size):
    heads, head_width, layers = size
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_width,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=96,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")
    import_weights(tmp_path / "theirs", tmp_path / "ours", num_heads=heads)
    params, config = load_params(tmp_path / "ours")

    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 16, 3, 8, 10), np.float32)
    text = rng.standard_normal((2, 7, 32), np.float32)
    t = np.array([37.0, 912.0], np.float32)
    with torch.no_grad():
        theirs = model(*map(torch.from_numpy, (latents, t, text)), return_dict=False)[0].numpy()
    exact = dataclasses.replace(config.dit, compute_dtype="float32", remat="none")
    ours_params = jax.tree.map(jnp.asarray, params["dit"])
    x, condition = jnp.moveaxis(jnp.asarray(latents), 1, -1), Condition(jnp.asarray(text))
    ours = velocity(ours_params, exact, x, jnp.asarray(t), condition)
    assert tiny.relative(np.moveaxis(np.asarray(ours), -1, 1), theirs) <= 1e-5

    # Phantom-Wan: the last frame is a reference, clean and without a velocity.
    phantom = dataclasses.replace(exact, reference_cross_attention=True)
    ours = velocity(ours_params, phantom, x[:, :2], jnp.asarray(t), Condition(jnp.asarray(text), x[:, 2:]))
    assert tiny.relative(np.moveaxis(np.asarray(ours), -1, 1), theirs[:, :, :2]) <= 1e-5

    export_weights(tmp_path / "ours", tmp_path / "back" / "model.safetensors", ExportConfig(names="diffusers"))
    from safetensors.numpy import load_file

    before = load_file(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}
