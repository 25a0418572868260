"""What keeps a bad step from changing the weights,
where a gradient scaler has its own opinion and where the host must not wait.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.metrics.means import Means
from trainer.optim.guard import GRADIENTS, MAX_OVERFLOWS, Finding, Guard

INF, NAN = float("inf"), float("nan")


class OnDevice(Tensor):
    """A tensor on the CPU whose flags, bools, claim to be on a GPU."""

    @property
    def device(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(type="cuda") if self.dtype == torch.bool else Tensor.device.__get__(self)


class Scaled:
    """One weight trained as fp16 is: a scaler, an optimizer and the guard; a step is its loss and its gradient.

    `on_device` plays a GPU on the CPU; `device` may be a real one.
    """

    def __init__(
        self,
        optimizer: type[torch.optim.Optimizer],
        fused: bool,
        skip: bool,
        on_device: bool = False,
        device: str = "cpu",
    ) -> None:
        self.weight = nn.Parameter(torch.ones(3, device=device))
        self.optimizer = optimizer([self.weight], lr=0.1, fused=fused)  # type: ignore[call-arg]
        self.scaler = torch.amp.GradScaler(device)
        self.scaler.scale(torch.ones((), device=device))  # creates the scale
        self.guard = Guard(self.optimizer, [], skip=skip, scaled=True)
        self.means, self.on_device, self.number = Means(), on_device, 0

    def step(self, loss: float, gradient: float) -> bool:
        """Returns whether it changed the weight."""
        before = self.weight.tolist()
        self.guard.begin_step()
        self.weight.grad = torch.full_like(self.weight, gradient * self.scaler.get_scale())
        self.scaler.unscale_(self.optimizer)
        terms = {"loss": torch.tensor(loss, device=self.weight.device), GRADIENTS: self.weight.grad.norm()}
        if self.on_device:
            terms = {name: term.as_subclass(OnDevice) for name, term in terms.items()}
        passes, counts = self.guard.judge(self.number, terms, [terms["loss"].as_subclass(Tensor).isfinite()])
        assert passes, "without this call the scaler would never be updated"
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.means.add({name: term.as_subclass(Tensor) for name, term in terms.items()}, counts.as_subclass(Tensor))
        self.number += 1
        return self.weight.tolist() != before


KINDS = [
    (torch.optim.AdamW, True, True),
    (torch.optim.SGD, True, True),
    (torch.optim.AdamW, True, False),
    (torch.optim.AdamW, False, False),
]


@pytest.mark.parametrize(("optimizer", "fused", "on_device"), KINDS)
def test_with_fp16_no_later_step_changes_the_weights_that_the_message_reports_as_unchanged(
    optimizer: Any, fused: bool, on_device: bool
) -> None:
    run = Scaled(optimizer, fused, skip=False, on_device=on_device)
    assert run.step(1.0, 0.5)
    assert not run.step(NAN, 0.5)  # the gradients are finite, so the scaler alone would take this step
    assert not run.step(1.0, 0.5) and not run.step(1.0, 0.5)
    finding = run.guard.look()
    assert (finding.step, finding.what) == (1, "loss is nan")


@pytest.mark.parametrize(("optimizer", "fused", "on_device"), KINDS)
def test_with_fp16_a_skipped_step_changes_nothing_and_training_continues(
    optimizer: Any, fused: bool, on_device: bool
) -> None:
    run = Scaled(optimizer, fused, skip=True, on_device=on_device)
    assert [run.step(*each) for each in [(1.0, 0.5), (NAN, 0.5), (1.0, INF), (3.0, 0.5)]] == [True, False, False, True]
    finding = run.guard.look()
    assert (finding.step, finding.what, finding.num_skipped) == (1, "loss is nan", 2)
    assert run.guard.look() == Finding()


@pytest.mark.parametrize("skip", [True, False])
def test_steps_that_the_scaler_skips_are_counted_and_left_out_of_the_means_without_a_message(skip: bool) -> None:
    run = Scaled(torch.optim.AdamW, fused=True, skip=skip, on_device=True)
    assert [run.step(*each) for each in [(9.0, INF), (1.0, 0.5), (9.0, INF), (9.0, NAN), (2.0, 0.5)]] == [
        False,
        True,
        False,
        False,
        True,
    ]
    finding = run.guard.look()
    assert finding.num_skipped == 3 and not finding.what  # that is how a scaler finds its scale
    assert run.means.take()["loss"] == 1.5
    assert run.scaler.get_scale() == 2.0**16 / 8


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_fp16_whose_gradients_are_never_finite_is_reported_with_advice(skip: bool, on_device: bool) -> None:
    run = Scaled(torch.optim.AdamW, fused=True, skip=skip, on_device=on_device)
    run.step(1.0, 0.5)
    for _ in range(MAX_OVERFLOWS - 1):
        assert not run.step(1.0, INF)
    finding = run.guard.look()
    assert not finding.what
    assert not run.step(1.0, INF)
    assert run.step(1.0, 0.5) == skip  # the run ends with the weights of before
    finding = run.guard.look()
    assert (finding.step, finding.num_skipped) == (MAX_OVERFLOWS, 1)
    assert (
        f"overflow fp16 in {MAX_OVERFLOWS} steps in a row" in finding.what and "train.precision=bf16" in finding.advice
    )
    assert run.scaler.get_scale() < 1


def test_a_loss_that_is_not_finite_still_gets_the_advice_for_it() -> None:
    run = Scaled(torch.optim.AdamW, fused=True, skip=False, on_device=True)
    run.step(INF, INF)
    finding = run.guard.look()
    assert finding.what == "loss is inf, gradient_norm is inf" and "train.non_finite=skip" in finding.advice


class Calls(TorchDispatchMode):
    """Counts what is asked of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_keeping_and_restoring_buffers_takes_as_many_calls_for_100_as_for_2(on_device: bool, fails: bool) -> None:
    calls = []
    for number in (2, 100):
        weight = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        buffers = [
            torch.full((index % 5 + 1, 2), float(index), dtype=(torch.float32, torch.float64)[index % 2])
            for index in range(number)
        ]
        kept = [buffer.clone() for buffer in buffers]
        guard, ok = Guard(optimizer, buffers, skip=True, scaled=False), torch.tensor(1.0)
        for step, loss in enumerate((ok, torch.tensor(NAN) if fails else ok)):
            weight.grad = torch.ones(3)
            with Calls() as counter:
                guard.begin_step()
            for buffer in buffers:
                buffer.add_(step)
            buffers[0][0, 0] = NAN if step and fails else 0.0
            with counter:
                passes, _ = guard.judge(
                    step, {"loss": loss.as_subclass(OnDevice) if on_device else loss}, [loss.isfinite()]
                )
            if passes:
                optimizer.step()
        calls.append(counter.count)
        kept[0][0, 0] = 0.0
        for buffer, before in zip(buffers, kept, strict=True):
            expected = before if fails else before + 1
            assert torch.equal(buffer.flatten()[1:], expected.flatten()[1:])
    assert calls[0] == calls[1] < 40, calls
