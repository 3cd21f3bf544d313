"""Previews: samples as videos where a codec is available."""

import jax.numpy as jnp
from support import runs, tiny

from refalign_jax.data.video import probe
from refalign_jax.encoders.dct import DCTCodec
from refalign_jax.trainer.preview import draw_preview, write_preview


def test_a_preview_holds_pictures_latents_and_playable_videos(tmp_path):
    config = runs.recipe(tmp_path)
    preview = draw_preview(tiny.params(), tiny.batch([3, 2]), jnp.zeros((5, 16)), config)
    path = tmp_path / "previews" / "step-00000100"
    write_preview(path, preview, {"commit": "x"}, DCTCodec(8, 16))
    names = {path.name for path in (tmp_path / "previews").iterdir()}
    assert names == {f"step-00000100{end}" for end in (".png", ".npz", "-0.mp4", "-1.mp4")}
    assert probe(tmp_path / "previews" / "step-00000100-0.mp4").num_frames == 5
