"""What `trainer summary` measures is what a training step does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.processes import RECIPE, run_processes, write_recipe
from tests.scenes import RECIPES
from trainer.data.source import DataInfo
from trainer.losses.loss import Loss
from trainer.profiling import memory
from trainer.recipe.load import load_recipe
from trainer.trainer import Trainer

OPTIONS = ("data.batch_size=4", "train.threads=1")
INFO = {RECIPE: DataInfo(("background", "square"), 255)} | dict.fromkeys(
    RECIPES.values(), DataInfo(("square", "disc", "nothing"), None)
)


@pytest.fixture(autouse=True)
def _backends() -> Iterator[None]:
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


def recorded(act: Callable[[], Any]) -> list[Any]:
    """Of each layer in the order of the first forward pass: kind, mode,
    and dtype and memory layout of what it computes; then the loss's dtype.
    """
    found: list[Any] = []
    seen: set[nn.Module] = set()

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        if module in seen or list(module.children()):
            return
        seen.add(module)
        if isinstance(output, torch.Tensor):
            layout = output.is_contiguous(memory_format=torch.channels_last) if output.dim() == 4 else None
            found.append(
                [type(module).__name__, module.training, str(output.dtype), layout, torch.is_autocast_enabled("cpu")]
            )

    handle = nn.modules.module.register_module_forward_hook(record)
    try:
        act()
    finally:
        handle.remove()
    return found


def _train(recipe: Path, options: tuple[str, ...], out: Path) -> None:
    trainer = Trainer(load_recipe(recipe, (*options, *OPTIONS)))
    trainer.build()
    trainer.batches = trainer.data.train_batches(0)
    memory.set_train_mode(trainer.task.model)
    out.write_text(json.dumps(recorded(trainer.train_step)))


@pytest.mark.parametrize(
    "options",
    [("train.precision=bf16",), ("train.precision=fp32", "train.channels_last=false"), ("train.precision=fp64",)],
)
def test_layers_compute_as_in_training(tmp_path: Path, options: tuple[str, ...]) -> None:
    file = write_recipe(tmp_path)
    run_processes(1, _train, file, options, tmp_path / "layers.json")
    recipe = load_recipe(file, (*options, *OPTIONS))
    measured = recorded(lambda: memory.measure(recipe, INFO[RECIPE], [], 16, 16))
    assert measured == json.loads((tmp_path / "layers.json").read_text())
    bf16 = options == ("train.precision=bf16",)
    assert any(layer[0] == "Conv2d" and (layer[2] == "torch.bfloat16") == layer[4] == bf16 for layer in measured)


@pytest.mark.parametrize("text", [RECIPE, RECIPES["watershed"]])
def test_the_loss_is_moved_to_the_device_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    moved: dict[bool, set[str]] = {True: set(), False: set()}
    to = nn.Module.to

    def record(module: nn.Module, *arguments: Any, **keywords: Any) -> nn.Module:
        moved[isinstance(module, Loss)] |= {
            str(argument) for argument in arguments if isinstance(argument, torch.device)
        }
        return to(module, *arguments, **keywords)

    monkeypatch.setattr(nn.Module, "to", record)
    memory.measure(load_recipe(write_recipe(tmp_path, text), OPTIONS), INFO[text], [], 64, 64)
    assert moved[True] == moved[False] == {"cpu"}


def test_a_step_clips_averages_and_scales_as_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def spy(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            calls.append(name)
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, call)

    for name in ("scale", "unscale_", "step", "update"):
        spy(torch.amp.GradScaler, name)
    spy(memory.Ema, "update")
    spy(memory, "clip_grad_norm_")
    options = (
        "train.precision=fp16",
        "train.ema=0.9",
        "train.clip_norm=1.0",
        "train.accumulate=2",
        "loss=cross_entropy",
    )
    memory.measure(load_recipe(write_recipe(tmp_path), (*options, *OPTIONS)), INFO[RECIPE], [], 16, 16)
    step = ["scale", "scale", "unscale_", "clip_grad_norm_", "step", "update", "update"]
    assert calls[-len(step) * memory.STEPS :] == step * memory.STEPS
