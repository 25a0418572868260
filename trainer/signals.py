"""A signal only sets a flag; the loop looks at it between two steps. Nothing here imports torch.

`install()` must run before torch is imported, which takes seconds in which a signal would kill the process.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        signal_name: of the first stop signal received, e.g. `SIGTERM`; None before.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._pid = os.getpid()

    def install(self) -> None:
        """Handles SIGTERM, SIGINT and SIGUSR1 from now on."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a loader worker: the process that started it decides
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            print("\nsecond Ctrl-C: ending at once; the last checkpoint stays", file=sys.stderr, flush=True)
            os._exit(130)
        self.signal_name = self.signal_name or signal.Signals(number).name


STOP = StopRequest()
