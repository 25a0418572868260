"""Optimizers of a recipe: `optimizer: {name: adamw, lr: 1e-3}`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import nn

from trainer.components import FractionBelowOne, optimizer


@optimizer()
def sgd(
    parameters: Iterable[nn.Parameter],
    /,
    *,
    lr: PositiveFloat,
    momentum: FractionBelowOne = 0.9,
    weight_decay: NonNegativeFloat = 0.0,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum.

    Args:
        parameters: what is trained.
        lr: learning rate, which the schedule's factor multiplies.
        momentum: share of the last step that is added to the next.
        weight_decay: strength of an L2 term in the gradient.
        nesterov: whether the momentum is Nesterov's.
    """
    optimizer = torch.optim.SGD(
        parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True
    )
    if momentum:
        # Otherwise the first step creates it, uninitialised if the guard skips that step.
        for parameter in optimizer.param_groups[0]["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    return optimizer


@optimizer()
def adam(
    parameters: Iterable[nn.Parameter],
    /,
    *,
    lr: PositiveFloat,
    beta1: FractionBelowOne = 0.9,
    beta2: FractionBelowOne = 0.999,
    eps: float = 1e-8,
    weight_decay: NonNegativeFloat = 0.0,
) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba, 2015); `weight_decay` is an L2 term in the gradient.

    Args:
        parameters: what is trained.
        lr: learning rate, which the schedule's factor multiplies.
        beta1: decay of the mean of the gradients.
        beta2: decay of the mean of their squares.
        eps: added to the denominator.
        weight_decay: strength of an L2 term in the gradient.
    """
    return torch.optim.Adam(parameters, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, fused=True)


@optimizer()
def adamw(
    parameters: Iterable[nn.Parameter],
    /,
    *,
    lr: PositiveFloat,
    beta1: FractionBelowOne = 0.9,
    beta2: FractionBelowOne = 0.999,
    eps: float = 1e-8,
    weight_decay: NonNegativeFloat = 0.01,
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019).

    Args:
        parameters: what is trained.
        lr: learning rate, which the schedule's factor multiplies.
        beta1: decay of the mean of the gradients.
        beta2: decay of the mean of their squares.
        eps: added to the denominator.
        weight_decay: how fast weights decay, times the learning rate.
    """
    return torch.optim.AdamW(parameters, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, fused=True)
