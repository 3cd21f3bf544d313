"""Previews: what `tools/sample.py` draws, as pictures, latents and, where a codec is available, videos."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from support import runs, tiny

from refalign_jax.config import MeshConfig
from refalign_jax.data.seeds import random_of
from refalign_jax.data.video import probe, read_comment
from refalign_jax.encoders.dct import DCTCodec
from refalign_jax.models.condition import Condition
from refalign_jax.sampling import sample
from refalign_jax.sharding import make_mesh
from refalign_jax.trainer.preview import draw_preview, write_preview


def test_a_preview_holds_pictures_latents_and_playable_videos(tmp_path):
    config, batch, params = runs.recipe(tmp_path, seed=3), tiny.batch([3, 0]), tiny.params()
    rows = {name: np.asarray(x) for name, x in batch._asdict().items() if x is not None} | {"ids": np.array(["a", "b"])}
    empty = jnp.ones((5, 16))
    preview = draw_preview(params, rows, empty, config, make_mesh(MeshConfig(), jax.devices()[:1]))
    for i, references in enumerate((batch.reference_latents[:1], None)):
        noise = random_of(rows["ids"][i], 3).standard_normal(batch.video_latents.shape[1:], np.float32)[None]
        conditions = Condition(batch.text[i : i + 1], references), Condition(empty[None], references)
        alone = sample(params["dit"], noise, *conditions, dit=config.model.dit, config=config.sampling)
        assert tiny.relative(preview.latents[i], alone[0]) <= 1e-5
    path = tmp_path / "previews" / "step-00000100"
    write_preview(path, preview, {"commit": "x"}, DCTCodec(8, 16))
    names = {path.name for path in (tmp_path / "previews").iterdir()}
    assert names == {f"step-00000100{end}" for end in (".png", ".npz", "-0.mp4", "-1.mp4")}
    assert probe(tmp_path / "previews" / "step-00000100-0.mp4").num_frames == 5
    assert json.loads(read_comment(tmp_path / "previews" / "step-00000100-1.mp4")) == {"id": "b", "commit": "x"}
