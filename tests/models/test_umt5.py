"""UMT5 against golden values, prompts to embeddings, and its properties."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from refalign_jax.convert.files import open_weights
from refalign_jax.encoders.umt5 import load_umt5
from refalign_jax.models.umt5 import (
    UMT5Config,
    clean_prompt,
    encode,
    encode_prompts,
    encode_tokens,
    load_tokenizer,
    relative_buckets,
    tokenize,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "encoders_a"
CONFIG = UMT5Config(vocab_size=256, width=32, attention_width=32, ffn_width=64, num_heads=4, num_layers=2)
VALUES = np.load(GOLDEN / "values.npz")
IDS = VALUES["t5_ids"].astype(np.int32)
MASK = VALUES["t5_mask"].astype(np.int32)
EMBEDDINGS = VALUES["t5_embeddings"]


def relative_error(ours, theirs):
    return np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)


@pytest.fixture(scope="module")
def params():
    return load_umt5(CONFIG, open_weights(GOLDEN / "umt5.safetensors"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A word tokenizer with UMT5's conventions: pad 0, end token 1, no start token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "dog", "runs", "fast"]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return load_tokenizer(folder)


def test_golden_embeddings(params):
    assert relative_error(encode_tokens(params, IDS, MASK, CONFIG), EMBEDDINGS) <= 1e-5
    embeddings = encode(params, IDS, MASK, CONFIG)
    assert relative_error(embeddings, EMBEDDINGS * MASK[..., None]) <= 1e-5
    assert not np.asarray(embeddings)[MASK == 0].any()


def test_ids_of_padding_do_not_matter(params):
    other = np.where(MASK > 0, IDS, 77)
    assert (other != IDS).any()
    np.testing.assert_array_equal(encode(params, IDS, MASK, CONFIG), encode(params, other, MASK, CONFIG))


def test_padding_to_more_tokens_changes_nothing(params):
    more = [(0, 0), (0, 40)]
    padded = encode(params, np.pad(IDS, more), np.pad(MASK, more), CONFIG)
    assert tiny.relative(padded[:, :24], encode(params, IDS, MASK, CONFIG)) <= 5e-6


def test_bfloat16_is_near_float32(params):
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    embeddings = encode(params, IDS, MASK, config)
    assert embeddings.dtype == jnp.float32
    assert 1e-5 < relative_error(embeddings, EMBEDDINGS * MASK[..., None]) < 0.05


def test_buckets():
    buckets = relative_buckets(512, 32, 128)
    assert buckets[0, :9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]
    assert buckets[:9, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    # The logarithmic half: bucket 8 + floor(8·log₁₆(d/8)), so 8·16^(k/8) opens bucket 8 + k.
    assert [int(buckets[d, 0]) for d in (11, 12, 15, 16, 22, 23, 90, 91, 127, 128, 511)] == [
        *(8, 9, 9, 10, 10, 11, 14, 15, 15, 15, 15),
    ]
    assert buckets[0, 511] == 31


def test_prompts_are_cleaned_as_published():
    assert clean_prompt("  a \n\t dog &amp;amp; a\u3000cat ") == "a dog & a cat"
    assert clean_prompt("the dog\u2019s \u201cbone\u201d") == 'the dog\'s "bone"'


def test_prompts_become_padded_ids(tokenizer):
    ids, mask = tokenize(tokenizer, [" a  dog", "", "a dog runs fast " * 3], max_tokens=6)
    assert ids.tolist() == [[3, 4, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [3, 4, 5, 6, 3, 1]]
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1] * 6]
    assert tokenize(tokenizer, ["a"])[0].shape == (1, 512)


def test_prompts_are_embedded_each_by_its_own_length(params, tokenizer):
    prompts = ["a dog runs", "", "fast"]
    embeddings, lengths = encode_prompts(params, prompts, tokenizer, CONFIG, max_tokens=16)
    assert lengths.tolist() == [4, 1, 2]
    for i, prompt in enumerate(prompts):
        alone, _ = encode_prompts(params, [prompt], tokenizer, CONFIG, max_tokens=8)
        np.testing.assert_allclose(embeddings[i, :8], alone[0], atol=5e-6)
        assert not np.asarray(embeddings[i, lengths[i] :]).any()


def test_prompts_that_are_not_a_list(tokenizer):
    with pytest.raises(ValueError, match="must be a list"):
        tokenize(tokenizer, "a dog")
    with pytest.raises(ValueError, match="must be a list"):
        tokenize(tokenizer, [])


def test_a_tokenizer_of_another_model(params, tokenizer):
    config = dataclasses.replace(CONFIG, vocab_size=5)
    with pytest.raises(ValueError, match="gives id 6, the encoder knows 5"):
        encode_prompts(params, ["fast"], tokenizer, config, max_tokens=4)


def test_a_missing_tokenizer_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"^No tokenizer at '.*nowhere'") as error:
        load_tokenizer(tmp_path / "nowhere")
    assert "\n" not in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^No tokenizer at '.*empty'"):
        load_tokenizer(tmp_path / "empty")


@pytest.mark.parametrize(
    ("field", "value"),
    [("width", 0), ("attention_width", 30), ("num_buckets", 6), ("max_distance", 8), ("compute_dtype", "float16")],
)
def test_config_that_is_wrong(field, value):
    with pytest.raises(ValueError, match=f"UMT5Config.{field} is {value!r}"):
        dataclasses.replace(CONFIG, **{field: value})


def test_sharded_over_the_batch_equals_unsharded(params):
    if jax.device_count() < 2:
        pytest.skip("one device")
    mesh = jax.sharding.Mesh(jax.devices()[:2], "data")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = encode(params, jax.device_put(IDS, sharding), jax.device_put(MASK, sharding), CONFIG)
    assert sharded.sharding.is_equivalent_to(sharding, 3)
    assert relative_error(sharded, EMBEDDINGS * MASK[..., None]) <= 1e-5


def test_prompts_can_be_sharded(params, tokenizer):
    if jax.device_count() < 2:
        pytest.skip("one device")
    sharding = jax.sharding.NamedSharding(
        jax.sharding.Mesh(jax.devices()[:2], "data"), jax.sharding.PartitionSpec("data")
    )
    prompts = ["a dog runs", "fast"]
    sharded, _ = encode_prompts(params, prompts, tokenizer, CONFIG, 8, sharding)
    assert sharded.sharding.is_equivalent_to(sharding, 3)
    whole, _ = encode_prompts(params, prompts, tokenizer, CONFIG, 8)
    np.testing.assert_allclose(sharded, whole, atol=5e-6)
