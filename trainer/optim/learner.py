"""An optimizer step: forward, loss, backward, clipping, the guard, the update, the moving average."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from trainer.data.seeds import Use, mix
from trainer.distributed import ddp
from trainer.distributed.batch_norm import use_global_batch_norm
from trainer.distributed.reduce import add_over_processes
from trainer.errors import TrainingFailed
from trainer.models.freeze import set_train_mode
from trainer.optim.ema import Ema
from trainer.optim.guard import GRADIENTS, Guard, Verdict
from trainer.optim.schedules import Schedule
from trainer.recipe.recipe import Recipe
from trainer.runs.state import Checkpoint, optimizer_tensors, snapshot
from trainer.tasks.build import to_device
from trainer.tasks.task import Batch, Task

if TYPE_CHECKING:
    from accelerate import Accelerator


class Learner:
    """The model and everything that updates it: optimizer, schedule, guard, moving average.

    Args:
        task: owns model and loss.
        recipe: of the run.
        accelerator: of this process.
        schedule: maps the training progress to a factor on `optimizer.lr`.
        uniform: whether all images have one size before augmentation.

    Attributes:
        model: the network, unwrapped.
        ema: its moving average, if `train.ema` asks for one.
        names: maps each trainable parameter to its name.
        guard: see `Guard`; the Trainer reports its findings.
        learning_rate: of the last step.
    """

    def __init__(
        self, task: Task[Any], recipe: Recipe, accelerator: Accelerator, schedule: Schedule, uniform: bool
    ) -> None:
        self.task, self.settings, self.accelerator, self.schedule = task, recipe.train, accelerator, schedule
        self.base_learning_rate = self.learning_rate = recipe.optimizer.lr
        self.model = to_device(task, recipe, accelerator.device, uniform)
        if accelerator.num_processes > 1:
            use_global_batch_norm(self.model)
        if recipe.train.compile:
            self.model.compile()  # in place: keeps the keys of the state dict
        self.names: dict[Tensor, str] = {
            parameter: name for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }
        self.ema = Ema(self.model, recipe.train.ema) if recipe.train.ema else None
        optimizer = recipe.build("optimizer", parameters=list(self.names))
        self.guard = Guard(
            optimizer,
            self.model.buffers(),
            skip=recipe.train.non_finite == "skip",
            scaled=accelerator.scaler is not None,
        )
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.wrapped = ddp.wrap(self.model, accelerator)
        set_train_mode(self.model)

    @property
    def evaluation_model(self) -> nn.Module:
        """The model to evaluate: the moving average if there is one."""
        return self.ema.model if self.ema else self.model

    def step(self, step: int, progress: float, micro_batches: Iterable[Batch]) -> tuple[dict[str, Tensor], Verdict]:
        """Runs one optimizer step.

        Args:
            step: its number, from 0.
            progress: share of the training completed so far.
            micro_batches: `train.accumulate` of them, this process's part of the step's samples.

        Returns:
            The terms of the loss over all samples and `gradient_norm` (scalars), and the guard's verdict.
        """
        torch.manual_seed(mix(self.settings.seed, Use.STEP, step, self.accelerator.process_index))
        self.learning_rate = self.base_learning_rate * self.schedule(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate

        self.guard.begin_step()
        terms: dict[str, Tensor] = {}
        parts_finite: list[Tensor] = []
        accumulate = self.settings.accumulate
        for number, batch in enumerate(micro_batches, start=1):
            # Processes exchange gradients once per step, after the last micro-batch.
            with nullcontext() if number == accumulate else self.accelerator.no_sync(self.wrapped):
                micro_terms, part_is_finite = self._forward_backward(batch, weight=1 / accumulate)
            terms = {name: terms.get(name, 0.0) + term / accumulate for name, term in micro_terms.items()}
            parts_finite.append(part_is_finite)

        self.accelerator.unscale_gradients()  # only fp16 scales them
        terms[GRADIENTS] = get_total_norm([weight.grad for weight in self.names if weight.grad is not None])
        if self.settings.clip_norm:
            clip_grads_with_norm_(list(self.names), self.settings.clip_norm, terms[GRADIENTS])
        verdict = self.guard.judge(step, terms, parts_finite)
        if verdict.call_optimizer:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(step + 1)
        return terms, verdict

    def _forward_backward(self, batch: Batch, weight: float) -> tuple[dict[str, Tensor], Tensor]:
        """Adds `weight` times the gradients of a micro-batch.

        The loss is a function of sums over all processes; each process differentiates only its own summands. The full
        gradient is the sum of these parts, but DDP averages them, so the loss is multiplied by the number of processes.

        Returns:
            The terms of the loss over all processes, and whether this process's own sums are finite; scalars.
        """
        local_sums = self.task.loss_sums(self.wrapped, batch)
        terms = self.task.loss.combine(add_over_processes(local_sums))
        self.accelerator.backward(terms["loss"] * (weight * self.accelerator.num_processes))
        part_is_finite = torch.stack([value.detach().isfinite().all() for value in local_sums.values()]).all()
        return {name: term.detach() for name, term in terms.items()}, part_is_finite

    def rehearse(self, batch: Batch) -> None:
        """Runs a micro-batch through DDP before the state is restored; see `ddp.rehearse`."""
        ddp.rehearse(self.model, lambda: self._forward_backward(batch, weight=1.0))

    def check_finite(self, step: int) -> None:
        """Keeps non-finite weights from being saved.

        Raises:
            TrainingFailed: a weight isn't finite.
        """
        if not torch.stack([weight.isfinite().all() for weight in self.names]).all():
            raise TrainingFailed(
                f"weights are not finite after step {step} and were not saved; lower optimizer.lr or set "
                "train.clip_norm=1.0"
            )

    def checkpoint(self, counters: dict[str, Any]) -> Checkpoint:
        """A copy of the state on the CPU, with `counters`, the state of the rest of the run."""
        scaler = self.accelerator.scaler
        return Checkpoint(
            model=snapshot(self.model),
            ema=snapshot(self.ema.model) if self.ema else None,
            optimizer=optimizer_tensors(self.optimizer.optimizer, self.names),
            counters=counters | {"scaler": scaler.state_dict() if scaler else None},  # type: ignore[arg-type]
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restores the state that `checkpoint` returned.

        Raises:
            UserError: the checkpoint is of another model or optimizer.
        """
        ema = self.ema.model if self.ema else None
        checkpoint.restore(self.model, ema, self.optimizer.optimizer, self.names)
        if self.accelerator.scaler and checkpoint.counters["scaler"]:
            self.accelerator.scaler.load_state_dict(checkpoint.counters["scaler"])
