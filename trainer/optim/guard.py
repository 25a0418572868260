"""Detects optimizer steps with a non-finite loss or gradient before they change the weights, without waiting for a GPU.

A step is *non-finite* if a term of its loss or its gradient norm is; such a step is *skipped*. It is also *bad*, unless
it is one of the few overflows in a row that are normal while an fp16 gradient scaler searches for its scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.distributed.control import Control

GRADIENTS = "gradient_norm"  # among the values that are checked; the others are terms of the loss

MAX_IDS = 32  # sample ids in a message

ADVICE = (
    "lower optimizer.lr, set train.clip_norm=1.0 or train.precision=fp32, or skip such steps with train.non_finite=skip"
)

# Steps in a row. A gradient scaler starts at 2**16 and halves its scale in each; a scale below 1 is useless.
MAX_OVERFLOWS = 20

SampleIds = Callable[[int, int, int], list[int]]
"""Maps step, micro-batch and rank to the ids of the samples in it."""


class Verdict(NamedTuple):
    """The guard's decision on a step.

    Attributes:
        call_optimizer: whether to call the optimizer. It may still change nothing, if the decision is on the device.
        is_good: bool scalar on the device, whether the step changes the weights.
    """

    call_optimizer: bool
    is_good: Tensor


@dataclass(frozen=True)
class Finding:
    """The steps skipped since the last `Guard.look`, and the first bad one of them.

    Attributes:
        num_skipped: steps skipped since then.
        what: what was not finite, e.g. `loss is nan`; empty if no step was bad.
        step: number of the first bad step, from 0.
        micro_batches: for each micro-batch of this process in that step, 1 if its part of the loss was not finite.
        advice: what a user can do about it; empty if skipping such steps is enough.
    """

    num_skipped: int = 0
    what: str = ""
    step: int = 0
    micro_batches: list[int] = field(default_factory=list)
    advice: str = ""

    def describe(self, sample_ids: SampleIds, control: Control) -> str:
        """A message: the step, what was not finite, and among which samples; all processes must call it."""
        ids = [
            sample_id
            for rank, marks in enumerate(control.gather(self.micro_batches))
            for micro_batch, is_marked in enumerate(marks)
            if is_marked
            for sample_id in sample_ids(self.step, micro_batch, rank)
        ]
        listed = ", ".join(map(str, ids[:MAX_IDS])) + ", …" * (len(ids) > MAX_IDS)
        where = f"among samples {listed}" if ids else "each sample's loss is finite"
        return f"step {self.step + 1}: {self.what} ({where})"


class Guard:
    """Keeps a non-finite step from changing the weights.

    On CPUs the host decides on every step. On GPUs the decision stays on the device: the fused optimizer reads it from
    `found_inf`, the flag that a gradient scaler would set, and the host reads it in `look`, at times when it waits for
    the device anyway. Loss terms and gradients are sums over all processes, so all processes decide alike.

    A step counts as an overflow if there is a gradient scaler and only the gradients are non-finite. Overflows are bad
    only from the `MAX_OVERFLOWS`-th in a row on.

    Args:
        optimizer: the torch optimizer; if it isn't fused, the host decides on every step.
        buffers: of the model; a skipped step restores them.
        skip: whether training continues after a bad step. Otherwise no later step changes the weights either.
        scaled: whether there is a gradient scaler, which then calls the optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, buffers: Iterable[Tensor], skip: bool, scaled: bool) -> None:
        self.optimizer, self.skip, self.scaled = optimizer, skip, scaled
        floating = [buffer for buffer in buffers if buffer.is_floating_point()]
        self._backups = [_Backup(group) for group in _by_dtype(floating)] if skip else []
        self._record: _Record | None = None
        self._has_stepped = False
        self._found_inf: Tensor | None = None  # for the fused optimizer: 1 to change nothing
        optimizer.register_step_pre_hook(self._set_found_inf)

    def begin_step(self) -> None:
        """Backs up the buffers, which a non-finite forward pass would spoil."""
        for backup in self._backups:
            backup.save()

    def judge(self, step: int, values: dict[str, Tensor], parts_finite: list[Tensor]) -> Verdict:
        """Decides on a step, after its backward pass.

        Args:
            step: its number, from 0.
            values: the terms of the loss over all processes, and `gradient_norm`; scalars.
            parts_finite: for each micro-batch a bool scalar, whether this process's part of the loss is finite.
        """
        if self._record is None:
            self._record = _Record(list(values), len(parts_finite), self.scaled, next(iter(values.values())).device)
        non_finite, ever_bad = self._record.add(step, values, parts_finite)
        veto = non_finite if self.skip else non_finite | ever_bad
        decide = self._decide_on_device if self._device_can_decide(veto.device) else self._decide_on_host
        return Verdict(decide(veto), ~veto)

    def look(self) -> Finding:
        """The steps skipped since the last call; waits for the device."""
        return self._record.take("" if self.skip else ADVICE) if self._record else Finding()

    def _device_can_decide(self, device: torch.device) -> bool:
        """Whether the optimizer reads `found_inf`. Not in its first step, which creates state even if vetoed."""
        is_fused = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        return device.type != "cpu" and self._has_stepped and is_fused

    def _decide_on_host(self, veto: Tensor) -> bool:
        """Waits for the veto; returns whether to call the optimizer."""
        self._found_inf = None
        if not bool(veto):
            self._has_stepped = True
            return True
        for backup in self._backups:
            backup.restore()
        # A scaler must be called in any case; without gradients the optimizer that it calls does nothing.
        self.optimizer.zero_grad()
        return self.scaled

    def _decide_on_device(self, veto: Tensor) -> bool:
        """Passes the veto to the optimizer, which is called in any case."""
        for backup in self._backups:
            backup.restore_where(veto)
        self._found_inf = veto.float()
        return True

    def _set_found_inf(self, optimizer: Any, arguments: Any, keywords: Any) -> None:
        """Runs as the optimizer's step begins: after the scaler has set its own flag, which covers only overflows."""
        if self._found_inf is not None:
            optimizer.found_inf = self._found_inf


class _Record:
    """The history of all steps, on the device and in float64; nothing waits for the device before `take`.

    Args:
        names: of the checked values.
        micro_batches: number of micro-batches of this process in a step.
        scaled: whether overflows of the gradients alone are normal.
        device: of the values.
    """

    def __init__(self, names: list[str], micro_batches: int, scaled: bool, device: torch.device) -> None:
        self.names, self.scaled = names, scaled

        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        self._bad, self._skipped = zeros(1), zeros(1)  # number of steps so far
        self._overflows = zeros(1)  # number of steps in a row, up to the last one
        # The first bad step since the last `take`: its number, overflows in a row, values, marks of micro-batches.
        self._first_bad = zeros(2 + len(names) + micro_batches)
        self._seen_bad = self._seen_skipped = 0.0

    def add(self, step: int, values: Mapping[str, Tensor], parts_finite: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Adds a step; returns two bool scalars: whether it is non-finite, and whether any step so far was bad."""
        observed = torch.stack([value.detach().double() for value in values.values()])
        finite = observed.isfinite()
        non_finite = ~finite.all()
        bad = non_finite
        if self.scaled:
            losses_finite = torch.stack([ok for ok, name in zip(finite, values, strict=True) if name != GRADIENTS])
            overflow = non_finite & losses_finite.all()
            self._overflows = (self._overflows + 1) * overflow
            bad = non_finite & ~(overflow & (self._overflows < MAX_OVERFLOWS).all())
        marked = (~torch.stack(parts_finite)).double()
        this_step = torch.cat([torch.full_like(observed[:1], step), self._overflows, observed, marked])
        self._first_bad = torch.where(bad & (self._bad == self._seen_bad), this_step, self._first_bad)
        self._bad, self._skipped = self._bad + bad, self._skipped + non_finite
        return non_finite, (self._bad > 0).squeeze()

    def take(self, advice: str) -> Finding:
        """The steps skipped since the last call; waits for the device."""
        bad, skipped, step, overflows, *rest = torch.cat([self._bad, self._skipped, self._first_bad]).tolist()
        num_skipped, is_bad = int(skipped - self._seen_skipped), bad > self._seen_bad
        self._seen_bad, self._seen_skipped = bad, skipped
        if not is_bad:
            return Finding(num_skipped)
        values, marked = rest[: len(self.names)], rest[len(self.names) :]
        if overflows:
            what = f"the gradients overflow fp16 in {overflows:.0f} steps in a row, at every scale"
            advice = "set train.precision=bf16 or fp32, whose range is wider"
        else:
            named = zip(self.names, values, strict=True)
            what = ", ".join(f"{name} is {value}" for name, value in named if not isfinite(value))
        return Finding(num_skipped, what, int(step), [int(mark) for mark in marked], advice)


def _by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


class _Backup:
    """A copy of tensors of one dtype in one block of memory, so that one call handles all of them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._saved, self._saved_parts = self._block()
        self._current, self._current_parts = self._block()

    def _block(self) -> tuple[Tensor, list[Tensor]]:
        sizes = [tensor.numel() for tensor in self._tensors]
        block = self._tensors[0].new_empty(sum(sizes))
        parts = zip(block.split(sizes), self._tensors, strict=True)
        return block, [part.view(tensor.shape) for part, tensor in parts]

    @torch.no_grad()
    def save(self) -> None:
        torch._foreach_copy_(self._saved_parts, self._tensors)

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_(self._tensors, self._saved_parts)

    @torch.no_grad()
    def restore_where(self, condition: Tensor) -> None:
        """Restores if `condition`, a bool scalar on the device, is true; doesn't wait for it."""
        torch._foreach_copy_(self._current_parts, self._tensors)
        torch.where(condition, self._saved, self._current, out=self._current)
        torch._foreach_copy_(self._tensors, self._current_parts)
