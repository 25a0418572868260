"""The state of a run as tensors: out of model and optimizer into a checkpoint folder, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.runs.checkpoint import Counters, read_counters, seal


@dataclass
class Checkpoint:
    """The state of a run after `counters["step"]` steps, on the CPU.

    Attributes:
        model: raw weights and buffers.
        ema: averaged ones, where the run has them.
        optimizer: `<parameter name>/<state name>` -> tensor.
        counters: everything else, JSON.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    counters: Counters
    ema: dict[str, Tensor] | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.counters["step"]

    def write(self, folder: Path) -> None:
        """Writes all files into an empty folder and flushes them to disk."""
        tensors = {"model": self.model, "optimizer": self.optimizer} | (
            {"ema": self.ema} if self.ema is not None else {}
        )
        for name, values in tensors.items():
            contiguous = {key: value.contiguous() for key, value in values.items()}
            save_file(contiguous, folder / f"{name}.safetensors", metadata={"format": "pt"})
        seal(folder, self.counters)

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        """Reads a verified checkpoint.

        Raises:
            UserError: it can't be read.
        """
        try:
            ema = folder / "ema.safetensors"
            return cls(
                model=load_file(folder / "model.safetensors"),
                optimizer=load_file(folder / "optimizer.safetensors"),
                counters=read_counters(folder),
                ema=load_file(ema) if ema.exists() else None,
            )
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{folder}: can't be read: {error}") from error

    def restore(
        self,
        model: nn.Module,
        ema: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        names: Mapping[Tensor, str],
    ) -> None:
        """Loads the tensors into model, average and optimizer.

        Raises:
            UserError: they don't fit this model and optimizer.
        """
        try:
            model.load_state_dict(self.model)
            if ema and self.ema:
                ema.load_state_dict(self.ema)
            load_optimizer(optimizer, self.optimizer, names)
        except (RuntimeError, KeyError) as error:
            raise UserError(f"the checkpoint of step {self.step} doesn't fit this model: {str(error)[:300]}") from error


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of weights and buffers on the CPU, in the standard memory layout."""
    return _copies(model.state_dict())


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """A copy of the optimizer's state by parameter name; hyperparameters come from the recipe and aren't stored."""
    return _copies(
        {
            f"{names[parameter]}/{key}": torch.as_tensor(value)
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
            if value is not None
        }
    )


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], names: Mapping[Tensor, str]
) -> None:
    """Restores what `optimizer_tensors` returned.

    State of a parameter's shape gets the parameter's memory layout: fused kernels walk both by address.
    """
    by_name = {name: parameter for parameter, name in names.items()}
    optimizer.state.clear()
    for key, value in tensors.items():
        name, _, state = key.rpartition("/")
        parameter = by_name[name]
        if value.shape == parameter.shape and value.dim():
            optimizer.state[parameter][state] = torch.empty_like(
                parameter, dtype=value.dtype, requires_grad=False
            ).copy_(value)
        else:
            optimizer.state[parameter][state] = value.to(parameter.device)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU; those from a GPU share a block of pinned memory for each dtype,
    and one wait covers them all.
    """
    values = {key: value.detach() for key, value in tensors.items()}
    parts: dict[torch.dtype, Iterator[Tensor]] = {}
    for dtype in {value.dtype for value in values.values() if value.is_cuda}:
        sizes = [value.numel() for value in values.values() if value.is_cuda and value.dtype == dtype]
        parts[dtype] = iter(torch.empty(sum(sizes), dtype=dtype, pin_memory=True).split(sizes))
    copies: dict[str, Tensor] = {}
    for key, value in values.items():
        if value.is_cuda:
            copies[key] = next(parts[value.dtype]).view(value.shape)
            copies[key].copy_(value, non_blocking=True)
        else:
            copies[key] = value.to("cpu", memory_format=torch.contiguous_format, copy=True)
    if parts:
        torch.cuda.current_stream().synchronize()
    return copies
