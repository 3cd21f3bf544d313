"""The studio's page in a browser: a picture is dropped, a prompt typed, and the video plays. `make parity` runs it."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from PIL import Image
from support import chromium, tiny
from support.footage import photograph
from support.places import ROOT, environment

pytest.importorskip("gradio")
if chromium.BROWSER is None:
    pytest.skip("no Chromium on this machine", allow_module_level=True)

from refalign_jax.config import ModelConfig
from refalign_jax.convert.checkpoint import save_params
from refalign_jax.convert.transfer import export_weights

MODEL = ModelConfig(dit=dataclasses.replace(tiny.DIT, num_heads=1, latent_channels=4), alignment=tiny.MODEL.alignment)
OPTIONS = "--vae dct --text-encoder words --height 32 --width 48 --num-frames 5 --num-steps 4 --port 0 --out videos"
UPLOADED = "Method not implemented."
"""A warning that Gradio's own script prints after each upload."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder in which the studio is started: weights, pictures, and a file that is nobody's business."""
    folder = tmp_path_factory.mktemp("place")
    save_params(folder / "checkpoint", tiny.params(MODEL), MODEL)
    export_weights(folder / "checkpoint", folder / "refalign.safetensors")
    Image.fromarray(photograph("cat")).save(folder / "cat.png")
    (folder / "notes.png").write_text("no picture")
    (folder / "secret.txt").write_text("secret")
    return folder


@pytest.fixture(scope="module")
def address(place):
    """Where the page is; afterwards the studio ends as by Ctrl-C."""
    command = [sys.executable, str(ROOT / "tools/studio.py"), "--weights", "refalign.safetensors", *OPTIONS.split()]
    with (place / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            line = process.stdout.readline()
            assert "The studio is at http://127.0.0.1:" in line, (place / "log.txt").read_text()
            yield re.search(r"http://\S+/", line)[0]
            process.send_signal(signal.SIGINT)
            assert "The studio has ended; it made 2 videos." in process.communicate(timeout=120)[0]
            assert process.returncode == 0
        finally:
            process.kill()
            process.wait()
    assert "refalign_jax/studio" not in (place / "log.txt").read_text()  # no traceback goes through our code


@pytest.fixture(scope="module")
def tab(address):
    with chromium.page() as tab:
        tab.resize(1280, 900)
        tab.visit(address)
        tab.wait_for("document.querySelector('#draw') != null")
        yield tab


def text(selector):
    return f"(document.querySelector('{selector}')?.innerText ?? '')"


def fill(tab, selector, value):
    """Types over what a field holds, again where the page drew the field anew meanwhile."""
    field, pause = f"document.querySelector('{selector}')", "new Promise(f => setTimeout(f, 500))"
    for _ in range(20):
        if tab.evaluate(f"{field}.focus(); {field}.select(); document.activeElement == {field}"):
            tab.call("Input.insertText", text=value)
            tab.evaluate(f"{field}.blur()")
        if tab.evaluate(f"{pause}.then(() => {field}.value)") == value:
            return
    raise AssertionError(f"{selector} does not keep {value}")


def press_draw(tab):
    """Presses the button once it is there."""
    button = "document.querySelector('#draw')"
    tab.wait_for(f"({button}?.offsetParent ?? null) != null && !{button}.disabled")
    tab.evaluate(f"{button}.click()")


def test_from_a_dropped_picture_to_a_video(tab, place):
    tab.drop("#pictures", place / "cat.png")
    tab.wait_for("document.querySelector('#seen-1 img')?.naturalWidth == 48")
    assert "cat.png has a background" in tab.evaluate(text("#note"))
    tab.drop("#pictures", place / "notes.png")
    tab.wait_for(f"{text('#note .wrong')}.startsWith('notes.png is not an image')")
    assert tab.evaluate("document.querySelector('#seen-1 img').naturalWidth") == 48
    fill(tab, "#prompt textarea", "A cat in a café.")
    fill(tab, "#subject-1 input", "cat")
    press_draw(tab)
    tab.wait_for(f"{text('#status')}.startsWith('Done')")
    tab.wait_for("document.querySelector('#video video')?.videoWidth == 48")
    (out,) = (place / "videos").iterdir()
    about = json.loads((out / "0001.json").read_text())
    assert about["prompt"] == "A cat in a café."
    assert about["references"][0]["subject"] == "cat"
    assert (out / "0001.mp4").stat().st_size > 0
    tab.wait_for("document.querySelectorAll('#gallery .thumbnail-item').length == 1")


def test_a_setting_that_makes_no_video_is_a_sentence_and_the_page_goes_on(tab, place):
    tab.evaluate("document.querySelector('#settings button').click()")
    tab.wait_for("document.querySelector('#num_frames input')?.offsetParent != null")
    fill(tab, "#num_frames input", "6")
    press_draw(tab)
    tab.wait_for(f"{text('#status .wrong')}.includes('num_frames')")
    assert "Traceback" not in tab.evaluate("document.body.innerText")
    fill(tab, "#num_frames input", "1")
    press_draw(tab)
    tab.wait_for("document.querySelectorAll('#gallery .thumbnail-item').length == 2")
    (out,) = (place / "videos").iterdir()
    assert json.loads((out / "0002.json").read_text())["made"]["size"] == [1, 32, 48]


def test_a_video_is_cancelled_and_the_page_goes_on(tab, place):
    (out,) = (place / "videos").iterdir()
    before = sorted(path.name for path in out.iterdir())
    fill(tab, "#num_steps input", "100000")  # takes until it is cancelled
    fill(tab, "#preview_every input", "2")
    press_draw(tab)
    tab.wait_for("(document.querySelector('#cancel')?.offsetParent ?? null) != null")
    tab.wait_for(f"{text('#status')}.includes(' of 100000, about ')")
    tab.wait_for("document.querySelector('#preview img')?.naturalWidth == 48")
    tab.evaluate("document.querySelector('#cancel').click()")
    tab.wait_for(f"{text('#status')} == 'Cancelled.'")
    tab.wait_for("(document.querySelector('#draw')?.offsetParent ?? null) != null")
    assert sorted(path.name for path in out.iterdir()) == before


def test_it_fits_a_phone_asks_nobody_else_and_the_console_is_silent(tab, tmp_path):
    tab.resize(390, 844)
    tab.wait_for("innerWidth == 390")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.screenshot(tmp_path / "phone.png")
    asked = tab.evaluate("performance.getEntriesByType('resource').map(r => new URL(r.name).origin)")
    assert set(asked) == {tab.evaluate("location.origin")}
    assert [complaint for complaint in tab.complaints if UPLOADED not in complaint] == []


def status(address, path):
    try:
        with urllib.request.urlopen(f"{address}gradio_api/file={path}", timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_only_its_own_files_can_be_read(tab, address, place):
    (out,) = (place / "videos").iterdir()
    assert status(address, out / "0001.mp4") == (200, (out / "0001.mp4").read_bytes())
    for path in ("/etc/passwd", place / "secret.txt", "secret.txt", place / "refalign.safetensors", __file__):
        assert status(address, path)[0] in (403, 404), path
    assert status(address, f"{out}/../../secret.txt")[0] in (403, 404)
    assert status(address, "https://example.com/a.png")[0] == 403


def test_a_file_that_was_not_uploaded_is_no_reference(address, place):
    """A client that names a file of the host instead of uploading one gets an error, and not its picture."""
    with urllib.request.urlopen(f"{address}config", timeout=120) as answer:
        config = json.load(answer)
    (zone,) = (part["id"] for part in config["components"] if part["props"].get("elem_id") == "pictures")
    (event,) = (e for e in config["dependencies"] if [zone, "upload"] in e["targets"])
    file = {"path": str(place / "cat.png"), "meta": {"_type": "gradio.FileData"}}
    body = {"data": [None, [file], 32, 48, ""], "fn_index": event["id"], "session_hash": "stranger"}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}gradio_api/queue/join", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert answer.status == 200
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash=stranger", timeout=120) as answer:
        for line in answer:
            if b"process_completed" in line:
                assert json.loads(line.removeprefix(b"data: "))["success"] is False
                return
    raise AssertionError("no answer")


def test_it_listens_on_loopback_alone(address):
    port = int(re.search(r":(\d+)/", address)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=60):
        pass
    if os.uname().sysname == "Linux":  # where all of 127.0.0.0/8 is this machine, which 0.0.0.0 would include
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=60)
