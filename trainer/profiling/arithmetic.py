"""Counts the weights, outputs, connections and FLOPs of a network for one image, layer by layer.

- weights: all parameters, including biases and the factors of batch norms;
- outputs: the units that a layer produces;
- connections: for a convolution k² · C_in · C_out / groups per output pixel, for a transposed one per input pixel; for
  pooling the size of its window per output; for a linear layer in · out; for any other layer one per output. Biases
  aren't counted, and borders aren't subtracted;
- FLOPs: of the forward pass, two per multiply-add, as PyTorch counts them.

For layers that a detector applies to each region, all but the FLOPs are those of one region.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.flop_counter import FlopCounterMode

_POOLS = (nn.MaxPool2d, nn.AvgPool2d)

_ADAPTIVE_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class Layer:
    """One leaf module of a network.

    Attributes:
        name: its path, e.g. `backbone.layer1.0.conv1`.
        kind: its class.
        shape: of its output for one image, (C, H, W).
        weights, outputs, connections, flops: see this module.
        trainable: number of trainable weights.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    outputs: int
    connections: int
    flops: int
    trainable: int


def layers(model: nn.Module, input_shape: Sequence[int]) -> list[Layer]:
    """All leaf modules in the order they are called; fastest on the meta device, which computes nothing.

    Args:
        model: takes a batch of images.
        input_shape: (C, H, W) of an image.
    """
    called: list[Layer] = []
    seen: set[nn.Module] = set()
    names = {module: name for name, module in model.named_modules()}
    counter = FlopCounterMode(display=False)
    flops_before: dict[nn.Module, int] = {}

    def before(module: nn.Module, inputs: Any) -> None:
        flops_before[module] = counter.get_total_flops()

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if not isinstance(output, Tensor):  # e.g. lists of anchors, which have no weights
            return
        # The weights of a layer that is called twice count once.
        own = [] if module in seen else list(module.parameters(recurse=False))
        seen.add(module)
        called.append(
            Layer(
                name=names[module],
                kind=type(module).__name__,
                shape=tuple(output.shape[1:]),
                weights=sum(parameter.numel() for parameter in own),
                outputs=prod(output.shape[1:]),
                connections=_connections(module, inputs[0], output),
                flops=counter.get_total_flops() - flops_before[module],
                trainable=sum(parameter.numel() for parameter in own if parameter.requires_grad),
            )
        )

    leaves = [module for module in model.modules() if not list(module.children())]
    handles = [
        hook for leaf in leaves for hook in (leaf.register_forward_pre_hook(before), leaf.register_forward_hook(after))
    ]
    was_training = model.training
    device = next(model.parameters()).device
    try:
        with torch.no_grad(), counter:
            model.eval()(torch.zeros(1, *input_shape, device=device))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return called


def _connections(module: nn.Module, input: Tensor, output: Tensor) -> int:
    outputs = prod(output.shape[1:])
    if isinstance(module, _ConvNd):
        at = input if isinstance(module, _ConvTransposeNd) else output
        return prod(module.kernel_size) * module.in_channels * module.out_channels // module.groups * prod(at.shape[2:])
    if isinstance(module, _POOLS):
        side = module.kernel_size
        return outputs * (side * side if isinstance(side, int) else prod(side))
    if isinstance(module, _ADAPTIVE_POOLS):
        return prod(input.shape[1:])
    if isinstance(module, nn.Linear):
        return outputs * module.in_features
    return outputs


def polynomial(count: Callable[..., Mapping[str, int]], variables: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Expresses counts exactly as polynomials of degree 2, fitted to more points than they have coefficients.

    Args:
        count: takes the variables by name, returns counts by name.
        variables: values of each variable at which to count; at least three.

    Raises:
        ValueError: a count isn't such a polynomial.
    """
    names = list(variables)
    monomials = [(), *((name,) for name in names), *itertools.combinations_with_replacement(names, 2)]
    points = [dict(zip(names, values, strict=True)) for values in itertools.product(*variables.values())]
    counts = [count(**point) for point in points]
    rows = [[prod(point[name] for name in monomial) for monomial in monomials] for point in points]
    texts = {}
    for what in counts[0]:
        values = [each[what] for each in counts]
        factors = [round(factor) for factor in np.linalg.lstsq(np.array(rows, float), np.array(values, float))[0]]
        if any(
            sum(factor * each for factor, each in zip(factors, row, strict=True)) != value
            for row, value in zip(rows, values, strict=True)
        ):
            raise ValueError(f"{what} is not a polynomial of degree 2 in {', '.join(names)}")
        terms = [_term(factor, monomial) for factor, monomial in zip(factors, monomials, strict=True) if factor]
        texts[what] = " + ".join(reversed(terms)) or "0"
    return texts


def _term(factor: int, monomial: tuple[str, ...]) -> str:
    product = f"{monomial[0]}²" if len(set(monomial)) < len(monomial) else "·".join(monomial)
    return "·".join(part for part in (str(factor) if factor != 1 or not product else "", product) if part)
