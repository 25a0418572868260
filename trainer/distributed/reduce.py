"""Sums over processes, with gradients, so that N processes compute what one computes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
    return {
        key: part.reshape(value.shape).to(value.dtype) for (key, value), part in zip(sums.items(), parts, strict=True)
    }


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
    """Concatenates each tensor along its first dimension over all processes, in the order of their ranks;
    every process gets the result.
    """
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
