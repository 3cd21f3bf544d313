"""Round trips of prepared examples, int8 targets, and what is refused."""

import dataclasses
import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save
from support.examples import FLOAT32, assert_same, make

from refalign_jax.config import FIELDS, Storage
from refalign_jax.data.examples import cosines, decode, encode, fill, parse, quantize


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    references=st.integers(0, 4),
    text=st.integers(1, 512),
    metadata=st.dictionaries(st.text(), st.integers(-(2**53), 2**53) | st.text() | st.none()),
)
def test_float32_round_trip_is_exact(seed, references, text, metadata):
    example = make(seed, references, text, metadata)
    assert_same(decode(encode(example, FLOAT32)), example, rtol=0, atol=0)


def test_bfloat16_round_trip_is_one_rounding():
    example = make()
    back = decode(encode(example, Storage()))
    for name in FIELDS:
        rounded = getattr(example, name).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(getattr(back, name), rounded)
    np.testing.assert_array_equal(back.subject_ids, example.subject_ids)


def test_blob_is_plain_safetensors():
    example = make()
    arrays = load(encode(example, FLOAT32))
    np.testing.assert_array_equal(arrays["vfm_features"], example.vfm_features)
    assert set(arrays) == {*FIELDS, "subject_ids"}


def test_same_example_gives_same_bytes():
    assert encode(make(metadata={"b": 1, "a": 2}), Storage()) == encode(make(metadata={"b": 1, "a": 2}), Storage())


@pytest.mark.parametrize("storage", [FLOAT32, Storage(), Storage(vfm_features="int8")], ids=["float32", "16", "int8"])
def test_the_order_in_memory_changes_nothing(storage):
    example = make(references=3)
    mask = np.arange(18).reshape(3, 6) % 2 > 0
    plain = dataclasses.replace(example, subject_mask=mask, subject_ids=np.array([2, 1, 0], np.int32))
    turned = {name: np.asfortranarray(getattr(plain, name)) for name in (*FIELDS, "subject_mask")}
    backwards = np.arange(3, dtype=np.int32)[::-1]
    assert encode(dataclasses.replace(plain, subject_ids=backwards, **turned), storage) == encode(plain, storage)


def test_parse_does_not_copy():
    blob = encode(make(), Storage())
    arrays, _ = parse(blob)
    whole = np.frombuffer(blob, np.uint8)
    assert all(np.shares_memory(whole, array) for array in arrays.values() if array.size)


def test_int8_targets_keep_direction_and_length():
    features = np.random.default_rng(0).standard_normal((3, 200, 1024), dtype=np.float32)
    features[0, 0] = 0
    example = make(3, references=3)
    example = dataclasses.replace(
        example,
        video_latents=np.ones((1, 20, 40, 3), np.float32),
        reference_latents=np.ones((3, 20, 40, 3), np.float32),
        vfm_features=features,
    )
    blob = encode(example, Storage(vfm_features="int8"))
    assert parse(blob)[0]["vfm_features"].dtype == np.int8
    back = decode(blob).vfm_features
    similarity = cosines(back, features)
    assert similarity.mean() >= 0.9999
    assert similarity.min() >= 0.999
    np.testing.assert_array_equal(back[0, 0], 0)
    step = np.abs(features).max(-1, keepdims=True) / 127
    assert (np.abs(back - features) <= step * 0.5001).all()


def test_quantize_scales_each_token_by_itself():
    q, scales = quantize(np.array([[1000.0, -500.0], [0.002, 0.001]], np.float32))
    np.testing.assert_array_equal(q, [[127, -64], [127, 64]])
    np.testing.assert_allclose(scales[:, 0] * 127, [1000.0, 0.002], rtol=1e-6)


def test_fill_takes_the_first_rows():
    arrays, _ = parse(encode(make(references=3), Storage(vfm_features="int8")))
    full, part = np.empty((3, 6, 7), np.float32), np.empty((2, 6, 7), np.float32)
    fill(full, arrays, "vfm_features")
    fill(part, arrays, "vfm_features")
    np.testing.assert_array_equal(part, full[:2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": ""}, "empty id"),
        ({"video_latents": np.zeros((4, 6, 3))}, "video_latents has shape"),
        ({"video_latents": np.zeros((2, 3, 6, 3))}, "must be even"),
        ({"reference_latents": np.zeros((2, 4, 8, 3))}, "reference_latents has shape"),
        ({"subject_ids": np.arange(2)}, "subject_ids is int64"),
        ({"subject_ids": np.array([0, -1], np.int32)}, "0 or more"),
        ({"subject_ids": np.arange(3, dtype=np.int32)}, "with 3 subject ids"),
        ({"vfm_features": np.zeros((2, 5, 7))}, "P=6"),
        ({"text": np.zeros((513, 8))}, "1 to 512"),
        ({"text": np.zeros((0, 8))}, "1 to 512"),
    ],
)
def test_bad_shapes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make(), **changes)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value):
    example = make()
    example.text[1, 2] = value
    with pytest.raises(ValueError, match="Example e0: text holds NaN"):
        encode(example, Storage())


def test_metadata_that_is_not_json_is_refused():
    with pytest.raises(ValueError, match="not JSON"):
        encode(make(metadata={"a": np.zeros(2)}), Storage())


def test_unknown_storage_is_refused():
    with pytest.raises(ValueError, match=r"Storage\.text='int8' is unknown; choose one of float32, bfloat16"):
        Storage(text="int8")


def test_blobs_that_are_no_example_are_refused():
    blob = encode(make(), Storage())
    arrays, about = parse(blob)
    del arrays["text"]
    other = save(dict(arrays), {"example": json.dumps(about)})
    for bad in (b"", b"\x00" * 7, blob[:100], blob[:-1], b"\xff" * 64, save({"a": np.zeros(2)}), other):
        with pytest.raises(ValueError, match="not a prepared example"):
            parse(bad)


def test_the_subject_mask_is_kept_and_may_be_missing():
    assert decode(encode(make(), FLOAT32)).subject_mask is None
    mask = np.arange(12).reshape(2, 6) % 3 > 0
    back = decode(encode(make(subject_mask=mask), FLOAT32)).subject_mask
    assert back.dtype == bool
    np.testing.assert_array_equal(back, mask)
    with pytest.raises(ValueError, match=r"subject_mask has shape \(2, 5\); it must be \[R=2, P=6\]"):
        make(subject_mask=mask[:, :5])
