"""Faults, injected. `make test` runs a short form of each test, `make faults` the long one;
both end with a table of counts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Job, lines, weights

LONG = os.environ.get("TRAINER_FAULTS") == "long"
OPTIONS = ("train.precision=fp32", "train.ema=0.9")
BRIEF = (*OPTIONS, "train.duration=10 steps")  # with checkpoints after 5, 7 and 10
Tally = Callable[..., None]
Uninterrupted = Callable[..., tuple[dict[str, str], list[dict[str, Any]]]]
_TABLE = pytest.StashKey[dict[str, tuple[int, float]]]()


@pytest.fixture(scope="session")
def uninterrupted() -> Uninterrupted:
    """Weights and metrics of a brief, uninterrupted run; trained once for each number of processes."""
    known: dict[Any, tuple[dict[str, str], list[dict[str, Any]]]] = {}

    def train(world_size: int, recipe: Path, *options: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
        if (world_size, options) not in known:
            with Job(world_size, recipe, "name=uninterrupted", *BRIEF, *options) as job:
                assert job.wait() == [0] * world_size, job.output
            run = recipe.parent / "runs" / "uninterrupted"
            known[world_size, options] = weights(run), lines(run)
        return known[world_size, options]

    return train


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Adds events to a line of the table, with the seconds that one took."""

    def add(what: str, count: int = 1, seconds: float = 0.0) -> None:
        table = request.config.stash.setdefault(_TABLE, {})
        counted, longest = table.get(what, (0, 0.0))
        table[what] = (counted + count, max(longest, seconds))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table = config.stash.get(_TABLE, {})
    if table:
        terminalreporter.section("injected faults")
        for what, (count, longest) in sorted(table.items()):
            terminalreporter.write_line(f"{count:6d}  {what}" + (f" (at most {longest:.1f} s)" if longest else ""))
