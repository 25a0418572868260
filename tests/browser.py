"""A headless Chromium, driven over its debugging pipe (the DevTools protocol), which needs no library."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WAIT_S = 60.0


class Browser:
    """One page in a browser that knows no host but 127.0.0.1.

    Args:
        profile: its folder.
        size: width and height of the window.

    Attributes:
        requests: the addresses of all requests so far.
        problems: uncaught exceptions and error messages of the page.
    """

    def __init__(self, profile: Path, size: tuple[int, int] = (1280, 1000)) -> None:
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._id, self._buffer = 0, b""
        commands, self._out = os.pipe()
        self._in, answers = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]  # 3 and 4 stay free
        self._process = subprocess.Popen(
            [
                *("bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "chromium", "chromium"),
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
                *("--remote-debugging-pipe", f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"),
                "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
            ],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (commands, answers, *ends):
            os.close(end)
        self._session = ""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log", "DOM"):
            self(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = ""
        self("Browser.close")
        self._process.wait(WAIT_S)
        os.close(self._out)
        os.close(self._in)

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns its result."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._id:
            self._note(answer)
        assert "error" not in answer, (method, answer)
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._in], [], [], WAIT_S)[0], "the browser doesn't answer"
            received = os.read(self._in, 2**20)
            assert received, "the browser has ended"
            self._buffer += received
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Runtime.exceptionThrown":
                self.problems.append(json.dumps(parameters["exceptionDetails"])[:500])
            case "Log.entryAdded" if parameters["entry"]["level"] == "error":
                self.problems.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        """Opens a page."""
        self("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """The value of a JavaScript expression as soon as it is true."""
        deadline = time.monotonic() + WAIT_S
        while not (value := self.value(expression)):
            assert time.monotonic() < deadline, (expression, self.problems, self.value("document.body.innerText"))
            time.sleep(0.05)
        return value

    def choose_files(self, selector: str, files: Sequence[Path]) -> None:
        """Chooses files for an `<input type=file>`, as a user does in its dialog."""
        node = self("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")["result"]
        self("DOM.setFileInputFiles", objectId=node["objectId"], files=[str(file) for file in files])

    def screenshot(self, file: Path) -> None:
        """Writes what the window shows as a PNG file."""
        file.write_bytes(base64.b64decode(self("Page.captureScreenshot")["data"]))
