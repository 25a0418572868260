"""What a run asks of PyTorch's backends and of a GPU; if there is none, one that is simulated."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.processes import RECIPE, write_recipe
from tests.scenes import RECIPES
from trainer.data.source import DataInfo
from trainer.distributed import accelerator
from trainer.distributed.launch import Launch
from trainer.errors import TrainingFailed, UserError
from trainer.recipe.load import load_recipe
from trainer.recipe.recipe import Recipe
from trainer.tasks.build import build_task, to_device

INFO = DataInfo(("background", "square"), 255)
LOSSES = {"cross_entropy": RECIPE, "focal": RECIPE, "soft_iou": RECIPE, "dice": RECIPE, **RECIPES}
FLAGS = [
    (torch.backends.cuda.matmul, "allow_tf32"),
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cudnn, "benchmark"),
]


@pytest.fixture(autouse=True)
def _backends() -> Iterator[None]:
    """Leaves PyTorch's settings as they were."""
    flags = [getattr(backend, name) for backend, name in FLAGS]
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    for (backend, name), value in zip(FLAGS, flags, strict=True):
        setattr(backend, name, value)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


def recipe_of(folder: Path, text: str = RECIPE, *overrides: str) -> Recipe:
    return load_recipe(write_recipe(folder, text), overrides)


def with_gpu(monkeypatch: pytest.MonkeyPatch, tf32: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: tf32)
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: tf32)


# ------------------------------------------------------------ precision


@pytest.mark.parametrize("gpu", ["none", "Turing"])
def test_tf32_where_there_is_none_is_an_error_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str
) -> None:
    if gpu != "none":
        with_gpu(monkeypatch, tf32=False)
    with pytest.raises(
        UserError,
        match=r"(?s)run\.yaml.*train\.precision.*tf32 needs an NVIDIA GPU of the Ampere generation or later; use fp32 "
        r"or auto",
    ):
        load_recipe(write_recipe(tmp_path, RECIPE.replace("fp64", "tf32")), [], Launch().checks())


@pytest.mark.parametrize(("precision", "expected"), [("tf32", True), ("fp32", False)])
def test_tf32_is_on_for_products_and_convolutions_alike_or_off_for_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, expected: bool
) -> None:
    with_gpu(monkeypatch)
    recipe = load_recipe(write_recipe(tmp_path), [f"train.precision={precision}"], Launch().checks())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not expected
    accelerator.configure_backends(recipe)
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == expected
    # Raises where PyTorch's two interfaces were mixed.
    assert torch.get_float32_matmul_precision() == ("high" if expected else "highest")
    assert (
        to_device(build_task(recipe, INFO), recipe, torch.device("meta"), uniform=True)
        .state_dict()["head.weight"]
        .dtype
        == torch.float32
    )


def test_the_plain_loop_is_measured_with_the_settings_of_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import plain_loop

    with_gpu(monkeypatch)
    recipe = recipe_of(tmp_path, RECIPE, "train.precision=fp32", "train.threads=1")
    found = []
    for configure in (lambda: plain_loop.configure_backends(threads=1), lambda: framework(recipe)):
        for backend, name in FLAGS:
            setattr(backend, name, False)
        configure()
        found.append(
            [getattr(backend, name) for backend, name in FLAGS]
            + [torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()]
        )
    assert found[0] == found[1] == [False, False, True, 1, False]


def framework(recipe: Recipe) -> None:
    accelerator.configure_backends(recipe)
    to_device(build_task(recipe, INFO), recipe, torch.device("meta"), uniform=True)


# ------------------------------------------------------------ placement


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_model_and_loss_are_moved_to_one_device(tmp_path: Path, loss: str, precision: str) -> None:
    is_dense = LOSSES[loss] is RECIPE
    options = (f"loss={loss}",) if is_dense else ()
    recipe = recipe_of(tmp_path, LOSSES[loss], f"train.precision={precision}", *options)
    task = build_task(recipe, INFO if is_dense else DataInfo(("square", "disc", "nothing"), None))
    assert to_device(task, recipe, torch.device("meta"), uniform=True) is task.model
    tensors = [*task.model.state_dict().values(), *task.loss.parameters(), *task.loss.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    weight = next(
        parameter
        for parameter in task.model.parameters()
        if parameter.dim() == 4 and parameter.shape[1] > 1 and parameter.shape[2] > 1
    )
    assert weight.dtype == (torch.float64 if precision == "fp64" else torch.float32)
    assert weight.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------ cudnn.benchmark


CASES = {
    "images of one size": (RECIPE, ("data.augment=[horizontal_flip]",), True, True),
    "images of different sizes": (RECIPE, ("data.augment=[horizontal_flip]",), False, False),
    "a crop": (RECIPE, ("data.augment=[{name: random_crop, size: [16, 16]}, horizontal_flip]",), False, True),
    "mosaics": (RECIPES["detection"], ("data.augment=[{name: mosaic, size: [64, 64]}]",), False, True),
    "a network that resizes its images": (RECIPES["mask_rcnn"], (), True, False),
    "deterministic kernels": (RECIPE, ("train.deterministic=true",), True, False),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_are_searched_only_where_each_step_has_the_same_shapes_and_bits_may_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    text, overrides, uniform, expected = CASES[case]
    with_gpu(monkeypatch)
    recipe = recipe_of(tmp_path, text, *overrides)
    accelerator.configure_backends(recipe)
    torch.backends.cudnn.benchmark = not expected
    to_device(
        build_task(recipe, INFO if text == RECIPE else DataInfo(("square", "disc"), None)),
        recipe,
        torch.device("meta"),
        uniform,
    )
    assert torch.backends.cudnn.benchmark == expected


# ------------------------------------------------------------ what resume promises


@pytest.mark.parametrize(
    ("device", "deterministic", "expected"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)]
)
def test_a_run_resumed_on_a_gpu_logs_what_makes_its_bits_equal(
    device: str, deterministic: bool, expected: bool
) -> None:
    torch.use_deterministic_algorithms(deterministic)
    saved = {"world_size": 1, "threads": torch.get_num_threads()}
    reasons = list(accelerator.why_bits_may_differ(saved, 1, torch.device(device)))
    assert len(reasons) == expected and all("train.deterministic=true" in reason for reason in reasons)
    reasons = list(accelerator.why_bits_may_differ(saved, 2, torch.device(device)))
    assert "saved with 1 processes" in reasons[0] and len(reasons) == 1 + expected


# ------------------------------------------------------------ several processes


@pytest.mark.parametrize("minutes", [0.1, 10, 600])
def test_a_collective_times_out_soon_after_the_time_that_a_rank_may_stall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float
) -> None:
    asked: list[timedelta] = []

    class Recorder:
        num_processes = 1

        def __init__(self, **options: Any) -> None:
            asked.extend(handler.timeout for handler in options["kwargs_handlers"] if hasattr(handler, "timeout"))

    monkeypatch.setattr("accelerate.Accelerator", Recorder)
    accelerator.build_accelerator(recipe_of(tmp_path, RECIPE, f"train.timeout={minutes} minutes"))
    (limit,) = asked
    # The watchdog, which names the rank, comes first.
    assert timedelta(minutes=minutes) + timedelta(seconds=30) <= limit <= timedelta(minutes=minutes + 2)


@pytest.mark.parametrize(
    ("backend", "error", "expected"),
    [
        ("nccl", None, "destroyed"),
        ("nccl", TrainingFailed("x"), "aborted"),
        ("nccl", RuntimeError("x"), "aborted"),
        ("gloo", RuntimeError("x"), "destroyed"),
        (None, RuntimeError("x"), ""),
    ],
)
def test_after_a_failure_nothing_waits_for_a_rank_that_may_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str | None, error: Exception | None, expected: str
) -> None:
    import trainer.trainer
    from trainer.run import train

    class Run:
        def __init__(self, *_: Any) -> None:
            pass

        def fit(self) -> None:
            if error:
                raise error

    ended: list[str] = []
    monkeypatch.setattr(trainer.trainer, "Trainer", Run)
    monkeypatch.setattr(dist, "is_initialized", lambda: backend is not None)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append("destroyed"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: ended.append("aborted"))
    if error:
        with pytest.raises(type(error)):
            train(str(write_recipe(tmp_path)), "auto", [])
    else:
        train(str(write_recipe(tmp_path)), "auto", [])
    assert "".join(ended) == expected
