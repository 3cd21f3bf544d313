"""Entries of a large JSON object: the same as json's, whatever the cuts between reads; faults after what is whole."""

import json
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refalign_jax.data.sources import json_stream
from refalign_jax.data.sources.json_stream import BrokenFileError, estimate_entries, parse, read_entries

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('a{}[]",:\\ \né', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('k"{\\', max_size=3), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=150)
@given(
    st.dictionaries(st.text('ab"}\\', max_size=5), VALUES, max_size=6), st.sampled_from([None, 4]), st.integers(1, 9)
)
def test_entries_are_those_of_json(tmp_path_factory, content, indent, chunk):
    path = tmp_path_factory.mktemp("j") / "x.json"
    path.write_text(json.dumps(content, indent=indent))
    before, json_stream.CHUNK = json_stream.CHUNK, chunk
    try:
        found = list(read_entries(str(path)))
    finally:
        json_stream.CHUNK = before
    assert [entry.key for entry in found] == list(content)
    assert [json.loads(entry.value) for entry in found] == list(content.values())
    data = path.read_bytes()
    assert [data[entry.start : entry.start + len(entry.value)] for entry in found] == [e.value for e in found]


def test_a_zip_is_read_without_unpacking_it(tmp_path):
    content = {f"k{n}": {"n": n} for n in range(1000)}
    with zipfile.ZipFile(tmp_path / "x.json.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("x.json", json.dumps(content))
    found = {entry.key: parse(entry.value) for entry in read_entries(str(tmp_path / "x.json.zip"))}
    assert found == content
    assert estimate_entries(str(tmp_path / "x.json.zip")) == 1000
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as packed:
        packed.writestr("a.json", "{}")
        packed.writestr("b.json", "{}")
    with pytest.raises(ValueError, match=r"two\.zip holds 2 JSON files; expected one\.$"):
        list(read_entries(str(tmp_path / "two.zip")))


def test_the_number_of_entries_is_estimated_by_the_beginning(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text(json.dumps({f"{n:05d}": "x" * 50 for n in range(5000)}, indent=1))
    monkeypatch.setattr(json_stream, "_SAMPLE", 10_000)
    assert estimate_entries(str(tmp_path / "x.json")) == pytest.approx(5000, rel=0.02)


@pytest.mark.parametrize(
    ("text", "whole", "message"),
    [
        ('{"a": {"b": 1}, "c": {"d": ', ["a"], r"x\.json ends in the middle; the 1 entries before are used\.$"),
        ('{"a": {"b": 1}, "c": ', ["a"], r"ends in the middle; the 1 entries"),
        ('{"a": {"b": 1},', ["a"], r"ends in the middle; the 1 entries"),
        ('{"a": {"b": "{', [], r"ends in the middle; the 0 entries"),
        ('{"a": {} "c": {}}', ["a"], r"is not JSON at byte \d+, b'\"c\": \{\}\}'; the 1 entries before are used\.$"),
        ('{"a": {}}}', ["a"], r"is not JSON at byte \d+, b'\}\}'; the 1 entries"),
        ('{"a": {}, c: {}}', ["a"], r"is not JSON at byte \d+, b', c: \{\}\}'; the 1 entries"),
    ],
)
def test_what_comes_before_a_fault_is_kept(tmp_path, text, whole, message):
    (tmp_path / "x.json").write_text(text)
    found = []
    with pytest.raises(BrokenFileError, match=message):
        found.extend(entry.key for entry in read_entries(str(tmp_path / "x.json")))  # keeps what came before
    assert found == whole


@pytest.mark.parametrize(("text", "message"), [("[1]", "does not begin with {"), ("", "does not begin with {")])
def test_another_file_is_refused(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_entries(str(tmp_path / "x.json")))
    with pytest.raises(ValueError, match=r"none\.json does not exist\.$"):
        list(read_entries(str(tmp_path / "none.json")))


def test_an_entry_that_is_no_object_is_refused():
    for value in (b"[1]", b'"x"', b"{", b"[" * 100_000):
        with pytest.raises(ValueError, match=r"."):
            parse(value)
