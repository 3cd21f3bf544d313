"""Progress of verification."""

import io
import sys

from refalign_jax.verify.progress import attempt, run_tasks
from refalign_jax.verify.report import Report
from refalign_jax.verify.values import MissingError


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


def test_a_check_that_cannot_be_made_costs_its_values_alone():
    report = Report("float32")

    def fail(error):
        raise error

    attempt(report, ["a", "b"], lambda: fail(MissingError("values.npz lacks text")))
    attempt(report, ["c"], lambda: fail(ValueError("c has another shape.")))
    assert report.skipped == {"a": "values.npz lacks text", "b": "values.npz lacks text"}
    assert report.remarks == ["c: c has another shape."]
