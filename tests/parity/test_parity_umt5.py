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


ODD = [
    "A dog  runs.\n It\u2019s fast",
    "\u201cvery\u201d \u2018fast\u2019",
    "&amp; &lt;b&gt;",
    "&amp;amp; twice &amp;lt;",
    "caf\u00e9 and cafe\u0301",
    "\u732b\u304c\u8d70\u308b",
    "\uff21\uff22\uff23 full width \uff11\uff12",
    "\ufb01ne \ufb02ow \ufb00",
    "no\u00a0break\u2003em\u3000ideographic",
    "tab\tand\r\nlines\r",
    "dots\u2026 and dashes \u2013 \u2014",
    "\U0001f436 dog \U0001f468\u200d\U0001f469",
    "\u00bd cup, 5\u00b0, \u00b2",
    "\u00fcber stra\u00dfe",
    "\u0410 cat \u0438 dog",
    "\u0645\u0631\u062d\u0628\u0627",
    "1 < 2 > 0 & 3",
    "&quot;quoted&quot; &#39;too&#39;",
    "\u2122 \u00ae \u00a9",
    "\u2460 \u2161 \u33a1",
    " \n ",
    "a/b\\c {d} [e] <f>",
]
"""Prompts with what ftfy, HTML and NFKC change."""


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A small tokenizer with the normalisation of UMT5's, NFKC."""
    import sentencepiece

    text, prefix = tmp_path_factory.mktemp("pieces") / "text.txt", tmp_path_factory.mktemp("pieces") / "pieces"
    text.write_text("\n".join([*ODD, *(chr(i) + chr(i + 1) for i in range(33, 500))] * 3), encoding="utf-8")
    settings = {"vocab_size": 800, "character_coverage": 1.0, "byte_fallback": True, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(prefix), normalization_rule_name="nmt_nfkc", minloglevel=2, **settings
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


@pytest.mark.parametrize("number", range(len(ODD)))
def test_odd_prompts_have_the_ids_of_wans_cleaning(pieces, number):
    ftfy = pytest.importorskip("ftfy")
    prompt = ODD[number]
    published = re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()
    assert pieces.encode(clean_prompt(prompt)) == pieces.encode(published)
