"""Every command ends in a sentence: after Ctrl-C, unforeseen errors, closed or full outputs, and a device that is not
there."""

import ast
import dataclasses
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from markupsafe import Markup
from support import examples, reported, tiny
from support.places import GOLDEN, ROOT, environment

from refalign_jax import command
from refalign_jax.config import Config, DataConfig, Storage, TrainConfig
from refalign_jax.data.overview import inspect_dataset
from refalign_jax.data.shard_writer import ShardWriter
from refalign_jax.perf.topology import topology_mesh
from refalign_jax.report import page
from refalign_jax.report.content import Section

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


def test_ctrl_c_during_the_imports_ends_in_a_sentence(tmp_path):
    """From its first import on, which is `command`, a file under tools/ is stopped in a sentence."""
    (tmp_path / "tools").mkdir()
    script = tmp_path / "tools/x.py"
    script.write_text("from refalign_jax.command import run\nimport os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (130, command.INTERRUPTED + "\n")
    ours = "import refalign_jax.command, signal\nprint(signal.getsignal(signal.SIGINT))\n"
    (tmp_path / "x.py").write_text(ours)  # a program of the user's keeps its Ctrl-C
    given = [sys.executable, tmp_path / "x.py"]
    done = subprocess.run(given, capture_output=True, text=True, env=environment(), check=True)
    assert "leave" not in done.stdout


@pytest.mark.parametrize("name", command.command_names())
def test_every_command_imports_that_first(name):
    body = ast.parse((command.TOOLS / f"{name}.py").read_text()).body
    modules = [node.module for node in body if isinstance(node, ast.ImportFrom)]
    modules = [module for module in modules if module != "__future__"]
    assert modules[0] == "refalign_jax.command"


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
    if not importlib.util.find_spec("jax_cuda13_plugin"):  # JAX logs its own traceback where the plugin finds no GPU
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


def test_an_argument_that_is_not_utf_8_is_named(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["refalign", "report", "runs/\udcff"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert printed == "error: The argument 'runs/\\udcff' is not UTF-8 text; rename the file or folder.\n"


def test_the_gpu_check_refuses_a_machine_without_a_gpu():
    began = time.monotonic()
    given = [sys.executable, str(ROOT / "tools/benchmark.py"), "gpu"]
    done = subprocess.run(given, capture_output=True, text=True, env=environment(JAX_PLATFORMS="cpu"), check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: JAX finds no GPU here, only 'cpu'")
    assert time.monotonic() - began < 60


LIMITED = """import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from refalign_jax.command import load
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
return load({!r})(arguments, prog)"""
"""A command whose files may have 2,000 bytes, as on a full disk."""
UNCACHED = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
"""For such a command: what it compiles would be cut off in the cache, too, which the other tests read."""


def write_data(folder: Path) -> None:
    with ShardWriter(folder, storage=Storage(), made={}) as writer:
        writer.add(dataclasses.replace(examples.make(0), prompt="costs $5 and $_{"))


def test_a_full_disk_leaves_nothing_of_a_contact_sheet(tmp_path):
    write_data(tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    arguments = str(tmp_path / "data"), "--out", str(tmp_path / "sheet.png")
    process = start(LIMITED.format("overview"), *arguments, env=environment(**UNCACHED))
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 2
    assert printed == f"error: {tmp_path / 'sheet.png'} can't be written: File too large.\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing_of_an_import(tmp_path):
    given = [str(GOLDEN / "dit_a/weights.safetensors"), str(tmp_path / "out"), "--num-heads", "2"]
    process = start(LIMITED.format("convert"), "import", *given, env=environment(**UNCACHED))
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 2, printed
    assert printed == f"error: {tmp_path / 'out'} can't be written: File too large.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["sample", "prepare", "train"])
def test_a_file_in_place_of_a_folder_is_named_so(name, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").write_text("x")
    for line, file in (
        ({"prompt": "p"}, "requests.jsonl"),
        ({"video": "v", "prompt": "p", "references": []}, "r.jsonl"),
    ):
        (tmp_path / file).write_text(json.dumps(line))
    stand_ins = ["--vae=dct", "--text-encoder=words"]
    given = {
        "sample": [str(tmp_path), str(tmp_path / "requests.jsonl"), str(tmp_path / "out")],
        "prepare": [
            str(tmp_path / "r.jsonl"),
            str(tmp_path / "out"),
            *stand_ins,
            "--vfm=daisy",
            "--height=32",
            "--width=32",
        ],
        "train": ["tiny", "--train.folder", str(tmp_path / "out")],
    }
    code, printed = end(capsys, lambda: command.load(name)(given[name], name))
    assert code == 2
    assert re.search(r"out'? (is|can't be written: it is) a file; name a folder", printed)


def test_a_full_disk_leaves_nothing_of_a_report(tmp_path, monkeypatch):
    """Sections without figures; the page itself does not fit."""
    config = reported.recipe(tmp_path / "run", "")
    reported.write_run(config, tiny.params(config.model))
    for name in ("tokens_section", "targets_section"):
        monkeypatch.setattr(page, name, lambda _: Section(html=Markup("<p></p>")))
    before = sorted(tmp_path.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"can't be written: File too large\.$"):
            page.write_report(tmp_path / "run", tmp_path / "report.html")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(tmp_path.rglob("*")) == before


def test_dollars_in_a_prompt_are_no_formula(tmp_path):
    write_data(tmp_path / "data")
    inspect_dataset(str(tmp_path / "data"), out=tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").is_file()


@pytest.mark.parametrize("topology", ["v5p:0x0x0", "v5p:", ":2x2", "v5e:-2x2", " "])
def test_topologies_of_nothing(topology):
    with pytest.raises(ValueError, match="can't be used; give one such as v5p:4x4x4"):
        topology_mesh(Config().mesh, topology)
