"""Sums and batch norm over processes equal those of one process on the whole batch.

The assertions stand in the functions that the processes run; `run_processes` raises where one of them fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from tests.processes import run_processes
from trainer.distributed.batch_norm import use_global_batch_norm
from trainer.distributed.control import Control
from trainer.distributed.reduce import add_over_processes, joined, total


def _data(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 5, 5, generator=generator, dtype=dtype) * 3 + 1, torch.randn(
        8, 3, 5, 5, generator=generator, dtype=dtype
    )


def _batch_norm(out: Path) -> None:
    rank, world_size = Accelerator(cpu=True).process_index, dist.get_world_size()
    images, weights = _data(torch.float64)
    for channels_last in (False, True):
        for affine, momentum in ((True, 0.1), (False, None)):
            whole, part = (nn.BatchNorm2d(3, affine=affine, momentum=momentum, dtype=torch.float64) for _ in range(2))
            use_global_batch_norm(part)
            x = images.clone().requires_grad_()
            share = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
            y = (
                images[share]
                .clone()
                .to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
                .requires_grad_()
            )
            for _ in range(2):
                (whole(x) * weights).sum().backward()
                (part(y) * weights[share]).sum().backward()
            torch.testing.assert_close(y.grad, x.grad[share], rtol=1e-12, atol=1e-12)
            for key, value in whole.state_dict().items():
                torch.testing.assert_close(part.state_dict()[key], value, rtol=1e-12, atol=1e-12)
            for mine, expected in zip(part.parameters(), whole.parameters(), strict=True):
                torch.testing.assert_close(total({"g": mine.grad})["g"], expected.grad, rtol=1e-12, atol=1e-12)
            part.eval(), whole.eval()
            torch.testing.assert_close(part(images), whole(images))


def _batch_norm_of_nothing(out: Path) -> None:
    """Rank 0 has no element at first, and at last nobody has."""
    rank = Accelerator(cpu=True).process_index
    images, _ = _data(torch.float64)
    whole, part = (nn.BatchNorm2d(3, dtype=torch.float64) for _ in range(2))
    use_global_batch_norm(part)
    whole(images).square().sum().backward()
    x = (images if rank else images[:0]).clone().requires_grad_()
    found = part(x)
    assert found.shape == x.shape
    found.square().sum().backward()
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(part.state_dict()[key], value, rtol=1e-12, atol=1e-12)
    for mine, expected in zip(part.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(total({"g": mine.grad})["g"], expected.grad, rtol=1e-12, atol=1e-9)
    before = part.running_var.clone()
    part(images[:0])
    assert torch.equal(part.running_var, before) and part.running_mean.isfinite().all()


def test_a_process_without_elements_disturbs_no_other(tmp_path: Path) -> None:
    run_processes(2, _batch_norm_of_nothing, tmp_path)


def _joined(out: Path) -> None:
    rank = Accelerator(cpu=True).process_index
    numbers = torch.arange(2 * rank, dtype=torch.float64).view(rank, 2) + 10 * rank
    rows = {"a": numbers, "b": torch.full((3 - rank,), rank, dtype=torch.uint8), "c": torch.zeros(0, 4)}
    found = joined(rows)
    assert found["a"].tolist() == [[10, 11], [20, 21], [22, 23]] and found["a"].dtype == torch.float64
    assert found["b"].tolist() == [0, 0, 0, 1, 1, 2] and found["b"].dtype == torch.uint8
    assert found["c"].shape == (0, 4)


def test_rows_of_all_processes_are_joined_in_the_order_of_the_ranks(tmp_path: Path) -> None:
    run_processes(3, _joined, tmp_path)


@pytest.mark.parametrize("world_size", [2, 4])
def test_batch_norm_over_processes_is_batch_norm_of_the_whole_batch(tmp_path: Path, world_size: int) -> None:
    """Values, gradients of inputs and parameters, running statistics; in both memory formats."""
    run_processes(world_size, _batch_norm, tmp_path)


def _half_precision(out: Path) -> None:
    Accelerator(cpu=True)
    images, _ = _data(torch.float32)
    norm = nn.BatchNorm2d(3)
    use_global_batch_norm(norm)
    with torch.autocast("cpu", torch.bfloat16):
        result = norm(images.bfloat16())
    result.sum().backward()
    assert result.dtype == torch.bfloat16 and norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(result.float(), F.batch_norm(images, None, None, training=True), rtol=0.02, atol=0.02)


def test_batch_norm_keeps_bf16_activations_and_fp32_statistics(tmp_path: Path) -> None:
    run_processes(2, _half_precision, tmp_path)


def _ratio(out: Path) -> None:
    """The gradient of a ratio of sums, averaged as DDP does."""
    rank, world_size = Accelerator(cpu=True).process_index, dist.get_world_size()
    parameter = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    data = torch.arange(8, dtype=torch.float64)

    def sums(part: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": (part * parameter[0]).sin().sum(), "b": (part[:, None] * parameter).square().sum(0)}

    def loss(found: dict[str, torch.Tensor]) -> torch.Tensor:
        return found["a"] / found["b"].sum()

    (expected,) = torch.autograd.grad(loss(sums(data)), parameter)
    value = loss(add_over_processes(sums(data[rank::world_size])))
    torch.testing.assert_close(value, loss(sums(data)), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(value * world_size, parameter)
    torch.testing.assert_close(total({"g": gradient})["g"] / world_size, expected, rtol=1e-12, atol=1e-15)


def test_a_ratio_of_sums_has_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    run_processes(4, _ratio, tmp_path)


def _control(out: Path) -> None:
    rank = Accelerator(cpu=True).process_index
    control = Control()
    assert control.maximum([float(rank), -float(rank)]) == [2.0, 0.0]
    assert control.from_main([rank + 7]) == [7]
    assert control.text_from_main("über" if rank == 0 else "something else") == "über"
    assert control.text_from_main("" if rank == 0 else "x") == ""
    assert control.sum([2**61 - 1])[0] % 2**61 == (3 * (2**61 - 1)) % 2**61
    assert control.union([[7, 0], [], [3, 7, 5]][rank]) == [0, 3, 5, 7] and control.union([]) == []
    counts = total({"counts": torch.tensor([rank, 2**60]), "mass": torch.tensor(0.5, dtype=torch.float64)})
    assert counts["counts"].tolist() == [3, 3 * 2**60] and counts["counts"].dtype == torch.int64
    assert counts["mass"].item() == 1.5


def test_control_messages_and_integer_sums_are_exact(tmp_path: Path) -> None:
    run_processes(3, _control, tmp_path)
