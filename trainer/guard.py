"""Steps whose loss or gradients are not finite: noticed before the optimizer steps, without waiting for a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from trainer.data.build import Data
from trainer.reduce import Control

GRADIENTS = "gradient_norm"
MAX_IDS = 32  # listed in a message


@dataclass(frozen=True)
class Finding:
    """The first bad step since the guard was last looked at.

    Attributes:
        step: its number, from 0.
        what: what was not finite, e.g. `loss is nan`.
        micro_batches: for each micro-batch of this process, whether its own share of the loss was not finite.
        count: bad steps since the last look.
    """

    step: int
    what: str
    micro_batches: list[bool]
    count: int

    def describe(self, data: Data, control: Control) -> str:
        """What was not finite in which step, and in which samples; to be called by all processes."""
        accumulate = len(self.micro_batches)
        marked = [0.0] * (data.world_size * accumulate)
        marked[data.rank * accumulate : (data.rank + 1) * accumulate] = map(float, self.micro_batches)
        ids: list[int] = []
        for index, is_marked in enumerate(control.maximum(marked)):
            if is_marked:
                rank, micro_batch = divmod(index, accumulate)
                ids += data.sample_ids(self.step, micro_batch, rank)
        listed = f"among samples {', '.join(map(str, ids[:MAX_IDS]))}{', …' if len(ids) > MAX_IDS else ''}" if ids else "each sample's loss is finite"
        return f"step {self.step + 1}: {self.what} ({listed})"


class Guard:
    """Keeps a bad step from changing the weights.

    On CPUs the host looks at every step. On GPUs the flag stays on the device, where the fused optimizer reads it as
    the one a gradient scaler would set (`found_inf`), and the host learns of it when it waits for the device anyway.
    Loss terms and gradients are sums over all processes, so all come to the same judgement.

    Args:
        optimizer: the torch optimizer; one that isn't fused makes the host look at every step.
        buffers: of the model; a skipped step leaves them as they were.
        skip: whether training goes on after a bad step. Otherwise no later step changes the weights either.
        scaled: whether a gradient scaler looks at the gradients: then those that overflow are its business.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, buffers: Iterable[Tensor], skip: bool, scaled: bool) -> None:
        self.optimizer, self.skip, self.scaled = optimizer, skip, scaled
        self.buffers = [buffer for buffer in buffers if buffer.is_floating_point()] if skip else []
        self._before: list[Tensor] = []
        self._count: Tensor | None = None  # bad steps so far; float64, on the device
        self._first: Tensor | None = None  # of those since the last look: step, values, flags of the micro-batches
        self._names: list[str] = []
        self._seen, self._has_stepped = 0, False

    def begin_step(self) -> None:
        """Remembers what a bad forward pass would spoil."""
        self._before = [buffer.clone() for buffer in self.buffers]

    def passes(self, step: int, values: dict[str, Tensor], finite_shares: list[Tensor]) -> tuple[bool, Tensor]:
        """Judges a step after its backward pass.

        Args:
            step: its number, from 0.
            values: the terms of the loss over all processes, and `gradient_norm`; scalars.
            finite_shares: for each micro-batch a bool scalar, whether this process's sums are finite.

        Returns:
            Whether the host may call the optimizer, and a bool scalar on the device: whether the step counts.
        """
        self._names = list(values)
        found = torch.stack([value.detach().double() for value in values.values()])
        finite = found.isfinite()
        judged = torch.stack([ok for ok, name in zip(finite, values, strict=True) if not (self.scaled and name == GRADIENTS)])
        bad = ~judged.all()
        if self._count is None or self._first is None:
            self._count = torch.zeros_like(found[0])
            self._first = torch.zeros(1 + len(found) + len(finite_shares), dtype=found.dtype, device=found.device)
        report = torch.cat([torch.full_like(found[:1], step), found, (~torch.stack(finite_shares)).double()])
        self._first = torch.where(bad & (self._count == self._seen), report, self._first)
        self._count = self._count + bad
        stop = bad if self.skip else self._count > 0
        for buffer, before in zip(self.buffers, self._before, strict=True):
            buffer.copy_(torch.where(stop, before, buffer))
        counts = finite.all() & ~stop
        # The host looks until a step has passed, which creates the optimizer's state.
        if self.scaled:  # the scaler skips such a step
            return True, counts
        if stop.device.type == "cpu" or not self._has_stepped or not getattr(self.optimizer, "_step_supports_amp_scaling", False):
            passes = not bool(stop)
            self._has_stepped |= passes
            return passes, counts
        self.optimizer.found_inf = stop.float()  # type: ignore[attr-defined]
        return True, counts

    def look(self) -> Finding | None:
        """The first bad step since the last look; waits for the device."""
        count = int(self._count) if self._count is not None else 0
        if count == self._seen or self._first is None:
            return None
        bad_steps, self._seen = count - self._seen, count
        step, *rest = self._first.tolist()
        values, flags = rest[: len(self._names)], rest[len(self._names) :]
        what = ", ".join(f"{name} is {value}" for name, value in zip(self._names, values, strict=True) if not isfinite(value))
        return Finding(int(step), what, [bool(flag) for flag in flags], bad_steps)
