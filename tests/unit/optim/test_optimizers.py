"""Every optimizer of a recipe takes the steps of its formula, weight decay and all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from trainer.components import catalogue

LR = 0.1
Formula = Callable[[np.ndarray, list[np.ndarray]], np.ndarray]


def sgd(momentum: float = 0.9, weight_decay: float = 0.0, nesterov: bool = False) -> Formula:
    def steps(weight: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
        velocity = np.zeros_like(weight)
        for gradient in gradients:
            gradient = gradient + weight_decay * weight
            velocity = momentum * velocity + gradient
            weight = weight - LR * (gradient + momentum * velocity if nesterov else velocity)
        return weight

    return steps


def adam(weight_decay: float, decoupled: bool, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Formula:
    def steps(weight: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
        mean, square = np.zeros_like(weight), np.zeros_like(weight)
        for step, gradient in enumerate(gradients, start=1):
            if decoupled:
                weight = weight * (1 - LR * weight_decay)
            else:
                gradient = gradient + weight_decay * weight
            mean, square = beta1 * mean + (1 - beta1) * gradient, beta2 * square + (1 - beta2) * gradient**2
            weight = weight - LR * (mean / (1 - beta1**step)) / (np.sqrt(square / (1 - beta2**step)) + eps)
        return weight

    return steps


@pytest.mark.parametrize(
    ("name", "settings", "formula"),
    [
        ("sgd", {}, sgd()),
        ("sgd", {"momentum": 0.0}, sgd(momentum=0.0)),
        ("sgd", {"momentum": 0.5, "weight_decay": 0.3}, sgd(0.5, 0.3)),
        ("sgd", {"momentum": 0.5, "weight_decay": 0.3, "nesterov": True}, sgd(0.5, 0.3, nesterov=True)),
        ("adam", {}, adam(0.0, decoupled=False)),
        ("adam", {"weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3}, adam(0.3, False, 0.8, 0.9, 1e-3)),
        ("adamw", {}, adam(0.01, decoupled=True)),
        ("adamw", {"weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3}, adam(0.3, True, 0.8, 0.9, 1e-3)),
    ],
)
def test_steps_are_those_of_the_formula(name: str, settings: dict[str, Any], formula: Formula) -> None:
    random = np.random.default_rng(0)
    start, gradients = random.normal(size=5), [random.normal(size=5) for _ in range(4)]
    weight = torch.tensor(start, requires_grad=True)
    component = catalogue("optimizer")[name]
    optimizer = component.build(dict(component.schema(lr=LR, **settings)), parameters=[weight])
    for gradient in gradients:
        weight.grad = torch.from_numpy(gradient)
        optimizer.step()
    assert weight.tolist() == pytest.approx(formula(start, gradients).tolist(), rel=1e-9)
