"""UMT5 against transformers' UMT5EncoderModel, live, and the cleaning of prompts against ftfy."""

import html
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from refalign_jax.convert.files import open_weights
from refalign_jax.encoders.umt5 import load_umt5
from refalign_jax.models.umt5 import UMT5Config, clean_prompt, encode, relative_buckets


def test_narrow_encoder_with_padding(tmp_path):
    torch.manual_seed(0)
    sizes = transformers.UMT5Config(vocab_size=500, d_model=96, d_kv=16, d_ff=160, num_heads=4, num_layers=3)
    theirs = transformers.UMT5EncoderModel(sizes).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "layer_norm" in name or "relative_attention_bias" in name:
                parameter.normal_(1, 0.5)
    theirs.save_pretrained(tmp_path)

    config = UMT5Config(vocab_size=500, width=96, attention_width=64, ffn_width=160, num_heads=4, num_layers=3)
    ids = np.random.default_rng(0).integers(2, 500, (3, 300)).astype(np.int32)
    mask = (np.arange(300) < np.asarray([300, 7, 150])[:, None]).astype(np.int32)
    params = load_umt5(config, open_weights(tmp_path))

    with torch.inference_mode():
        expected = theirs(torch.tensor(ids, dtype=torch.long), attention_mask=torch.tensor(mask, dtype=torch.long))
    expected = expected.last_hidden_state.numpy() * mask[..., None]
    ours = np.asarray(encode(params, ids, mask, config))
    assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) <= 1e-5


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (64, 200)])
def test_buckets_of_every_distance(num_buckets, max_distance):
    sizes = transformers.UMT5Config(
        relative_attention_num_buckets=num_buckets, relative_attention_max_distance=max_distance, num_heads=1
    )
    attention = transformers.models.umt5.modeling_umt5.UMT5Attention(sizes, has_relative_attention_bias=True)
    positions = torch.arange(1024)
    expected = attention._relative_position_bucket(positions[None, :] - positions[:, None])
    np.testing.assert_array_equal(relative_buckets(1024, num_buckets, max_distance), expected.numpy())


@pytest.mark.parametrize(
    "prompt",
    [
        "A dog  runs.\n It\u2019s fast; \u201cvery\u201d \u2018fast\u2019 &amp; loud",
        "caf\u00e9 \u732b\u304c\u8d70\u308b \u00fcber \U0001f436 1 < 2 &amp;lt; 3",
        "\ttabs\u00a0and\u3000spaces ",
        "",
    ],
)
def test_prompts_are_cleaned_as_with_ftfy(prompt):
    ftfy = pytest.importorskip("ftfy")
    published = re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()
    assert clean_prompt(prompt) == published
