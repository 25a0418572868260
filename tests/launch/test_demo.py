"""The page of `trainer demo` in a browser without a network: an image is uploaded, its result is drawn, and nothing
leaves the machine.
"""

from __future__ import annotations

import importlib.util
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from tests.browser import Browser
from tests.processes import run_processes, train, write_recipe

ROOT = Path(__file__).resolve().parents[2]
START_S = 120.0

pytestmark = [
    pytest.mark.launch,
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed"),
    pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="gradio is not installed"),
]

# `trainer …` that notes where its sockets go, and fails to reach any other machine.
OFFLINE = """
import sys
noted = open(sys.argv.pop(1), "a", buffering=1)
def refuse(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto") and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    noted.write(f"{event} {host}\\n")
    if host != "127.0.0.1":
        raise OSError("no network")
sys.addaudithook(refuse)
from trainer.commands import main
sys.exit(main())
"""


@contextmanager
def demo(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`trainer demo run`, and the address of its page."""
    (folder / "temporary").mkdir()
    (folder / "here").mkdir()
    environment = os.environ | {"TMPDIR": str(folder / "temporary"), "PYTHONPATH": str(ROOT), "GRADIO_SHARE": "True"}
    with subprocess.Popen(
        [sys.executable, "-c", OFFLINE, str(folder / "sockets.txt"), "demo", "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder / "here",
        env=environment,
    ) as process:
        try:
            assert process.stdout and select.select([process.stdout], [], [], START_S)[0]
            line = process.stdout.readline()
            assert line.startswith("run: open http://127.0.0.1:"), line + process.stdout.read()
            yield process, line.split()[2]
        finally:
            process.kill()


def test_an_uploaded_image_has_its_result_drawn_and_nothing_leaves_the_machine(tmp_path: Path) -> None:
    run_processes(1, train, write_recipe(tmp_path), ("train.duration=1 steps",))
    Image.new("RGB", (90, 60), "tomato").save(tmp_path / "photo.jpg")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "photo.jpg").read_bytes()[:20])
    upload = "input[type=file]"
    with demo(tmp_path) as (process, url), Browser(tmp_path / "profile") as browser:
        browser.open(url)
        browser.wait_for(f"document.querySelector({upload!r}) !== null")
        assert browser.value("document.querySelector('h1').innerText") == "run"
        browser.wait_for("document.querySelectorAll('img[src*=example_]').length == 6")

        browser.choose_files(upload, [tmp_path / "photo.jpg"])
        browser.wait_for("document.querySelector('.outcome td') !== null")
        drawn = "[...document.querySelectorAll('img[src*=\"/image.png\"]')].map(x => [x.naturalWidth, x.naturalHeight])"
        assert browser.wait_for(f"{drawn}.flat().every(x => x) && {drawn}") == [[90, 60]]
        text = browser.value("document.querySelector('.outcome').innerText")
        assert "%" in text and "share of pixels" in text
        assert browser.value("document.querySelectorAll('[aria-label*=share i]').length") == 0  # it would upload

        browser.value("document.querySelector('button[aria-label^=Remove], button[aria-label=Clear]').click()")
        browser.wait_for(f"document.querySelector({upload!r}) !== null")
        browser.choose_files(upload, [tmp_path / "broken.jpg"])
        browser.wait_for("document.querySelector('.outcome').innerText.includes('be read')")
        assert browser.value(f"{drawn}.length") == 0

        assert browser.problems == []
        assert [each for each in browser.requests if not each.startswith((url, "data:", "blob:"))] == []
        process.send_signal(signal.SIGINT)
        output = process.stdout.read() if process.stdout else ""
        assert (process.wait(60), output) == (0, "stopped; uploaded images are deleted\n")
    assert set((tmp_path / "sockets.txt").read_text().split()) == {"socket.bind", "127.0.0.1"}
    assert [*(tmp_path / "here").iterdir()] == [*(tmp_path / "temporary").iterdir()] == []
