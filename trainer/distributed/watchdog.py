"""No rank waits for ever: a thread in each process says where it stands, and ends the job when one is lost.

Every few seconds the threads write to the store of torch.distributed. Rank 0 reads what all have written; the others
read what rank 0 wrote, and its verdict. A rank is lost when

- it doesn't start: the others wait for it until `timeout`;
- it writes no more: killed, stopped, or its machine is gone;
- its training stands still for longer than `timeout`: of those that stand still, the ones furthest behind are meant,
  since the others only wait for them;
- it failed, and said so.

Then one rank prints who it was and where it stood, and all end with exit code 3: they may be inside a call that
nothing else can interrupt. The last checkpoint stays.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist

from trainer.errors import TrainingFailed, one_line

LONGEST_SILENCE_S = 120.0  # between two messages of a rank; a thread waits while another holds Python's lock

LONGEST_INTERVAL_S = 5.0

POLL_S = 0.1  # while this rank ends

GRACE_S = 2.0  # for a rank to end by itself, with its own message, when the same error meets all of them

VERDICT = "verdict"

State = Literal["training", "cut off", "failed", "done"]


@dataclass(frozen=True)
class Report:
    """What a rank says of itself.

    Attributes:
        beat: number of this message; 0 before the first one.
        marks: places that its training has come past.
        place: what it is doing, e.g. `reading data`.
        step: optimizer steps done.
        idle: seconds since it came to that place; 0 where it may take any time.
        state: `cut off`: it lost the connection to another rank, so another one is to blame.
        error: what failed.
        host: name of the machine.
    """

    beat: int = 0
    marks: int = 0
    place: str = "starting"
    step: int = 0
    idle: float = 0.0
    state: State = "training"
    error: str = ""
    host: str = ""

    def __str__(self) -> str:
        return f"on {self.host}, {self.place}, after step {self.step}"


class Watchdog:
    """Watches one process, and on rank 0 all of them.

    Args:
        rank, world_size: of this process. The watch begins before the processes meet in torch.distributed.
        timeout: seconds that a rank may take to start, that training may stand still, or a rank be silent.
        on_failure: called on rank 0 with the verdict when another rank failed, before this one ends.
    """

    def __init__(self, rank: int, world_size: int, timeout: float, on_failure: Callable[[TrainingFailed], Any]) -> None:
        self.rank, self.world_size, self.timeout, self.on_failure = rank, world_size, timeout, on_failure
        self.silence = min(timeout, LONGEST_SILENCE_S)
        self.interval = min(timeout / 10, LONGEST_INTERVAL_S)
        # Written by the training, read by the thread: marks, place, step, when it was reached (None: it may take any
        # time).
        self._here: tuple[int, str, int, float | None] = (0, "starting", 0, time.monotonic())
        self._state: tuple[State, str] = ("training", "")
        self._beat, self._resumed = 0, 0.0
        self._published, self._wake = threading.Event(), threading.Event()
        self._heard: dict[int, tuple[Report, float]] = {}
        self._peer_failed = False
        self._warned = 0  # marks of the place that was warned of
        try:
            self._store = _store(rank, world_size, timeout)
        except dist.DistError:
            if rank == 0:  # its port is taken
                raise
            self._lose_store()
        self._store.set_timeout(timedelta(seconds=self.silence / 2))
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ called by the training

    def at(self, place: str, step: int = 0, patient: bool = False) -> None:
        """Says what comes next, on every rank alike; `patient` for what may take any time."""
        self._here = (self._here[0] + 1, place, step, None if patient else time.monotonic())

    def failed(self, error: BaseException) -> None:
        """Tells the other ranks that this one ends with an error of its own."""
        self._tell("failed", one_line(error))
        self._thread.join(GRACE_S + 2 * self.interval)

    def cut_off(self) -> None:
        """Waits until it is known which rank broke the connection, which ends this process;
        returns if that stays unknown.
        """
        self._tell("cut off")
        self._thread.join(self.silence + GRACE_S + 2 * self.interval)

    def close(self) -> None:
        """Ends the watch; rank 0 stays until the others have ended too."""
        self._tell("done")
        self._thread.join(self.silence)

    def _tell(self, state: State, error: str = "") -> None:
        self._published.clear()
        self._state = (state, error)
        self._wake.set()
        self._published.wait(GRACE_S)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        last_contact = time.monotonic()
        while True:
            hanging = threading.Timer(self.silence, self._lose_store)  # a store whose process is stopped never answers
            hanging.daemon = True
            try:
                hanging.start()
                state = self._publish()
                verdict = self._judge() if self.rank == 0 else self._hear()
                last_contact = time.monotonic()
                ending = state in ("done", "failed")
                if ending and not self._others_go_on():
                    return
                if verdict and not ending:
                    self._pronounce(verdict)
            except RuntimeError:  # the store is gone, with the process or machine that holds it
                if self._state[0] in ("done", "failed"):
                    return
                if time.monotonic() - last_contact > GRACE_S:
                    self._lose_store()
            finally:
                hanging.cancel()
            before = time.monotonic()
            self._wake.wait(self.interval if self._state[0] == "training" else POLL_S)
            self._wake.clear()
            # The whole job was suspended, and goes on now.
            if time.monotonic() - before > self.interval + self.silence / 2:
                self._resumed = time.monotonic()
                self._heard = {rank: (report, self._resumed) for rank, (report, _) in self._heard.items()}

    def _publish(self) -> State:
        (marks, place, step, since), (state, error) = self._here, self._state
        self._beat += state != "failed"  # the others count from there
        idle = 0.0 if since is None else time.monotonic() - max(since, self._resumed)
        report = Report(self._beat, marks, place, step, idle, state, error, platform.node())
        self._store.set(str(self.rank), json.dumps(asdict(report)))
        self._published.set()
        return state

    def _listen(self, rank: int) -> None:
        key, now = str(rank), time.monotonic()
        before = self._heard.get(rank, (Report(), now))
        report = Report(**json.loads(self._store.get(key))) if self._store.check([key]) else Report()
        same = rank in self._heard and (report.beat, report.state) == (before[0].beat, before[0].state)
        self._heard[rank] = before if same else (report, now)

    def _others_go_on(self) -> bool:
        """On rank 0: whether others have not ended yet. Their store may live in this process,
        and they read there what happened.
        """
        return self.rank == 0 and any(
            report.state in ("training", "cut off") for rank, (report, _) in self._heard.items() if rank
        )

    def _judge(self) -> str:
        """On rank 0: which rank is lost, and how; nothing if none is."""
        now = time.monotonic()
        for rank in range(self.world_size):
            self._listen(rank)
        active = {
            rank: (report, now - since) for rank, (report, since) in self._heard.items() if report.state != "done"
        }
        for rank, (report, silent) in active.items():
            if report.state == "failed" and silent > GRACE_S:
                self._peer_failed = True
                return f"rank {rank} failed ({report}): {report.error}"
        patience = self._patience(any(report.state == "cut off" for report, _ in active.values()))
        for rank, (report, silent) in active.items():
            if report.beat and report.state != "failed" and silent > patience:
                return _not_responding(rank, report, silent)
        late = [rank for rank, (report, _) in active.items() if not report.beat]
        if late:
            return _not_started(late, self.timeout) if active[late[0]][1] > self.timeout else ""
        if any(silent > self._patience(cut_off=True) for _, silent in active.values()):
            return ""  # the others may stand still because of a rank that is lost, which is known when its time is over
        return self._standstill({rank: report for rank, (report, _) in active.items() if report.state == "training"})

    def _standstill(self, reports: dict[int, Report]) -> str:
        """Says who holds the others up; warns when half of the time is over."""
        idle = max((report.idle for report in reports.values()), default=0.0)
        if idle <= self.timeout / 2:
            return ""
        behind = min(report.marks for report in reports.values())
        blamed = [rank for rank, report in reports.items() if report.marks == behind]
        who = "all ranks" if 1 < len(blamed) == self.world_size else _named(blamed)
        told = f"{who} at a standstill for {idle:.0f} s ({reports[blamed[0]]})"
        if idle > self.timeout:
            return told + ("" if len(blamed) == self.world_size else "; the others wait")
        if behind != self._warned:
            self._warned = behind
            _print(f"warning: {told}; the job ends after {self.timeout:.0f} s, train.timeout")
        return ""

    def _hear(self) -> str:
        """On the others: rank 0's verdict, or that rank 0 itself is lost."""
        if self._store.check([VERDICT]):
            return str(self._store.get(VERDICT), "utf-8")
        self._listen(0)
        report, since = self._heard[0]
        silent = time.monotonic() - since
        if report.state == "failed" and silent > GRACE_S:
            return f"rank 0 failed ({report}): {report.error}"
        if not report.beat:
            return _not_started([0], self.timeout) if silent > self.timeout else ""
        if report.state in ("training", "cut off") and silent > self._patience(self._state[0] == "cut off"):
            return _not_responding(0, report, silent)
        return ""

    def _patience(self, cut_off: bool) -> float:
        """Seconds of silence that are put up with; few where a connection is broken already."""
        return min(self.silence, 3 * self.interval + 1) if cut_off else self.silence

    def _pronounce(self, verdict: str) -> None:
        """Ends this process; the first one to know says why."""
        if not self._store.check([VERDICT]):
            self._store.set(VERDICT, verdict)
            _print_failure(verdict)
        if self._peer_failed:
            with suppress(Exception):
                self.on_failure(TrainingFailed(verdict))
        self._state = ("done", "")
        self._publish()
        if self.rank == 0:
            time.sleep(2 * self.interval)  # the store may live in this process, and the others read the verdict there
        self._exit()

    def _lose_store(self) -> None:
        if self.rank == 1:  # the first who can still tell
            last = f"last heartbeat {self._heard[0][0]}" if 0 in self._heard else "no heartbeat so far"
            _print_failure(f"rank 0, or what launched the job, is not responding; {last}")
        self._exit()

    def _exit(self) -> None:
        for child in multiprocessing.active_children():  # loader workers
            child.kill()
        os._exit(3)


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _not_started(ranks: list[int], timeout: float) -> str:
    return f"{_named(ranks)} did not start, or ended at once: no heartbeat within {timeout:.0f} s (train.timeout)"


def _not_responding(rank: int, report: Report, silent: float) -> str:
    return f"rank {rank} is not responding, killed or stopped; last heartbeat {silent:.0f} s ago, {report}"


def _print_failure(verdict: str) -> None:
    _print(f"training failed: {verdict}; the last checkpoint stays")


def _print(line: str) -> None:
    with suppress(OSError):  # a terminal that was closed
        print(line, file=sys.stderr, flush=True)


def _store(rank: int, world_size: int, timeout: float) -> Any:
    """The store through which the processes find each other, a private one for a single process.

    Rank 0 holds it where no launcher does; torch.distributed then meets in the same one.
    """
    if world_size == 1:
        return dist.HashStore()
    launcher_holds_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not launcher_holds_it,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        multi_tenant=True,  # for this process, which may open it more than once
    )
    # An elastic launcher keeps its store over restarts.
    return dist.PrefixStore(f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
