"""Weights by their id on the hub: what is cached is found, what is not is one sentence, and paths stay paths."""

import json

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("huggingface_hub.constants")  # the package imports it late, or not at all

from refalign_jax.convert.hub import find_weights


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub without a network, whose cache holds one repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--someone--RefAlign"
    folder = repository / "snapshots" / commit
    (folder / "vae").mkdir(parents=True)
    (folder / "refalign.safetensors").write_bytes(b"weights")
    (folder / "vae" / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return folder


def test_a_cached_repository_and_a_file_of_it_are_found_without_a_network(cache):
    assert find_weights("someone/RefAlign/refalign.safetensors") == str(cache / "refalign.safetensors")
    assert find_weights("someone/RefAlign/vae/config.json") == str(cache / "vae" / "config.json")


def test_a_whole_repository_is_used_as_it_is_cached_and_another_is_fetched(cache, monkeypatch):
    asked = []

    def fetch(id, revision, allow_patterns, local_files_only=False):
        asked.append((id, revision, local_files_only))
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert find_weights("someone/RefAlign@v1.0") == str(cache)
    assert asked == [("someone/RefAlign", "v1.0", True)]
    index = {"weight_map": {"a": "refalign.safetensors", "b": "gone.safetensors"}}
    (cache / "refalign.safetensors.index.json").write_text(json.dumps(index))  # what an interrupted download leaves
    with pytest.raises(ValueError, match="it holds no weights, or only some of their shards"):
        find_weights("someone/RefAlign")
    assert asked[1:] == [("someone/RefAlign", None, True), ("someone/RefAlign", None, False)]


@pytest.mark.parametrize("name", ["someone/Other", "someone/RefAlign/other.pth", "someone/Other@main"])
def test_what_is_not_cached_is_one_sentence(cache, name):
    with pytest.raises(
        ValueError, match="does not exist here, and as an id on the Hugging Face hub it is neither"
    ) as e:
        find_weights(name)
    assert "hf download someone/" in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "gone",
        "gone.safetensors",
        "weights/gone.safetensors",
        "./a/b",
        "../a/b",
        "/a/b",
        "gs://a/b",
        "a b/c",
        "here/x",
    ],
)
def test_paths_are_left_alone(cache, tmp_path, name, monkeypatch):
    (tmp_path / "here" / "x").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert find_weights(name) == name
