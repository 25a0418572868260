"""Steps whose loss or gradients are not finite: noticed before the optimizer steps, without waiting for a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from trainer.data.build import Data
from trainer.distributed.control import Control

GRADIENTS = "gradient_norm"

MAX_IDS = 32  # listed in a message

ADVICE = (
    "lower optimizer.lr, set train.clip_norm=1.0 or train.precision=fp32, or leave such steps out with "
    "train.non_finite=skip"
)

# Steps in a row: a gradient scaler halves its scale in each, and starts at 2**16; below 1 it is of no use.
MAX_OVERFLOWS = 20


@dataclass(frozen=True)
class Finding:
    """The steps skipped since the guard was last looked at, and the first bad one of them.

    Attributes:
        step: its number, from 0.
        what: what was not finite, e.g. `loss is nan`; empty where gradients overflowed fp16 and nothing else happened:
            a gradient scaler finds its scale that way.
        micro_batches: for each micro-batch of this process, whether its own share of the loss was not finite.
        count: steps skipped since the last look.
        advice: what a user can do about it; empty where bad steps are skipped anyway.
    """

    step: int
    what: str
    micro_batches: list[bool]
    count: int
    advice: str

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
        listed = (
            f"among samples {', '.join(map(str, ids[:MAX_IDS]))}{', …' if len(ids) > MAX_IDS else ''}"
            if ids
            else "each sample's loss is finite"
        )
        return f"step {self.step + 1}: {self.what} ({listed})"


class Guard:
    """Keeps a bad step from changing the weights.

    On CPUs the host looks at every step. On GPUs the flag stays on the device, where the fused optimizer reads it as
    the one a gradient scaler would set (`found_inf`), and the host learns of it when it waits for the device anyway.
    Loss terms and gradients are sums over all processes, so all come to the same judgement.

    A gradient scaler of fp16 tries scales that make gradients overflow; such steps are skipped and not bad, unless
    there are `MAX_OVERFLOWS` in a row.

    Args:
        optimizer: the torch optimizer; one that isn't fused makes the host look at every step.
        buffers: of the model; a skipped step leaves them as they were.
        skip: whether training continues after a bad step. Otherwise no later step changes the weights either.
        scaled: whether there is a gradient scaler, which calls the optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, buffers: Iterable[Tensor], skip: bool, scaled: bool) -> None:
        self.optimizer, self.skip, self.scaled = optimizer, skip, scaled
        self._buffers = (
            [_Kept(group) for group in _by_dtype(buffer for buffer in buffers if buffer.is_floating_point())]
            if skip
            else []
        )
        self._state: Tensor | None = None  # bad steps so far, skipped ones, overflows in a row; float64, on the device
        # Of the bad ones since the last look: step, overflows, values, flags of the micro-batches.
        self._first: Tensor | None = None
        self._names: list[str] = []
        self._seen_bad, self._seen_skipped, self._has_stepped = 0.0, 0.0, False
        self._flag: Tensor | None = None  # for the fused optimizer: 1 where it is to change nothing
        optimizer.register_step_pre_hook(self._hand_over_flag)

    def begin_step(self) -> None:
        """Remembers what a bad forward pass would spoil."""
        for buffers in self._buffers:
            buffers.keep()

    def passes(self, step: int, values: dict[str, Tensor], finite_shares: list[Tensor]) -> tuple[bool, Tensor]:
        """Judges a step after its backward pass.

        Args:
            step: its number, from 0.
            values: the terms of the loss over all processes, and `gradient_norm`; scalars.
            finite_shares: for each micro-batch a bool scalar, whether this process's sums are finite.

        Returns:
            Whether the host is to call the optimizer, and a bool scalar on the device: whether the step counts.
        """
        self._names = list(values)
        found = torch.stack([value.detach().double() for value in values.values()])
        if self._state is None or self._first is None:
            self._state = torch.zeros(3, dtype=found.dtype, device=found.device)
            self._first = torch.zeros(2 + len(found) + len(finite_shares), dtype=found.dtype, device=found.device)
        finite = found.isfinite()
        broken = ~finite.all()
        bad, overflows = broken, torch.zeros_like(found[:1])
        if self.scaled:
            overflow = (
                broken & torch.stack([ok for ok, name in zip(finite, values, strict=True) if name != GRADIENTS]).all()
            )
            overflows = (self._state[2:] + 1) * overflow
            bad = broken & ~(overflow & (overflows < MAX_OVERFLOWS).all())
        report = torch.cat([torch.full_like(overflows, step), overflows, found, (~torch.stack(finite_shares)).double()])
        self._first = torch.where(bad & (self._state[0] == self._seen_bad), report, self._first)
        self._state = torch.cat([self._state[:2] + torch.stack([bad, broken]), overflows])
        stop = broken if self.skip else broken | (self._state[0] > 0)
        # The host looks until a step has passed, which creates the optimizer's state.
        if (
            stop.device.type == "cpu"
            or not self._has_stepped
            or not getattr(self.optimizer, "_step_supports_amp_scaling", False)
        ):
            self._flag = None
            passes = not bool(stop)
            self._has_stepped |= passes
            if not passes:
                for buffers in self._buffers:
                    buffers.put_back()
                # A scaler has to be called in any case, and calls an optimizer with nothing to do.
                self.optimizer.zero_grad()
            return passes or self.scaled, ~stop
        for buffers in self._buffers:
            buffers.put_back_where(stop)
        self._flag = stop.float()
        return True, ~stop

    def _hand_over_flag(self, optimizer: Any, arguments: Any, keywords: Any) -> None:
        """Called when the optimizer begins to step: a scaler has set its own flag before,
        which knows of overflows alone.
        """
        if self._flag is not None:
            optimizer.found_inf = self._flag

    def look(self) -> Finding | None:
        """What was skipped since the last look; waits for the device."""
        if self._state is None or self._first is None:
            return None
        bad, skipped, _, step, overflows, *rest = torch.cat([self._state, self._first]).tolist()
        count, is_bad = int(skipped - self._seen_skipped), bad > self._seen_bad
        self._seen_bad, self._seen_skipped = bad, skipped
        if not count:
            return None
        values, flags = rest[: len(self._names)], rest[len(self._names) :]
        what = (
            ", ".join(
                f"{name} is {value}" for name, value in zip(self._names, values, strict=True) if not isfinite(value)
            )
            if is_bad
            else ""
        )
        advice = "" if self.skip else ADVICE
        if is_bad and overflows:
            what = f"the gradients overflow fp16 in {overflows:.0f} steps in a row, at every scale"
            advice = "set train.precision=bf16 or fp32, whose range is wider"
        return Finding(int(step), what, [bool(flag) for flag in flags], count, advice)


def _by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


class _Kept:
    """A copy of tensors of one dtype, in one block of memory:
    it takes as many calls to make or to use as for a single tensor.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._copy, self._copies = self._block()
        self._current, self._currents = self._block()

    def _block(self) -> tuple[Tensor, list[Tensor]]:
        block = self._tensors[0].new_empty(sum(tensor.numel() for tensor in self._tensors))
        parts = block.split([tensor.numel() for tensor in self._tensors])
        return block, [part.view(tensor.shape) for part, tensor in zip(parts, self._tensors, strict=True)]

    @torch.no_grad()
    def keep(self) -> None:
        torch._foreach_copy_(self._copies, self._tensors)

    @torch.no_grad()
    def put_back(self) -> None:
        torch._foreach_copy_(self._tensors, self._copies)

    @torch.no_grad()
    def put_back_where(self, condition: Tensor) -> None:
        """Decided on the device, by a bool scalar there."""
        torch._foreach_copy_(self._currents, self._tensors)
        torch.where(condition, self._copy, self._current, out=self._current)
        torch._foreach_copy_(self._tensors, self._currents)
