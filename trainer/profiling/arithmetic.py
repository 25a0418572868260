"""The arithmetic of a network, layer by layer: weights, outputs, connections and FLOPs of one image.

- weights: all learnable parameters, biases and the factors of batch norms included;
- outputs: the units that a layer produces;
- connections: for a convolution k² · C_in · C_out / groups for each pixel it produces, for a transposed one for each
  pixel it sees; for pooling its window for each output; for a linear layer in · out; for everything else one an output.
  Biases aren't counted, and borders not subtracted;
- FLOPs: of the forward pass, two for each multiplication and addition, as PyTorch counts them.

Of what a detector looks at region by region, all but the FLOPs are those of one region.
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
        trainable: how many of the weights are trainable.
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
    """All leaf modules in the order in which they are called; best on the meta device, where nothing is computed.

    Args:
        model: takes one batch of images.
        input_shape: (C, H, W) of an image.
    """
    found: list[Layer] = []
    seen: set[nn.Module] = set()
    names = {module: name for name, module in model.named_modules()}
    counter = FlopCounterMode(display=False)
    flops_before: dict[nn.Module, int] = {}

    def before(module: nn.Module, inputs: Any) -> None:
        flops_before[module] = counter.get_total_flops()

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if not isinstance(output, Tensor):  # e.g. anchors: nothing that is computed from weights
            return
        # A layer that is used twice has its weights once.
        own = [] if module in seen else list(module.parameters(recurse=False))
        seen.add(module)
        found.append(
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
    return found


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
    """Writes counts as polynomials of degree 2, exact and compared with the counts at points they weren't derived from.

    Args:
        count: takes the variables by name, returns counts by name.
        variables: name -> values to count at; three or more each.

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
        values = [found[what] for found in counts]
        factors = [round(factor) for factor in np.linalg.lstsq(np.array(rows, float), np.array(values, float))[0]]
        if any(
            sum(factor * each for factor, each in zip(factors, row, strict=True)) != value
            for row, value in zip(rows, values, strict=True)
        ):
            raise ValueError(f"{what} is no polynomial of degree 2 in {', '.join(names)}")
        terms = [_term(factor, monomial) for factor, monomial in zip(factors, monomials, strict=True) if factor]
        texts[what] = " + ".join(reversed(terms)) or "0"
    return texts


def _term(factor: int, monomial: tuple[str, ...]) -> str:
    product = f"{monomial[0]}²" if len(set(monomial)) < len(monomial) else "·".join(monomial)
    return "·".join(part for part in (str(factor) if factor != 1 or not product else "", product) if part)
