"""Measures the memory and time of training steps."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.operations import convert_to_fp32
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from trainer.data.source import DataInfo
from trainer.distributed.accelerator import resolve_precision
from trainer.errors import UserError
from trainer.models.freeze import set_train_mode, train_only
from trainer.optim.ema import Ema
from trainer.recipe.recipe import Recipe
from trainer.tasks.build import build_task, to_device

STEPS = 3

MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Cost:
    """The cost of one training step.

    Attributes:
        trainable: number of trainable parameters.
        saved_bytes: activations that the forward pass of a micro-batch saves for the backward pass, each storage once.
        gradient_bytes, optimizer_bytes: gradients and optimizer state of the trainable parameters.
        peak_bytes: peak memory of the device, above what was in use before the model was built; None if the system
            doesn't report it.
        flops: of the forward and backward passes of a step.
        seconds: per step, the median of three.
    """

    trainable: int
    saved_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    peak_bytes: int | None
    flops: int
    seconds: float


def measure(recipe: Recipe, info: DataInfo, layers: list[str], height: int, width: int) -> Cost:
    """Trains a new model for a few steps as the recipe describes, but in one process, without `compile`, and with only
    `layers` trainable (empty: all).

    A step is `data.batch_size` synthetic samples in `train.accumulate` micro-batches.

    Raises:
        UserError: out of memory.
    """
    try:
        return _measure(recipe, info, layers, height, width)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(
            f"out of memory with {height}x{width} pixels and {recipe.data.batch_size // recipe.train.accumulate} "
            "samples at once: lower data.batch_size, raise train.accumulate, set a smaller --input-size, or skip the "
            "measurement with --no-measure"
        ) from error


def _measure(recipe: Recipe, info: DataInfo, layers: list[str], height: int, width: int) -> Cost:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = _start_peak(device)
    task = build_task(recipe, info)
    model = to_device(task, recipe, device, uniform=True)
    train_only(model.requires_grad_(True), layers)
    set_train_mode(model)
    precision = resolve_precision(recipe.train.precision)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ema = Ema(model, recipe.train.ema) if recipe.train.ema else None
    optimizer = recipe.build("optimizer", parameters=trainable)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    batch = _synthetic_batch(recipe, info, height, width, device)
    saved: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def forward(*inputs: Any) -> Any:
        with torch.autocast(device.type, MIXED.get(precision), enabled=precision in MIXED):
            return convert_to_fp32(model(*inputs))

    def loss_of_micro_batch() -> Tensor:
        return task.loss.combine(task.loss_sums(forward, batch))["loss"]

    def update() -> None:
        scaler.unscale_(optimizer)
        if recipe.train.clip_norm:
            clip_grad_norm_(trainable, recipe.train.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if ema:
            ema.update(1)

    def step() -> None:
        for _ in range(recipe.train.accumulate):
            scaler.scale(loss_of_micro_batch()).backward()
        update()

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss = loss_of_micro_batch()
        saved_bytes = sum(saved.values())
        scaler.scale(loss).backward()
    gradient_bytes = sum(
        parameter.grad.untyped_storage().nbytes() for parameter in trainable if parameter.grad is not None
    )
    del loss
    saved.clear()
    update()
    seconds = [_timed(step, device) for _ in range(STEPS)]
    state_bytes = sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )
    peak = _peak(device)
    return Cost(
        trainable=sum(parameter.numel() for parameter in trainable),
        saved_bytes=saved_bytes,
        gradient_bytes=gradient_bytes,
        optimizer_bytes=state_bytes,
        peak_bytes=None if peak is None or before is None else peak - before,
        flops=recipe.train.accumulate * counter.get_total_flops(),
        seconds=statistics.median(seconds),
    )


def _synthetic_batch(recipe: Recipe, info: DataInfo, height: int, width: int, device: torch.device) -> dict[str, Any]:
    """A micro-batch of noise with the fields the task needs; each image has one object in each quarter."""
    size = recipe.data.batch_size // recipe.train.accumulate
    quarters = (
        torch.tensor(
            [[x * width, y * height, (x + 1) * width, (y + 1) * height] for y in (0, 1) for x in (0, 1)], device=device
        )
        / 2
    )
    rows, columns = (torch.arange(side, device=device) for side in (height, width))
    inside = [
        (columns >= left) & (columns < right) & (rows[:, None] >= top) & (rows[:, None] < bottom)
        for left, top, right, bottom in quarters
    ]
    objects = {
        "boxes": quarters.repeat(size, 1),
        "labels": torch.randint(0, info.num_classes, (4 * size,), device=device),
        "crowd": torch.zeros(4 * size, dtype=torch.bool, device=device),
        "image_index": torch.arange(size, device=device).repeat_interleave(4),
        "height": torch.full((size,), height),
        "width": torch.full((size,), width),
    }
    makers = {
        "image": lambda: torch.randint(0, 256, (size, 3, height, width), dtype=torch.uint8, device=device),
        "mask": lambda: torch.randint(0, info.num_classes, (size, 1, height, width), dtype=torch.uint8, device=device),
        "label": lambda: torch.randint(0, info.num_classes, (size,), device=device),
        "masks": lambda: torch.stack(inside).to(torch.uint8).repeat(size, 1, 1),
    }
    fields = recipe.components["task"].fields
    batch = {name: makers[name]() for name in fields if name in makers}
    return batch | (objects if "boxes" in fields else {})


def _timed(step: Any, device: torch.device) -> float:
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _start_peak(device: torch.device) -> int | None:
    """Bytes in use now; resets the recorded peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    gc.collect()
    # glibc: returns freed memory to the system, which would otherwise count as in use.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux resets the peak of the process
    except OSError:
        return None
    return _status("VmRSS")


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
