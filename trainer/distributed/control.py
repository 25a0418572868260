"""Small messages between processes that control the run."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed.reduce import world_size
from trainer.errors import UserError
from trainer.signals import STOP, Stopped

# Long, since rank 0 may be preparing a data set while the others wait; the watchdog ends a process that hangs.
TIMEOUT = timedelta(days=7)


class Control:
    """Small messages between processes that control the run, as CPU tensors: they never wait for a GPU."""

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT) if world_size() > 1 else None

    def maximum(self, values: list[float]) -> list[float]:
        """The maximum of each value over all processes."""
        return self._reduce(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.MAX)

    def sum(self, values: list[int]) -> list[int]:
        """The sum of each value over all processes, modulo 2**64 as int64."""
        return self._reduce(torch.tensor(values, dtype=torch.int64), dist.ReduceOp.SUM)

    def from_main(self, values: list[int]) -> list[int]:
        """Rank 0's values."""
        tensor = torch.tensor(values, dtype=torch.int64)
        if world_size() > 1:
            dist.broadcast(tensor, 0, group=self._group)
        return tensor.tolist()

    def on_main(self, decide: Callable[[], Any]) -> str:
        """Calls `decide` on rank 0; returns its result or raises its error on all ranks. A stop signal interrupts it.

        Raises:
            UserError: raised by `decide`, or it can't use a file.
            Stopped: a stop was requested of rank 0.
        """
        answer, failure, stopped = "", "", False
        if world_size() == 1 or dist.get_rank() == 0:
            try:
                with STOP.at_once():
                    answer = str(decide() or "")
            except Stopped:
                stopped = True
            except UserError as error:
                failure = str(error)
            except OSError as error:
                failure = f"{error.filename or 'a file'} can't be used: {error.strerror or error}"
        if self.from_main([stopped])[0]:
            raise Stopped
        answer, failure = self.text_from_main(answer), self.text_from_main(failure)
        if failure:
            raise UserError(failure)
        return answer

    def main_first(self, act: Callable[[], None]) -> None:
        """Calls `act` on rank 0, then on the others; raises what `on_main` raises."""
        self.on_main(act)
        if world_size() > 1 and dist.get_rank() != 0:
            act()

    def text_from_main(self, text: str) -> str:
        """Rank 0's text."""
        encoded = list(text.encode())
        (length,) = self.from_main([len(encoded)])
        return bytes(self.from_main((encoded + [0] * length)[:length])).decode() if length else ""

    def gather(self, values: list[int]) -> list[list[int]]:
        """The values of each process, by rank; all must have the same number."""
        mine = torch.tensor(values, dtype=torch.int64)
        if world_size() == 1:
            return [values]
        gathered = [torch.empty_like(mine) for _ in range(world_size())]
        dist.all_gather(gathered, mine, group=self._group)
        return [each.tolist() for each in gathered]

    def union(self, values: list[int]) -> list[int]:
        """The sorted values that any process has; they must not be negative."""
        (longest,) = self.maximum([float(len(values))])
        padded = [*values, *[-1] * (int(longest) - len(values))]
        return sorted({value for each in self.gather(padded) for value in each} - {-1})

    def _reduce(self, tensor: Tensor, operation: Any) -> list[Any]:
        if world_size() > 1:
            dist.all_reduce(tensor, operation, group=self._group)
        return tensor.tolist()
