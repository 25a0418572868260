"""N processes compute what one computes: sums that carry gradients, and batch norm over all processes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.errors import UserError
from trainer.signals import STOP, Stopped


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _AddOverProcesses(torch.autograd.Function):
    """The total over processes, with the gradient of the local term alone: the other terms are constants here."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def add_over_processes(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds each tensor over all processes, in one message; gradients flow to this process's term.

    A loss L of the totals has the gradient dL/dS · dS_r/dθ on process r; the sum over r is the gradient one
    process would compute. DDP takes the mean, so the caller multiplies the loss by the number of processes.
    """
    if world_size() == 1:
        return sums
    flat = torch.cat([value.double().reshape(-1) for value in sums.values()])
    parts = _AddOverProcesses.apply(flat).split([value.numel() for value in sums.values()])
    return {key: part.reshape(value.shape).to(value.dtype) for (key, value), part in zip(sums.items(), parts, strict=True)}


def total(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds each tensor over all processes without gradients; integers stay exact."""
    if world_size() == 1:
        return sums
    out: dict[str, Tensor] = {}
    for dtype in sorted({value.dtype for value in sums.values()}, key=str):
        keys = [key for key, value in sums.items() if value.dtype == dtype]
        flat = torch.cat([sums[key].detach().reshape(-1) for key in keys])
        dist.all_reduce(flat)
        for key, part in zip(keys, flat.split([sums[key].numel() for key in keys]), strict=True):
            out[key] = part.reshape(sums[key].shape)
    return {key: out[key] for key in sums}


def joined(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Joins each tensor along its first dimension over all processes, in the order of their ranks; all of it on every one of them."""
    if world_size() == 1:
        return rows
    out: dict[str, Tensor] = {}
    for key, value in rows.items():
        local = torch.tensor([len(value)], device=value.device)
        lengths = torch.empty(world_size(), dtype=torch.int64, device=value.device)
        dist.all_gather_into_tensor(lengths, local)
        longest = int(lengths.max())
        padded = value.new_zeros(longest, *value.shape[1:])
        padded[: len(value)] = value
        gathered = value.new_empty(world_size() * longest, *value.shape[1:])
        if longest:
            dist.all_gather_into_tensor(gathered, padded)
        parts = gathered.split(longest) if longest else [value]
        out[key] = torch.cat([part[:length] for part, length in zip(parts, lengths.tolist(), strict=False)])
    return out


class _Normalize(torch.autograd.Function):
    """Batch norm with the mean and variance of all processes' elements (Ioffe & Szegedy, 2015, over N processes)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [d for d in range(x.dim()) if d != 1]
        wide = x if x.dtype == torch.float64 else x.float()
        if x.numel():
            variance, mean = torch.var_mean(wide, dims, correction=0)
        else:  # this process alone may have nothing, e.g. no region with an object: nan would reach all others
            variance = mean = torch.zeros(x.shape[1], dtype=wide.dtype, device=x.device)
        count = torch.full_like(mean[:1], x.numel() // x.shape[1])
        local = torch.cat([count, mean, variance])
        gathered = torch.empty(world_size() * local.numel(), dtype=local.dtype, device=local.device)
        dist.all_gather_into_tensor(gathered, local)
        counts, means, variances = gathered.view(world_size(), -1).split([1, x.shape[1], x.shape[1]], dim=1)
        elements = counts.sum().clamp(min=1)
        mean = (counts * means).sum(0) / elements
        variance = (counts * (variances + (means - mean) ** 2)).sum(0) / elements  # Chan et al., 1979
        ctx.save_for_backward(x, weight, mean, variance, elements)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, elements)
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps), mean, variance, elements

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, variance, elements = ctx.saved_tensors
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        wide = gradient.to(mean.dtype)
        inverse = torch.rsqrt(variance + ctx.eps)
        normalized = (x.to(mean.dtype) - mean.view(shape)) * inverse.view(shape)
        local = torch.cat([wide.sum(dims), (wide * normalized).sum(dims)])
        summed = local.clone()
        dist.all_reduce(summed)
        mean_gradient, mean_product = (summed / elements).chunk(2)
        scale = inverse if weight is None else inverse * weight.to(mean.dtype)
        into = (wide - mean_gradient.view(shape) - normalized * mean_product.view(shape)) * scale.view(shape)
        for_bias, for_weight = local.chunk(2)
        if weight is None:
            return into.to(x.dtype), None, None, None
        return into.to(x.dtype), for_weight.to(weight.dtype), for_bias.to(weight.dtype), None


class GlobalBatchNorm(_BatchNorm):
    """Batch norm that learns from the whole micro-batch over all processes; on CPUs and GPUs alike.

    Its parameters, buffers and keys are those of the module it replaces; in eval mode it is that module.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        """Normalises (B, C, …) over everything but C."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        output, mean, variance, elements = _Normalize.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                unbiased = variance * (elements / (elements - 1).clamp(min=1))
                for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                    running.lerp_(new.to(running.dtype), momentum * (elements > 1).to(running.dtype))  # nothing is learnt from nothing
        return output


def use_global_batch_norm(model: nn.Module) -> None:
    """Makes every batch norm of `model` a `GlobalBatchNorm`, in place: parameters, buffers and hooks stay."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = GlobalBatchNorm


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
        """Rank 0 decides and tells the others; where it can't, all end with its error. A stop signal to it interrupts it.

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

    def _reduce(self, tensor: Tensor, operation: Any) -> Any:
        if world_size() > 1:
            dist.all_reduce(tensor, operation, group=self._group)
        return tensor.tolist()
