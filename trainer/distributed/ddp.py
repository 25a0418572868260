"""Distributed data parallel training: wraps the model, and prepares its first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from trainer.distributed.reduce import world_size

if TYPE_CHECKING:
    from accelerate import Accelerator


def wrap(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Wraps the model for training: in autocast, and in DDP if there are several processes."""
    if world_size() == 1:
        alone: nn.Module = accelerator.prepare_model(model, evaluation_mode=True)
        return alone
    wrapped: nn.Module = accelerator.prepare_model(model)
    # Trainable batch norms use the statistics of all processes and frozen ones don't change, so buffers stay equal.
    # The constructor's argument of this name is deprecated in torch 2.15; older versions and Accelerate don't know its
    # successor.
    wrapped.broadcast_buffers = False  # type: ignore[assignment]
    return wrapped


def rehearse(model: nn.Module, forward_backward: Callable[[], Any]) -> None:
    """Runs one forward and backward pass and undoes its effects on the model.

    DDP sends gradients in buckets, which it rebuilds after the first backward pass. With three or more processes the
    new buckets sum gradients in another order, so the first step of a resumed run would differ from the same step of an
    uninterrupted one.

    Args:
        model: the unwrapped model.
        forward_backward: runs both passes on any micro-batch.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    forward_backward()
    model.zero_grad()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
