"""Every command ends in a sentence: after Ctrl-C, unforeseen errors, closed or full outputs, and a device that is not
there."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.places import ROOT, environment

from refalign_jax import command
from refalign_jax.config import Config, DataConfig, TrainConfig

SCRIPT = "import sys, time\nfrom refalign_jax.command import run\ndef main(arguments, prog):\n    {}\nrun(main)\n"


def start(body: str, *arguments: str, **given) -> subprocess.Popen:
    """A process with a command of this body."""
    script = SCRIPT.format(body.replace("\n", "\n    "))
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()} | given
    return subprocess.Popen([sys.executable, "-c", script, *arguments], **given)


def end(capsys, call) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        command.exit_with(call)
    return ended.value.code, capsys.readouterr().err


def raises(error: BaseException):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    "body", ["time.sleep(60)", "try: time.sleep(60)\nexcept BaseException: raise ImportError('x')"]
)
def test_ctrl_c_ends_in_a_sentence(body):
    process = start(f"print('begun', flush=True)\n{body}")
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, command.INTERRUPTED + "\n")


def test_an_unforeseen_error_keeps_its_traceback_in_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command.tempfile, "tempdir", str(tmp_path))
    code, printed = end(capsys, raises(KeyError("shape")))
    assert code == 1
    assert len(printed.splitlines()) == 1
    name = re.search(
        r"error: This was not foreseen \(KeyError: 'shape'\); please report it .* file (\S+)\.\n", printed
    )[1]
    assert "Traceback" in Path(name).read_text()
    assert "KeyError: 'shape'" in Path(name).read_text()


def test_an_unforeseen_error_where_no_file_can_be_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command.tempfile, "tempdir", str(tmp_path / "none"))
    code, printed = end(capsys, raises(KeyError("shape")))
    assert code == 1
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("It is 3."), "error: It is 3.\n"),
        (OSError("It is gone."), "error: It is gone.\n"),
        (MemoryError("Unable to allocate 3 GiB"), "There is too little memory: Unable to allocate 3 GiB."),
        (RuntimeError("Unable to initialize backend 'tpu': no\nmore"), "JAX can't use its devices (Unable to init"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "package torch is not installed"),
    ],
)
def test_what_the_user_can_mend_has_exit_code_2(error, sentence, capsys):
    code, printed = end(capsys, raises(error))
    assert code == 2
    assert sentence in printed
    assert len(printed.splitlines()) == 1


def test_a_backend_that_is_not_there():
    given = [sys.executable, str(ROOT / "tools/train.py"), "tiny", "--train.folder", "/proc/none"]
    done = subprocess.run(given, capture_output=True, text=True, env=environment(JAX_PLATFORMS="cuda"), check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: JAX can't use its devices")


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams(closed, tmp_path):
    """A file that the command opens does not take the place of a closed stream."""
    body = f"f = open({str(tmp_path / 'f')!r}, 'w')\nprint('out')\nprint('err', file=sys.stderr)\nf.close()\nreturn 7"
    process = start(body, preexec_fn=lambda: [os.close(number) for number in closed])
    out, err = process.communicate(timeout=60)
    assert process.returncode == 7
    assert (out, err) == ("" if 1 in closed else "out\n", "" if 2 in closed else "err\n")
    assert (tmp_path / "f").read_text() == ""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_has_gone(stream):
    process = start(f"time.sleep(0.5)\nfor _ in range(100000): print('x', file=sys.{stream})")
    getattr(process, stream).close()
    rest = process.stderr.read() if stream == "stdout" else process.stdout.read()
    assert process.wait(timeout=60) == 1
    assert rest == ""


def test_a_full_output():
    with open("/dev/full", "w") as full:
        process = start("print('x')", stdout=full)
        _, printed = process.communicate(timeout=60)
    assert process.returncode in (1, 2)  # at the end, or at once where Python does not buffer
    assert re.fullmatch(r"error: .*No space left on device.*\n", printed)


def test_what_a_stream_cannot_encode_is_escaped():
    process = start("print('\\u00e4 \\ud800')", env=environment(PYTHONIOENCODING="ascii"))
    out, printed = process.communicate(timeout=60)
    assert (process.returncode, out, printed) == (0, "\\xe4 \\ud800\n", "")


def test_home_is_expanded_in_every_option(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    given = ["~/a", "--x=~/b", "--y", "~", "c~", "--z=c~/d", "--a\nb"]
    assert command.expand_home(given) == ["/h/a", "--x=/h/b", "--y", "/h", "c~", "--z=c~/d", "--a\nb"]
    config = Config(data=DataConfig(path="~/d"), train=TrainConfig(folder="~/r", init="~/i"))
    assert (config.data.path, config.train.folder, config.train.init) == ("/h/d", "/h/r", "/h/i")


def test_the_gpu_check_refuses_a_machine_without_a_gpu():
    began = time.monotonic()
    given = [sys.executable, str(ROOT / "tools/benchmark.py"), "gpu"]
    done = subprocess.run(given, capture_output=True, text=True, env=environment(JAX_PLATFORMS="cpu"), check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: JAX finds no GPU here, only 'cpu'")
    assert time.monotonic() - began < 60
