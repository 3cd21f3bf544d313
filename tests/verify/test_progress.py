"""Progress of verification."""

import io
import sys

from refalign_jax.verify.progress import run_tasks


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_what_is_computed(monkeypatch):
    ran, terminal = [], Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run_tasks([(name, lambda name=name: ran.append(name)) for name in ("vae", "umt5")])
    assert ran == ["vae", "umt5"]
    assert "verify" in terminal.getvalue()
    assert "umt5" in terminal.getvalue()


def test_nothing_is_shown_where_stderr_is_a_file(capsys):
    run_tasks([("vae", lambda: None)])
    assert capsys.readouterr() == ("", "")
