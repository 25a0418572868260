"""A signal only sets a flag, which the loop checks between two steps. Nothing here imports torch.

`install()` must run before torch is imported, which takes seconds in which a signal would kill the process.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

BEFORE_LIMIT_S = 120.0  # how long before a known time limit a checkpoint is saved
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stopped(BaseException):
    """A stop was requested before there was anything to save. Like KeyboardInterrupt, not an Exception,
    so that nothing catches it on the way.
    """


class StopRequest:
    """Whether a stop was requested from this process.

    Attributes:
        signal_name: of the first stop signal received, e.g. `SIGTERM`; None before.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._pid = os.getpid()
        self._at_once = False

    def install(self, noted: str = "") -> None:
        """Handles SIGTERM, SIGINT, SIGUSR1 and SIGHUP from now on; SIGHUP stays ignored where it was, as under `nohup`.

        Args:
            noted: a file that exists if SIGUSR1 came earlier, while it was ignored, see launch/node.sh.
        """
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)
        if os.path.exists(noted):
            self.signal_name = "SIGUSR1"

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handles stop signals inside, and none of them afterwards; outside of the main thread, which alone may do so,
        not at all.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self.__init__()  # type: ignore[misc]  # an earlier request has been met
        self.install()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.__init__()  # type: ignore[misc]

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a stop signal raises `Stopped` immediately: for long work that may be aborted, such as a download."""
        self._at_once = True
        try:
            self.raise_if_asked()
            yield
        finally:
            self._at_once = False

    @property
    def is_requested(self) -> bool:
        """Whether a stop signal was received."""
        return self.signal_name is not None

    def raise_if_asked(self) -> None:
        """Raises `Stopped` if a stop was requested."""
        if self.signal_name:
            raise Stopped

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a loader worker: the process that started it will end it
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            # Not print(), which may be in the middle of another line.
            os.write(2, b"\nsecond Ctrl-C: exiting immediately; the last checkpoint is kept\n")
            os._exit(130)
        if number == signal.SIGHUP:
            leave_closed_terminal()  # else the next printed line would end the training
        self.signal_name = self.signal_name or signal.Signals(number).name
        if self._at_once:
            self._at_once = False  # only once: cleaning up must not be interrupted
            raise Stopped


STOP = StopRequest()


def leave_closed_terminal() -> bool:
    """Discards further output to a terminal or pipe that was closed; returns whether one was."""
    import select  # only now: signals are lost until `install` is called

    found = False
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)  # reports errors only
        if poll.poll(0):
            found = True
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
    return found


class TimeLimit:
    """When the job will be ended, where that is known: `TRAINER_END_TIME` (seconds since 1970), or that of SLURM."""

    def __init__(self) -> None:
        ends = (os.environ.get(variable, "") for variable in ("TRAINER_END_TIME", "SLURM_JOB_END_TIME"))
        self._end = next((float(end) for end in ends if end.isdigit()), None)
        self._asked = time.time()

    def comes_near(self) -> bool:
        """Whether there is time for little more than a checkpoint; true once.

        Call it every step: the time between two calls is taken as that of the next step.
        """
        before, self._asked = self._asked, time.time()
        near = self._end is not None and self._asked + (self._asked - before) + BEFORE_LIMIT_S > self._end
        if near:
            self._end = None
        return near
