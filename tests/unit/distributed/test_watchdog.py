"""A rank that hangs is noticed when `train.timeout` has passed, on a clock that the test sets:
the rest is in tests/faults/test_ranks.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from trainer.distributed import watchdog
from trainer.distributed.watchdog import Watchdog

TIMEOUT_S = 100.0


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # that is how a rank ends here
def test_a_rank_that_hangs_is_named_when_the_timeout_has_passed_and_not_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now, store, ended = [100.0], dist.HashStore(), {0: threading.Event(), 1: threading.Event()}

    def exit_of(watched: Watchdog) -> None:
        ended[watched.rank].set()
        raise SystemExit  # its thread

    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep))
    monkeypatch.setattr(watchdog, "MAX_INTERVAL_S", 0.01)
    monkeypatch.setattr(watchdog, "_store", lambda *_: store)
    monkeypatch.setattr(Watchdog, "_exit", exit_of)
    ranks = [Watchdog(rank, 2, TIMEOUT_S, on_failure=lambda *_: None) for rank in (0, 1)]
    for phase in ("reading data", "waiting for the other ranks"):
        for rank in ranks:
            if (phase, rank.rank) != ("waiting for the other ranks", 1):  # which hangs
                rank.enter(phase, 3)

    def let_pass(seconds: float) -> None:
        """In steps that are too short for a suspended machine, each of which both have seen."""
        for _ in range(5):
            now[0] += seconds / 5
            before = [rank._num_heartbeats for rank in ranks]
            wait_until(
                lambda seen=before: all(
                    rank._num_heartbeats > beat + 1 or ended[rank.rank].is_set()
                    for rank, beat in zip(ranks, seen, strict=True)
                )
            )

    try:
        let_pass(0.9 * TIMEOUT_S)
        assert not ended[0].is_set() and not ended[1].is_set()
        assert "training failed" not in capsys.readouterr().err
        let_pass(0.2 * TIMEOUT_S)
        for rank in ranks:
            assert ended[rank.rank].wait(10), f"rank {rank.rank} continues"
    finally:
        for rank in reversed(ranks):
            if not ended[rank.rank].is_set():
                rank.close()
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training failed: ")]
    assert "rank 1" in message and "reading data, after step 3" in message and "rank 0" not in message
