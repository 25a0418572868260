"""Fine-tuning: some layers are trainable, the rest is frozen and stays bit-identical."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trainer.models.layers import check_layers, is_below


def train_only(model: nn.Module, layers: Sequence[str]) -> None:
    """Freezes every parameter that isn't below one of `layers`; with no layers nothing is frozen.

    Args:
        model: on any device, meta too.
        layers: paths of modules, e.g. `classifier.4`.

    Raises:
        ValueError: a layer doesn't exist; the message names those with the most similar names.
    """
    check_layers(model, layers, "model.train_only")
    if layers:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_below(name, layers))


def layers_after(model: nn.Module, count: int) -> list[str]:
    """The layers that are trainable if the first `count` are frozen, in a model whose layers are numbered: `model.0`,
    `model.1`, …

    Raises:
        ValueError: the model doesn't number its layers, or has no more than `count`.
    """
    numbered = getattr(model, "model", None)
    if not isinstance(numbered, nn.ModuleList | nn.Sequential):
        raise ValueError(
            "train.freeze: this model doesn't number its layers; name the trainable ones in model.train_only"
        )
    if count >= len(numbered):
        raise ValueError(
            f"train.freeze: the model has {len(numbered)} layers, so at most {len(numbered) - 1} can be frozen"
        )
    return [f"model.{index}" for index in range(count, len(numbered))]


def set_train_mode(model: nn.Module) -> None:
    """Puts trainable modules into training mode and frozen ones into evaluation mode.

    Frozen parameters alone don't make a frozen layer: in training mode a batch norm would still update its running
    statistics, and a dropout would disturb features that no longer adapt to it. A module is in training mode if one of
    its parameters is trainable; one without parameters (dropout) if all parameters of the module it is part of are.
    Only `requires_grad` decides, so wrappers around the model (DDP, compile) don't matter.
    """
    _set_mode(model, trainable=True)


def _set_mode(module: nn.Module, trainable: bool) -> None:
    flags = [parameter.requires_grad for parameter in module.parameters()]
    if flags:
        trainable = all(flags)
    module.training = any(flags) or trainable
    for child in module.children():
        _set_mode(child, trainable)
