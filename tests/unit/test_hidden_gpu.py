"""On a machine with a GPU the tests compute what they compute elsewhere: only those that need one see it,
when they run alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
TESTS = """
import os, subprocess, sys
import pytest

def report():
    command = [sys.executable, "-c", "import os; print('child', os.environ.get('CUDA_VISIBLE_DEVICES'))"]
    child = subprocess.run(command, capture_output=True, text=True).stdout
    print("seen", os.environ.get("CUDA_VISIBLE_DEVICES"), child)

@pytest.mark.gpu
def test_gpu(): report()

def test_other(): report()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "before", "expected"),
    [
        ((), "0,1", {""}),
        (("-m", "not slow"), "0,1", {""}),
        (("-m", "gpu or not gpu"), None, {""}),
        (("-m", "gpu"), "0,1", {"0,1"}),
        (("-m", "gpu and not slow"), None, {"None"}),
        (("-k", "test_gpu"), "1", {"1"}),
        (("-m", "slow"), "1", set()),
    ],
)
def test_the_gpu_is_seen_by_gpu_tests_that_run_alone_and_by_no_others(
    tmp_path: Path, options: tuple[str, ...], before: str | None, expected: set[str]
) -> None:
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "test_it.py").write_text(TESTS, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n gpu: x\n slow: x\n", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | (
        {} if before is None else {"CUDA_VISIBLE_DEVICES": before}
    )
    command = [sys.executable, "-m", "pytest", "-sq", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if expected else 5), done.stdout + done.stderr
    assert {*re.findall("seen (.*) child", done.stdout)} == {*re.findall("child (.*)", done.stdout)} == expected, (
        done.stdout
    )
