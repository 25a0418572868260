"""Places in a run where a test can hold it, or break it; imports nothing heavy,
since plugins of real runs use it too.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from typing import Any


class Gate:
    """A place in a process where it waits until the test lets it continue.

    Args:
        arrivals, passes: pipes, each to read from and to write to.
    """

    def __init__(self, arrivals: tuple[int, int] | None = None, passes: tuple[int, int] | None = None) -> None:
        self.arrivals, self.passes = arrivals or os.pipe(), passes or os.pipe()

    def stop_here(self, *_: Any) -> None:
        """In the process: reports that it has arrived, and waits. Signals are handled meanwhile."""
        os.write(self.arrivals[1], b".")
        os.read(self.passes[0], 1)

    def await_arrival(self, count: int = 1) -> None:
        """In the test: waits until that many processes have arrived."""
        for _ in range(count):
            assert select.select([self.arrivals[0]], [], [], 60)[0], "no process came to the gate"
            os.read(self.arrivals[0], 1)

    def open(self, count: int = 1) -> None:
        """In the test: lets that many processes continue."""
        os.write(self.passes[1], b"." * count)


def before_call(owner: Any, name: str, act: Callable[..., Any], on_call: int = 1) -> None:
    """Calls `act` with the arguments of the n-th call of a function, just before it."""
    function, calls = getattr(owner, name), 0

    def calling(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == on_call:
            act(*arguments)
        return function(*arguments, **options)

    setattr(owner, name, calling)


def before_step(step: int, act: Callable[[Any], Any]) -> None:
    """Calls `act(trainer)` when so many steps are done, and another is about to begin."""
    from trainer.trainer import Trainer

    train_step = Trainer.train_step

    def stepping(trainer: Trainer) -> None:
        if trainer.state.step == step:
            act(trainer)
        train_step(trainer)

    Trainer.train_step = stepping  # type: ignore[method-assign]


def in_reading(step: int, act: Callable[[], Any]) -> None:
    """Calls `act` inside of the loader, when so many steps are done;
    the other ranks know that this one is there.
    """
    from trainer.trainer import Trainer

    train_step = Trainer.train_step

    def stepping(trainer: Trainer) -> None:
        batches = trainer.batches

        def reading() -> Iterator[Any]:
            trainer.watchdog._publish_state("training")
            act()
            yield from batches

        if trainer.state.step == step:
            trainer.batches = reading()
        train_step(trainer)

    Trainer.train_step = stepping  # type: ignore[method-assign]
