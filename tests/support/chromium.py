"""A headless Chromium, spoken to over a pipe in the Chrome DevTools protocol: JSON messages that end in a zero byte."""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
"""The browser of this machine; None where there is none."""
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--mute-audio",
    "--remote-debugging-pipe",
)


class Page:
    """One tab. `complaints` gathers what the console would show of errors and warnings."""

    def __init__(self, requests: int, answers: int) -> None:
        self._requests, self._answers, self._numbers = requests, answers, itertools.count(1)
        self._pending, self._session = b"", {}
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Asks and waits for the answer; events on the way are noted."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params, **self._session}
        os.write(self._requests, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def show(self, path: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Opens a file in a window of so many CSS pixels, and waits until pictures and videos are there."""
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.absolute().as_uri())
        self.wait_for("location.protocol == 'file:' && document.readyState == 'complete'")
        self.wait_for("[...document.images].every(i => i.complete)")
        self.wait_for("[...document.querySelectorAll('video')].every(v => v.readyState >= 1 || v.error)")

    def visit(self, url: str) -> None:
        """Opens an address and waits until its document is there."""
        self.call("Page.navigate", url=url)
        self.wait_for(f"location.href.startsWith({json.dumps(url)}) && document.readyState == 'complete'")

    def resize(self, width: int, height: int) -> None:
        """Gives the window so many CSS pixels; narrow ones are a phone's."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def drop(self, selector: str, *paths: Path) -> None:
        """Drags files over the middle of an element and drops them there."""
        where = f"(b => [b.x + b.width / 2, b.y + b.height / 2])(document.querySelector({json.dumps(selector)})"
        self.evaluate(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        x, y = self.evaluate(f"{where}.getBoundingClientRect())")
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 120) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(condition):
            assert time.monotonic() < end, f"{condition} is not true after {seconds} s"
            time.sleep(0.05)

    def screenshot(self, path: Path) -> None:
        """Writes a PNG of the whole page."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _next(self, seconds: float = 60) -> dict[str, Any]:
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._answers], [], [], seconds)
            assert ready, f"Chromium is silent for {seconds} s"
            read = os.read(self._answers, 1 << 20)
            assert read, "Chromium is gone"
            self._pending += read
        message, self._pending = self._pending.split(b"\0", 1)
        event = json.loads(message)
        name, params = event.get("method"), event.get("params", {})
        if name == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif name == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(json.dumps(params["entry"]))
        elif name == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(params["args"]))
        return event


@contextlib.contextmanager
def page() -> Iterator[Page]:
    """A tab of a browser of its own, which ends with it."""
    assert BROWSER is not None
    read_requests, requests = os.pipe()
    answers, write_answers = os.pipe()
    with tempfile.TemporaryDirectory() as profile:
        # The browser listens on descriptor 3 and answers on 4; 9 keeps the second clear of the first's place.
        place = f"exec 9<&{read_requests} 4>&{write_answers} 3<&9 9<&-; exec "
        command = " ".join([place, BROWSER, *FLAGS, f"--user-data-dir={profile}", "about:blank"])
        process = subprocess.Popen(
            ["bash", "-c", command],
            pass_fds=(read_requests, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(read_requests)
        os.close(write_answers)
        try:
            yield Page(requests, answers)
        finally:
            os.close(requests)  # it quits when nobody can ask any more
            os.close(answers)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=20)
