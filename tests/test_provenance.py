"""What files say of their making."""

from refalign_jax.provenance import about


def test_without_git_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert about()["commit"] == "unknown"
