"""The Trainer: one loop for every task, on any number of processes.

    open the run folder, prepare the data, build model and optimizer
    restore the checkpoint to go on from
    until the training duration has passed:
        one optimizer step:
            for each micro-batch: forward, sums over all processes, loss, backward
            clip; step, unless something isn't finite; move the average
        log, evaluate and save, where due
        stop, everywhere, as soon as one process was asked to

Every process runs this file; rank 0 alone writes files and talks to people. Everything random is seeded from
(seed, step, rank) or (seed, position), and the learning rate is a function of how much of the training has passed.
So the state of a run is its weights, averages and optimizer state, a few counters, and what has been summed up for
the next log line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from trainer.data.build import Data
from trainer.data.order import FINGERPRINT_MODULUS, fingerprint
from trainer.data.prepare import archives_dir, data_dir, ensure_prepared
from trainer.data.seeds import Use, mix
from trainer.distributed.accelerator import (
    CONTROL_TIMEOUT,
    as_in_training,
    build_accelerator,
    launched_as,
    resolve_precision,
    why_bits_may_differ,
)
from trainer.distributed.batch_norm import use_global_batch_norm
from trainer.distributed.control import Control
from trainer.distributed.failures import failures_told, reported_to_peers
from trainer.distributed.reduce import add_over_processes
from trainer.distributed.watchdog import Watchdog
from trainer.errors import TrainingFailed
from trainer.metrics.best import Best
from trainer.metrics.means import Means
from trainer.models.freeze import set_train_mode
from trainer.optim.ema import Ema
from trainer.optim.guard import GRADIENTS, Guard
from trainer.optim.schedules import build_schedule
from trainer.recipe.durations import Clock, Span
from trainer.recipe.recipe import Recipe
from trainer.reporting.reporter import Reporter
from trainer.runs import checkpoint as checkpoints
from trainer.runs.checkpoint import Checkpoint, Writer
from trainer.runs.folder import RunFolder, Status, runs_dir
from trainer.runs.lock import lock_run
from trainer.runs.resume import open_run
from trainer.signals import STOP, Stopped, TimeLimit
from trainer.tasks.build import build_task, check_sizes, place
from trainer.tasks.evaluation import evaluate
from trainer.tasks.task import Batch

WRITER_TIMEOUT_S = 60.0  # for the last checkpoint of a training that failed
# Counters that a checkpoint holds as they are.
COUNTERS = ("step", "seconds", "num_skipped", "unreadable", "evaluation_pending")


class Trainer:
    """Trains what a recipe says.

    Args:
        recipe: validated.
        resume: `auto`, `never` or a checkpoint folder, see `open_run`.

    Raises:
        UserError: processes were launched that don't see each other.
    """

    def __init__(self, recipe: Recipe, resume: str = "auto") -> None:
        self.recipe, self.resume = recipe, resume
        self.rank, self.world_size = launched_as()
        # First, since another rank may never start.
        self.watchdog = Watchdog(
            self.rank, self.world_size, 60 * float(recipe.train.timeout.value), on_failure=self._fail
        )
        with reported_to_peers(self.watchdog, self.world_size):
            self.accelerator = build_accelerator(recipe)
            self.control = Control(CONTROL_TIMEOUT)  # small messages between the processes
        self.watchdog.at("preparing", patient=True)
        self.device = self.accelerator.device
        self.is_main = self.rank == 0

        # The counters of a run, which checkpoints hold beside weights, averages and optimizer state.
        self.step = 0  # optimizer steps done
        self.seconds = 0.0  # on rank 0's clock, in the loop
        self.best = Best(recipe.evaluate.best)
        self.means = Means()  # of the loss terms, since the last train line
        self.num_skipped = 0  # steps that changed nothing, since something wasn't finite
        self.unreadable: list[int] = []  # ids of training samples that another one stood in for
        self.evaluation_pending = False  # a stop came during the evaluation of this step
        # Equal for runs that saw the same samples at the same steps. Each process counts its own; rank 0 adds what was
        # restored.
        self.fingerprint = 0
        self.learning_rate = 0.0

        self.folder = RunFolder(runs_dir() / recipe.name)
        self.report = Reporter(self.folder, recipe, self.is_main)
        self.writer = Writer(self.folder.checkpoints, recipe.checkpoint.keep)

    def fit(self) -> Status:
        """Trains until the duration has passed or a stop is asked for; returns `finished` or `stopped`.

        Raises:
            UserError: the run can't be what the recipe asks for.
            TrainingFailed: something isn't finite, a sample can't be read, a checkpoint can't be written, memory is
                out.
            Stopped: a stop was asked for before there was anything to save.
        """
        with failures_told(self.watchdog, self._fail, self.recipe, self.world_size, self.folder.path):
            restored = self.build()
            if restored and self._is_finished(restored):
                return "finished"
            batches = self._begin(restored)
            del restored
            status = self._loop(batches)
            self._end(status)
            return status

    # ------------------------------------------------------------ building

    def build(self) -> Checkpoint | None:
        """Opens the run folder, prepares the data, builds everything; returns the checkpoint to go on from."""
        restore_from = self.control.on_main(self._open_run)
        self._build_data()
        self.control.on_main(self._build_task)  # rank 0 first: what it downloads, the others find
        if not self.is_main:
            self._build_task()
        self._wrap_model()
        return checkpoints.load(Path(restore_from)) if restore_from else None

    def _open_run(self) -> Path | None:
        """On rank 0: takes the run folder; returns the checkpoint to go on from."""
        self._lock = lock_run(self.folder.path)  # until this process ends, however it does
        return open_run(self.folder, self.recipe, self.resume, self.report.say)

    def _build_data(self) -> None:
        """Prepares the data set where it is missing, rank 0 alone; then opens it."""
        source = self.recipe.build("data")
        self.control.on_main(lambda: ensure_prepared(source, data_dir(), archives_dir(), self.report.say).name)
        self.data = Data(self.recipe, self.rank, self.world_size)
        self.clock = Clock(self.recipe.train.duration, self.recipe.data.batch_size, self.data.order.size)

    def _build_task(self) -> None:
        self.task = build_task(self.recipe, self.data.info)
        check_sizes(self.recipe, self.task.model)

    def _wrap_model(self) -> None:
        """Optimizer, schedule and average; the model wrapped for N processes and mixed precision."""
        train = self.recipe.train
        model = place(self.task, self.recipe, self.device, self.data.train.uniform)
        if self.world_size > 1:
            use_global_batch_norm(model)
        if train.compile:
            model.compile()  # in place: the keys of the state dict stay as they are
        self.trainable: dict[Tensor, str] = {
            parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        self.ema = Ema(model, train.ema) if train.ema else None
        self.schedule = build_schedule(self.recipe, self.clock, self.best)
        optimizer = self.recipe.build("optimizer", parameters=list(self.trainable))
        self.guard = Guard(
            optimizer, model.buffers(), skip=train.non_finite == "skip", scaled=self.accelerator.scaler is not None
        )
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        # DDP only where there are others.
        self.model = self.accelerator.prepare_model(model, evaluation_mode=self.world_size == 1)
        if self.world_size > 1:
            # Batch norms that learn use the statistics of all processes and frozen ones don't change, so buffers are
            # equal everywhere.
            # The constructor's argument of this name is deprecated in torch 2.15; older versions and Accelerate don't
            # know its successor.
            self.model.broadcast_buffers = False

    # ------------------------------------------------------------ the loop

    def _is_finished(self, restored: Checkpoint) -> bool:
        """Whether nothing is left to do after this checkpoint; says so."""
        counters = restored.counters
        self.step, self.seconds = restored.step, counters["seconds"]
        self.best.restore(counters)
        if counters["evaluation_pending"] or not self._is_over():
            return False
        self._summary("finished")  # a kill may have come between the last save and this
        self.report.say(
            f"{self.recipe.name} is finished already, at step {self.step}; a longer train.duration (or "
            "evaluate.stop_after) goes on from there"
        )
        return True

    def _begin(self, restored: Checkpoint | None) -> Iterator[Batch]:
        """Restores the state, opens trackers and progress bar, starts the clock; returns the micro-batches to come."""
        batches = self.data.train_batches(restored.step if restored else 0)
        set_train_mode(self.task.model)
        if self.world_size > 1:
            first = next(batches)
            self._rehearse(first)  # before the state is restored, which undoes what it did
            batches = chain([first], batches)
        if restored:
            self._restore(restored)
        if not self._may_go_on("restoring"):
            raise Stopped
        facts = {"precision": resolve_precision(self.recipe.train.precision), "device": str(self.device)}
        self._summary("running")
        self.report.begin(self.step, self.clock.total_steps, facts)
        self.time_limit = TimeLimit()
        self.logged_step, self.logged_at = self.step, time.monotonic()
        self.started = self.logged_at - self.seconds
        return batches

    def _loop(self, batches: Iterator[Batch]) -> Status:
        status = self._after_step(evaluate=True, save=True) if self.evaluation_pending else None
        while status is None:
            seconds_before = self.seconds
            self._train_step(batches)
            self.writer.check()
            stop, limit_near, self.seconds = self._agree()
            finished = self.clock.finished(self.step, self.seconds)
            if finished or self._due(self.recipe.train.log_every, seconds_before):
                self._log_training()
            status = self._after_step(
                evaluate=finished or self._due(self.recipe.evaluate.every, seconds_before),
                save=limit_near or self._due(self.recipe.checkpoint.every, seconds_before),
                stop=stop,
            )
            self.report.display.step(self.step)
        return status

    def _agree(self) -> tuple[bool, bool, float]:
        """Whether any process was asked to stop, whether a time limit is near, and rank 0's clock,
        which is the run's.
        """
        self.watchdog.at("waiting for the other ranks", self.step)
        seconds = time.monotonic() - self.started if self.is_main else 0.0
        stop, limit_near, seconds = self.control.maximum(
            [float(STOP.signal_name is not None), float(self.is_main and self.time_limit.is_near()), seconds]
        )
        if limit_near:
            self.report.say(f"the time limit of this job is near: saving a checkpoint at step {self.step}")
        return bool(stop), bool(limit_near), seconds

    def _after_step(self, evaluate: bool, save: bool, stop: bool = False) -> Status | None:
        """Evaluates and saves, where due; returns how the run ends, if it ends here."""
        pause = time.monotonic()
        improved = False
        if evaluate:
            outcome = None if stop else self._evaluate()
            self.evaluation_pending = stop = outcome is None  # a stop came before or during it: the next start does it
            improved = bool(outcome)
        status: Status | None = "stopped" if stop else "finished" if self._is_over() else None
        if status or improved or save:
            self._save(improved)
        self.logged_at += time.monotonic() - pause  # the logged speed is that of training alone
        return status

    def _end(self, status: Status) -> None:
        """Waits for the last checkpoint, then says how the run ended: in the run folder,
        to the trackers and to people.
        """
        self.watchdog.at("ending", self.step)
        self.writer.wait()
        if status == "stopped":
            again = "the same command" if self.resume == "auto" else "the same command with --resume auto"
            text = (
                f"stopped on {STOP.signal_name or 'a signal'} at step {self.step}, checkpoint saved; {again} goes on "
                "from there"
            )
        else:
            early = (
                ""
                if self.clock.finished(self.step, self.seconds)
                else f" early, {self.best.stale} evaluations after the best one"
            )
            text = (
                f"finished {self.recipe.name}{early}: {self.step} steps in {self.seconds:.0f} s; see {self.folder.path}"
            )
        self.report.end(status, text, **self._facts())

    def _fail(self, error: BaseException) -> None:
        """Records in the run folder and in the trackers why training failed."""
        with suppress(TrainingFailed):  # what went wrong first is what is reported
            self.writer.wait(WRITER_TIMEOUT_S)
        self.report.fail(error, self._facts() if self.report.is_open else {})

    # ------------------------------------------------------------ one optimizer step

    def _train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step on `data.batch_size` samples over all processes and micro-batches."""
        train = self.recipe.train
        torch.manual_seed(mix(train.seed, Use.STEP, self.step, self.rank))
        self.learning_rate = self.recipe.optimizer.lr * self.schedule(self.clock.progress(self.step, self.seconds))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate

        self.guard.begin_step()
        step_terms: dict[str, Tensor] = {}
        finite_shares: list[Tensor] = []
        for micro in range(train.accumulate):
            self.watchdog.at("reading data", self.step)
            batch = self._to_device(next(batches))
            self.watchdog.at("in forward and backward", self.step)
            last = micro == train.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):  # gradients travel once a step
                terms, share_is_finite = self._forward_backward(batch, weight=1 / train.accumulate)
            step_terms = {name: step_terms.get(name, 0.0) + term / train.accumulate for name, term in terms.items()}
            finite_shares.append(share_is_finite)
            self._count(batch)

        self.accelerator.unscale_gradients()  # of fp16; does nothing otherwise
        step_terms[GRADIENTS] = get_total_norm(
            [parameter.grad for parameter in self.trainable if parameter.grad is not None]
        )
        if train.clip_norm:
            clip_grads_with_norm_(list(self.trainable), train.clip_norm, step_terms[GRADIENTS])
        passes, counts = self.guard.passes(self.step, step_terms, finite_shares)
        if passes:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.means.add(step_terms, counts)
        self.step += 1
        if self.ema:
            self.ema.update(self.step)
        if not passes:
            self._look_at_guard()

    def _forward_backward(self, batch: Batch, weight: float) -> tuple[dict[str, Tensor], Tensor]:
        """Adds `weight` times the gradients of a micro-batch; returns the terms of its loss over all processes.

        The loss is a function of sums over all processes, of which each process differentiates its own summands. The
        whole gradient is the sum of these parts; DDP takes their mean, which the number of processes makes up for. Also
        returns whether this process's own sums are finite.
        """
        local_sums = self.task.loss_sums(self.model, batch)
        terms = self.task.loss.combine(add_over_processes(local_sums))
        self.accelerator.backward(terms["loss"] * (weight * self.world_size))
        share_is_finite = torch.stack([value.detach().isfinite().all() for value in local_sums.values()]).all()
        return {name: term.detach() for name, term in terms.items()}, share_is_finite

    def _count(self, batch: Batch) -> None:
        """Adds the samples of a micro-batch to the fingerprint; remembers those that another one stands in for."""
        self.fingerprint += fingerprint(self.step, batch["epoch"].tolist(), batch["sample_id"].tolist())
        self.fingerprint %= FINGERPRINT_MODULUS
        if self.recipe.data.max_unreadable:
            self.unreadable = sorted({*self.unreadable, *batch["unreadable"].tolist()})

    def _rehearse(self, batch: Batch) -> None:
        """One forward and backward whose results are thrown away.

        DDP sends gradients in groups, and arranges these anew after the first backward. With three or more processes
        the new arrangement adds gradients in another order, so a restarted run would differ in its first step if that
        were not over before.
        """
        self.watchdog.at("in the first forward and backward", self.step)
        buffers = {name: buffer.clone() for name, buffer in self.task.model.named_buffers()}
        self._forward_backward(self._to_device(batch), weight=1.0)
        self.optimizer.zero_grad()
        for name, buffer in self.task.model.named_buffers():
            buffer.copy_(buffers[name])

    # ------------------------------------------------------------ what went wrong on the way

    def _look_at_guard(self) -> None:
        """Waits for the device; ends the training, or says what was skipped, where a step was not finite."""
        finding = self.guard.look()
        if not finding:
            return
        self.num_skipped += finding.count
        if not finding.what:
            return
        message = finding.describe(self.data, self.control)
        if self.recipe.train.non_finite == "error":
            raise TrainingFailed(
                f"{message}; the weights are still those before it, and the last checkpoint is older: {finding.advice}"
            )
        self.report.say(
            f"{message}; skipped, {self.num_skipped} so far" + (f": {finding.advice}" if finding.advice else "")
        )

    def _gather_unreadable(self) -> None:
        """Makes every process know the unreadable samples of all; too many end the training."""
        if self.recipe.data.max_unreadable:
            self.unreadable = self.control.union(self.unreadable)
        if len(self.unreadable) > self.recipe.data.max_unreadable:
            raise TrainingFailed(
                f"samples {self.unreadable} can't be read, more than data.max_unreadable "
                f"({self.recipe.data.max_unreadable})"
            )

    # ------------------------------------------------------------ logging and evaluation

    def _log_training(self) -> None:
        """Writes a train line: means since the last one, equal on all processes."""
        self.watchdog.at("logging", self.step)
        self._look_at_guard()
        self._gather_unreadable()
        now = time.monotonic()
        rate = (self.step - self.logged_step) * self.clock.batch_size / max(now - self.logged_at, 1e-9)
        self.logged_step, self.logged_at = self.step, now
        line = self._line("train") | {
            "samples": self.step * self.clock.batch_size,
            "data_fingerprint": f"{self._global_fingerprint():016x}",
            **self.means.take(),
            "learning_rate": self.learning_rate,
            "samples_per_second": rate,
            "seconds": self.seconds,
        }
        if self.num_skipped:
            line["num_skipped_steps"] = self.num_skipped
        if self.unreadable:
            line["num_unreadable"] = len(self.unreadable)
        self.report.train(line)

    def _evaluate(self) -> bool | None:
        """Evaluates on the whole validation set; returns whether `evaluate.best` improved,
        None where a stop was asked for meanwhile.
        """
        self._look_at_guard()
        model = self.ema.model if self.ema else self.task.model
        forward = as_in_training(self.accelerator, model)
        metrics = evaluate(
            self.task, model, forward, self.data, self._to_device, partial(self._may_go_on, "evaluating")
        )
        if metrics is None:
            return None
        self.watchdog.at("drawing pictures", self.step)
        # Rank 0 decides for all: a rounding error between different GPUs must not part them.
        value = metrics.get(self.best.metric)
        improved = bool(self.control.from_main([self.best.is_improved_by(value)])[0])
        self.best.add(value, self.step, improved)
        self.report.validation(
            self._line("validation") | metrics, self.task.metric_names, improved, self.task.advice(metrics)
        )
        if self.is_main:
            self._draw_pictures(forward)
        set_train_mode(self.task.model)
        return improved

    @torch.no_grad()
    def _draw_pictures(self, forward: Callable[..., Any]) -> None:
        """Draws a few samples from all over the validation set, always the same ones;
        the model is in eval mode still.
        """
        shown = self.data.validation.spread(self.recipe.evaluate.pictures)
        if shown:
            # One by one, since they may differ in size.
            batches = (self._to_device(self.data.validation.__getitems__([sample_id])) for sample_id in shown)
            self.report.pictures(
                [picture for batch in batches for picture in self.task.pictures(forward, batch)],
                self.step,
                self.task.panels,
                self.task.legend,
            )

    # ------------------------------------------------------------ saving and restoring

    def _save(self, best: bool) -> None:
        """Saves the state of the run. Rank 0 copies it, and writes the copy in the background;
        the others add their part of the counters.
        """
        self.watchdog.at("saving", self.step)
        self._look_at_guard()
        self._gather_unreadable()
        fingerprint = self._global_fingerprint()
        if not torch.stack([parameter.isfinite().all() for parameter in self.trainable]).all():
            raise TrainingFailed(
                f"weights are not finite after step {self.step} and aren't saved; lower optimizer.lr or set "
                "train.clip_norm=1.0"
            )
        if not self.is_main:
            return
        counters: Any = {name: getattr(self, name) for name in COUNTERS}
        counters |= self.best.state() | {
            "fingerprint": fingerprint,
            "means": self.means.state(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "world_size": self.world_size,
            "threads": torch.get_num_threads(),
            "data": self.data.identity,
        }
        self.writer.wait()  # one copy in memory at a time
        state = Checkpoint(
            model=checkpoints.snapshot(self.task.model),
            ema=checkpoints.snapshot(self.ema.model) if self.ema else None,
            optimizer=checkpoints.optimizer_tensors(self.optimizer.optimizer, self.trainable),
            counters=counters,
        )
        self.writer.write(state, best)
        self._summary("running")

    def _restore(self, state: Checkpoint) -> None:
        """Puts a checkpoint's state in place."""
        counters = state.counters
        self.data.check_unchanged(counters.get("data"))
        checkpoints.restore(
            state, self.task.model, self.ema.model if self.ema else None, self.optimizer.optimizer, self.trainable
        )
        if self.accelerator.scaler and counters["scaler"]:
            self.accelerator.scaler.load_state_dict(counters["scaler"])
        for name in COUNTERS:
            setattr(self, name, counters[name])  # type: ignore[literal-required]
        self.best.restore(counters)
        self.fingerprint = counters["fingerprint"] if self.is_main else 0
        self.means.restore(counters["means"], self.device)
        if self.is_main:
            checkpoints.restore_best(self.folder.checkpoints, self.best.step)
        self.report.say(f"resumed {self.recipe.name} from step {self.step}")
        for reason in why_bits_may_differ(counters, self.world_size, self.device):
            self.report.say(reason)

    def _summary(self, status: Status) -> None:
        self.report.summary(status, **self._facts())

    def _facts(self) -> dict[str, Any]:
        rate = self.step * self.clock.batch_size / self.seconds if self.seconds else 0.0
        facts = {
            "step": self.step,
            "total_steps": self.clock.total_steps,
            "seconds": self.seconds,
            "samples_per_second": rate,
            "world_size": self.world_size,
        }
        return (
            facts
            | ({"skipped_steps": self.num_skipped} if self.num_skipped else {})
            | ({"unreadable": self.unreadable} if self.unreadable else {})
        )

    # ------------------------------------------------------------ small things

    def _is_over(self) -> bool:
        """Whether the training duration has passed, or too many evaluations without improvement."""
        patience = self.recipe.evaluate.stop_after
        return self.clock.finished(self.step, self.seconds) or (patience is not None and self.best.stale >= patience)

    def _may_go_on(self, place: str) -> bool:
        """Whether no process was asked to stop."""
        self.watchdog.at(place, self.step)
        return not self.control.maximum([float(STOP.signal_name is not None)])[0]

    def _due(self, every: Span, seconds_before: float) -> bool:
        """Whether the step just done completed another `every`; `seconds_before` is the time when it began."""
        return self.clock.due(every, self.step, self.seconds, seconds_before)

    def _line(self, split: str) -> dict[str, Any]:
        return {"step": self.step, "epoch": self.step * self.clock.batch_size / self.clock.dataset_size, "split": split}

    def _global_fingerprint(self) -> int:
        return self.control.sum([self.fingerprint])[0] % FINGERPRINT_MODULUS

    def _to_device(self, batch: Batch) -> Batch:
        """Moves what the model sees; ids stay where they are."""
        stay = ("sample_id", "epoch", "unreadable", "height", "width")
        return {
            key: value.to(self.device, non_blocking=True) if key not in stay else value for key, value in batch.items()
        }
