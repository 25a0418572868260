"""Small messages between processes about the run itself."""

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


class Control:
    """Small messages between processes about the run itself, over CPU tensors: they never wait for a GPU."""

    def __init__(self, timeout: timedelta) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if world_size() > 1 else None

    def maximum(self, values: list[float]) -> list[float]:
        """The largest of each value over all processes."""
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
        """Rank 0 decides and tells the others; where it can't, all end with its error. A stop signal to it interrupts
        it.

        Raises:
            UserError: rank 0's, or that it can't use a file.
            Stopped: rank 0 was asked to stop.
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

    def text_from_main(self, text: str) -> str:
        """Rank 0's text."""
        encoded = list(text.encode())
        (length,) = self.from_main([len(encoded)])
        return bytes(self.from_main((encoded + [0] * length)[:length])).decode() if length else ""

    def union(self, values: list[int]) -> list[int]:
        """Every value that some process has, in order; values are at least 0."""
        if world_size() == 1:
            return sorted(set(values))
        (longest,) = self.maximum([float(len(values))])
        mine = torch.tensor([*values, *[-1] * (int(longest) - len(values))], dtype=torch.int64)
        gathered = [torch.empty_like(mine) for _ in range(world_size())]
        dist.all_gather(gathered, mine, group=self._group)
        return sorted({value for each in gathered for value in each.tolist()} - {-1})

    def _reduce(self, tensor: Tensor, operation: Any) -> list[Any]:
        if world_size() > 1:
            dist.all_reduce(tensor, operation, group=self._group)
        return tensor.tolist()
