"""No rank waits forever: a thread in each process publishes heartbeats, and ends the job when a rank is lost.

Every few seconds the threads write to the store of torch.distributed. Rank 0 polls the heartbeats of all ranks; the
others poll rank 0's, and whether the job is to end. A rank is lost when

- it doesn't start: the others wait for it until `timeout`;
- it isn't responding: killed, stopped, or its machine is gone;
- its training has stalled for longer than `timeout`: of those that have stalled, the ones furthest behind are to blame,
  since the others only wait for them;
- it reported a failure.

Then one rank prints which rank it was and its last phase, and all end with exit code 3: they may be inside a call that
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

MAX_SILENCE_S = 120.0  # between two heartbeats of a rank; a thread waits while another holds Python's lock

MAX_INTERVAL_S = 5.0

POLL_S = 0.1  # while this rank ends

GRACE_S = 2.0  # for a rank to end by itself, with its own message, when the same error occurs on all ranks

REASON = "reason"  # key of why the job ends

State = Literal["training", "disconnected", "failed", "done"]


@dataclass(frozen=True)
class Heartbeat:
    """What a rank publishes.

    Attributes:
        number: of this heartbeat; 0 before the first one.
        num_phases: how many phases its training has entered.
        phase: what it is doing, e.g. `reading data`.
        step: optimizer steps done.
        idle: seconds since it entered the phase; 0 where that may take any time.
        state: `disconnected`: it lost the connection to another rank, which is to blame.
        error: what failed.
        host: name of the machine.
    """

    number: int = 0
    num_phases: int = 0
    phase: str = "starting"
    step: int = 0
    idle: float = 0.0
    state: State = "training"
    error: str = ""
    host: str = ""

    def __str__(self) -> str:
        return f"on {self.host}, {self.phase}, after step {self.step}"


class Watchdog:
    """Watches one process, and on rank 0 all of them.

    Args:
        rank, world_size: of this process. It watches from before the processes meet in torch.distributed.
        timeout: seconds that a rank may take to start, that training may stall, or a rank be silent.
        on_failure: called on rank 0 with the reason when another rank failed, before this one ends.
        failure: what is printed when a rank is lost, with the `{reason}`.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout: float,
        on_failure: Callable[[TrainingFailed], Any] = lambda failure: None,
        failure: str = "training failed: {reason}; the last checkpoint is kept",
    ) -> None:
        self.failure = failure
        self.rank, self.world_size, self.timeout, self.on_failure = rank, world_size, timeout, on_failure
        self.max_silence = min(timeout, MAX_SILENCE_S)
        self.interval = min(timeout / 10, MAX_INTERVAL_S)
        # Written by the training, read by the thread: number of phases, phase, step, when it was entered (None: it may
        # take any time).
        self._current: tuple[int, str, int, float | None] = (0, "starting", 0, time.monotonic())
        self._state: tuple[State, str] = ("training", "")
        self._num_heartbeats, self._resumed_at = 0, 0.0
        self._published, self._wake = threading.Event(), threading.Event()
        self._last_seen: dict[int, tuple[Heartbeat, float]] = {}  # each rank's newest heartbeat, and when it came
        self._peer_failed = False
        self._warned = 0  # number of the phase that was warned of
        try:
            self._store = _store(rank, world_size, timeout)
        except dist.DistError:
            if rank == 0:  # its port is taken
                raise
            self._terminate_without_store()
        self._store.set_timeout(timedelta(seconds=self.max_silence / 2))
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ called by the training

    def enter(self, phase: str, step: int = 0, patient: bool = False) -> None:
        """Starts a phase, on every rank alike; `patient` where it may take any time."""
        self._current = (self._current[0] + 1, phase, step, None if patient else time.monotonic())

    def failed(self, error: BaseException) -> None:
        """Reports to the other ranks that this one ends with an error of its own."""
        self._publish_state("failed", one_line(error))
        self._thread.join(GRACE_S + 2 * self.interval)

    def disconnected(self) -> None:
        """Waits until it is known which rank broke the connection, which ends this process;
        returns if that remains unknown.
        """
        self._publish_state("disconnected")
        self._thread.join(self.max_silence + GRACE_S + 2 * self.interval)

    def close(self) -> None:
        """Stops watching; rank 0 stays until the others have ended too."""
        self._publish_state("done")
        self._thread.join(self.max_silence)

    def _publish_state(self, state: State, error: str = "") -> None:
        self._published.clear()
        self._state = (state, error)
        self._wake.set()
        self._published.wait(GRACE_S)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        last_contact = time.monotonic()
        while True:
            # A store whose process is stopped never responds.
            hanging = threading.Timer(self.max_silence, self._terminate_without_store)
            hanging.daemon = True
            try:
                hanging.start()
                state = self._publish()
                reason = self._check_ranks() if self.rank == 0 else self._check_rank_0()
                last_contact = time.monotonic()
                ending = state in ("done", "failed")
                if ending and not self._has_active_peers():
                    return
                if reason and not ending:
                    self._terminate(reason)
            except RuntimeError:  # the store is gone, with the process or machine that holds it
                if self._state[0] in ("done", "failed"):
                    return
                if time.monotonic() - last_contact > GRACE_S:
                    self._terminate_without_store()
            finally:
                hanging.cancel()
            before = time.monotonic()
            self._wake.wait(self.interval if self._state[0] == "training" else POLL_S)
            self._wake.clear()
            # The whole job was suspended, and resumes now.
            if time.monotonic() - before > self.interval + self.max_silence / 2:
                self._resumed_at = time.monotonic()
                self._last_seen = {rank: (seen, self._resumed_at) for rank, (seen, _) in self._last_seen.items()}

    def _publish(self) -> State:
        (num_phases, phase, step, since), (state, error) = self._current, self._state
        self._num_heartbeats += state != "failed"  # the others measure the silence from there
        idle = 0.0 if since is None else time.monotonic() - max(since, self._resumed_at)
        heartbeat = Heartbeat(self._num_heartbeats, num_phases, phase, step, idle, state, error, platform.node())
        self._store.set(str(self.rank), json.dumps(asdict(heartbeat)))
        self._published.set()
        return state

    def _poll(self, rank: int) -> None:
        """Updates when a rank was last seen."""
        key, now = str(rank), time.monotonic()
        before = self._last_seen.get(rank, (Heartbeat(), now))
        heartbeat = Heartbeat(**json.loads(self._store.get(key))) if self._store.check([key]) else Heartbeat()
        same = rank in self._last_seen and (heartbeat.number, heartbeat.state) == (before[0].number, before[0].state)
        self._last_seen[rank] = before if same else (heartbeat, now)

    def _has_active_peers(self) -> bool:
        """On rank 0: whether others have not ended yet. Their store may live in this process,
        and they read the reason there.
        """
        return self.rank == 0 and any(
            heartbeat.state in ("training", "disconnected") for rank, (heartbeat, _) in self._last_seen.items() if rank
        )

    def _check_ranks(self) -> str:
        """On rank 0: why the job must end, i.e. which rank is lost, and how; empty if none is."""
        now = time.monotonic()
        for rank in range(self.world_size):
            self._poll(rank)
        active = {
            rank: (heartbeat, now - since)
            for rank, (heartbeat, since) in self._last_seen.items()
            if heartbeat.state != "done"
        }
        for rank, (heartbeat, silence) in active.items():
            if heartbeat.state == "failed" and silence > GRACE_S:
                self._peer_failed = True
                return f"rank {rank} failed ({heartbeat}): {heartbeat.error}"
        tolerated = self._tolerated_silence(any(heartbeat.state == "disconnected" for heartbeat, _ in active.values()))
        for rank, (heartbeat, silence) in active.items():
            if heartbeat.number and heartbeat.state != "failed" and silence > tolerated:
                return _not_responding(rank, heartbeat, silence)
        late = [rank for rank, (heartbeat, _) in active.items() if not heartbeat.number]
        if late:
            return _not_started(late, self.timeout) if active[late[0]][1] > self.timeout else ""
        if any(silence > self._tolerated_silence(disconnected=True) for _, silence in active.values()):
            return ""  # others may have stalled because of a silent rank, which may soon count as not responding
        return self._check_progress(
            {rank: heartbeat for rank, (heartbeat, _) in active.items() if heartbeat.state == "training"}
        )

    def _check_progress(self, heartbeats: dict[int, Heartbeat]) -> str:
        """Which ranks have stalled, empty if none has; warns after half of the timeout."""
        idle = max((heartbeat.idle for heartbeat in heartbeats.values()), default=0.0)
        if idle <= self.timeout / 2:
            return ""
        furthest_behind = min(heartbeat.num_phases for heartbeat in heartbeats.values())
        stalled = [rank for rank, heartbeat in heartbeats.items() if heartbeat.num_phases == furthest_behind]
        who = "all ranks" if 1 < len(stalled) == self.world_size else _named(stalled)
        message = f"{who} stalled for {idle:.0f} s ({heartbeats[stalled[0]]})"
        if idle > self.timeout:
            return message + ("" if len(stalled) == self.world_size else "; the other ranks are waiting")
        if furthest_behind != self._warned:
            self._warned = furthest_behind
            _print(f"warning: {message}; the job ends after {self.timeout:.0f} s (train.timeout)")
        return ""

    def _check_rank_0(self) -> str:
        """On the others: why the job must end, as rank 0 wrote or because rank 0 itself is lost; empty otherwise."""
        if self._store.check([REASON]):
            return str(self._store.get(REASON), "utf-8")
        self._poll(0)
        heartbeat, since = self._last_seen[0]
        silence = time.monotonic() - since
        if heartbeat.state == "failed" and silence > GRACE_S:
            return f"rank 0 failed ({heartbeat}): {heartbeat.error}"
        if not heartbeat.number:
            return _not_started([0], self.timeout) if silence > self.timeout else ""
        tolerated = self._tolerated_silence(self._state[0] == "disconnected")
        if heartbeat.state in ("training", "disconnected") and silence > tolerated:
            return _not_responding(0, heartbeat, silence)
        return ""

    def _tolerated_silence(self, disconnected: bool) -> float:
        """Seconds; few where a connection is broken already."""
        return min(self.max_silence, 3 * self.interval + 1) if disconnected else self.max_silence

    def _terminate(self, reason: str) -> None:
        """Ends this process; the first one that knows the reason prints it."""
        if not self._store.check([REASON]):
            self._store.set(REASON, reason)
            _print(self.failure.format(reason=reason))
        if self._peer_failed:
            with suppress(Exception):
                self.on_failure(TrainingFailed(reason))
        self._state = ("done", "")
        self._publish()
        if self.rank == 0:
            time.sleep(2 * self.interval)  # the store may live in this process, and the others read the reason there
        self._exit()

    def _terminate_without_store(self) -> None:
        if self.rank == 1:  # the first that is left
            last = f"last heartbeat {self._last_seen[0][0]}" if 0 in self._last_seen else "no heartbeat so far"
            _print(self.failure.format(reason=f"rank 0, or what launched the job, is not responding; {last}"))
        self._exit()

    def _exit(self) -> None:
        for child in multiprocessing.active_children():  # loader workers
            child.kill()
        os._exit(3)


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _not_started(ranks: list[int], timeout: float) -> str:
    return f"{_named(ranks)} did not start, or exited immediately: no heartbeat within {timeout:.0f} s (train.timeout)"


def _not_responding(rank: int, heartbeat: Heartbeat, silence: float) -> str:
    return f"rank {rank} is not responding, killed or stopped; last heartbeat {silence:.0f} s ago, {heartbeat}"


def _print(line: str) -> None:
    with suppress(OSError):  # a closed terminal
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
