"""Holds a real run at a place that the environment names; a recipe lists this file under `plugins`,
after tests/tiny.py.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.faults.hooks import Gate, before_step, in_reading
from trainer.data.source import Row

ROWS_BEFORE = 20


def _gate() -> Gate:
    """The one that the test made, whose ends this process inherited."""
    return Gate((-1, int(os.environ["GATE_ARRIVALS"])), (int(os.environ["GATE_PASSES"]), -1))


def _gated(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(rows(archives)):
        if number == ROWS_BEFORE:
            _gate().stop_here()
        yield row


tiny = sys.modules["trainer_plugin_tiny"]
rows = tiny._rows
match os.environ.get("GATE_PLACE"):
    case "rows":
        tiny._rows = _gated  # type: ignore[attr-defined]
    case "step":
        before_step(5, _gate().stop_here)
    case "killed" if os.environ["RANK"] == "1":
        in_reading(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
