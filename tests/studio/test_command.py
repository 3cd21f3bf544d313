"""What tools/studio.py refuses before it opens anything; none of it needs Gradio."""

import socket
import sys

import pytest

from refalign_jax.command import load


def test_without_gradio_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "refalign_jax.studio.page", raising=False)
    with pytest.raises(ValueError, match=r"needs the package gradio: pip install -e '\.\[studio\]'\."):
        load("studio")(["--weights", "runs/a", "--port", "0"], "studio")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "holds no run of the demo; name weights, or run `make demo` first"),
        (["--weights", "runs/a", "--noise", "noise.safetensors"], "--noise belongs to tools/sample.py"),
        (["--weights", "runs/a", "--embeddings", "a.safetensors"], "--embeddings belongs to tools/sample.py"),
        (["--weights", "runs/a", "--part", "1", "2"], "--part belongs to tools/sample.py"),
        (["--weights", "runs/a", "--host", "nowhere"], "can't listen on --host nowhere"),
        (["--weights", "runs/a", "--port", "70000"], "can't listen on --host 127.0.0.1 --port 70000"),
    ],
)
def test_what_makes_no_page_is_refused(options, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        load("studio")(options, "studio")
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(ValueError, match=f"--port {port} .*; --port 0 takes a free port"):
            load("studio")(["--weights", "runs/a", "--port", port], "studio")
