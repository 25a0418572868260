"""The Trainer: one loop for every task, on any number of processes.

    open the run folder, prepare the data, build model and optimizer
    restore the checkpoint to go on from
    until the training duration has passed:
        one optimizer step:
            for each micro-batch: forward, sums over all processes, loss, backward
            clip, step, move the average
        log, evaluate and save, where due
        stop, everywhere, as soon as one process was asked to

Every process runs this file; rank 0 alone writes files and talks to people. Everything random is seeded from
(seed, step, rank) or (seed, position), and the learning rate is a function of how much of the training has passed.
So the state of a run is its weights, averages and optimizer state, a few counters, and what has been summed up for
the next log line.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from hashlib import blake2b
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.operations import convert_to_fp32
from torch import Tensor, nn

from trainer import checkpoint as checkpoints
from trainer.accelerator import TIMEOUT, build_accelerator, num_workers, resolve_precision
from trainer.checkpoint import Checkpoint
from trainer.curves import draw_curves, save_sheet
from trainer.data.card import Card
from trainer.data.order import Order, Shard, Slices
from trainer.data.prepare import archives_dir, data_dir, ensure_prepared
from trainer.data.stream import Batches, Samples
from trainer.durations import Clock, Span
from trainer.ema import Ema
from trainer.errors import TrainingFailed, UserError
from trainer.evaluation import evaluate
from trainer.models.freeze import set_train_mode
from trainer.progress import Progress
from trainer.recipe import Recipe, build
from trainer.reduce import Control, add_over_processes, use_global_batch_norm
from trainer.resume import lock_run, open_run, runs_dir
from trainer.schedules import build_schedule
from trainer.seeds import Use, mix
from trainer.signals import STOP
from trainer.tasks.build import build_task
from trainer.tasks.task import Batch
from trainer.trackers import Mirrors
from trainer.tracking import RunFolder, Status, environment, lower_is_better

# Divides 2**64, so sums of int64 that wrap around still leave the right remainder.
FINGERPRINT_MODULUS = 2**61
CURVES_EVERY_S = 60.0


class Trainer:
    """Trains what a recipe says.

    Args:
        recipe: validated.
        resume: `auto` goes on from the newest whole checkpoint of the run folder, `never` sets the old folder
            aside, a path goes on from that checkpoint folder.

    Raises:
        UserError: the run can't be what the recipe asks for.
    """

    def __init__(self, recipe: Recipe, resume: str = "auto") -> None:
        self.recipe = recipe
        self.accelerator = build_accelerator(recipe)
        self.device = self.accelerator.device
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.rank == 0
        self.control = Control(TIMEOUT)  # small messages between the processes

        # The counters of a run, which checkpoints hold beside weights, averages and optimizer state.
        self.step = 0  # optimizer steps done
        self.seconds = 0.0  # on rank 0's clock, in the loop
        self.best: float | None = None  # value of evaluate.best
        self.best_step: int | None = None
        self.loss_sums: dict[str, Tensor] = {}  # of each term, since the last train line
        self.steps_since_log = 0
        # Equal for runs that saw the same samples at the same steps. Each process counts its own; rank 0 adds what was restored.
        self.fingerprint = 0
        self.learning_rate = 0.0

        self.display = Progress(self.is_main)
        self.folder = RunFolder(runs_dir() / recipe.name)
        self.restore_from = self._on_main(lambda: self._open_run(resume))
        self._build_data()
        self._build_model()

    # ------------------------------------------------------------ building

    def _on_main(self, decide: Callable[[], Path | None]) -> Path | None:
        """Rank 0 decides and tells the others; where it can't, all of them end with its error."""
        answer, failure = "", ""
        if self.is_main:
            try:
                answer = str(decide() or "")
            except UserError as error:
                failure = str(error)
            except OSError as error:
                failure = f"{self.folder.path} can't be used: {error}"
        answer, failure = self.control.text_from_main(answer), self.control.text_from_main(failure)
        if failure:
            raise UserError(failure)
        return Path(answer) if answer else None

    def _open_run(self, resume: str) -> Path | None:
        """On rank 0: takes the run folder; returns the checkpoint to go on from."""
        self._lock = lock_run(self.folder)
        return open_run(self.folder, self.recipe, resume, self.display.say)

    def _build_data(self) -> None:
        """Prepares the data set where it is missing, rank 0 alone; then the Order and both splits."""
        recipe, settings = self.recipe, self.recipe.data
        source = recipe.build("data")

        def prepare() -> Path:
            ensure_prepared(source, data_dir(), archives_dir(), self.display.say)
            return data_dir() / source.name

        folder = self._on_main(prepare)
        assert folder
        card = Card.load(folder)
        self.info = card.info
        self.order = Order(card.row_groups("train"), recipe.train.seed, settings.window)
        self.clock = Clock(recipe.train.duration, settings.batch_size, self.order.size)
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.workers = num_workers(settings.workers, local_processes)
        augmentations = [build(component, chosen, ignore_index=card.ignore_index) for component, chosen in recipe.augmentations]
        cache = settings.cache == "auto"
        self.train_samples = Samples(folder, card, "train", self.order, settings.resize, augmentations, cache, settings.window)
        self.valid_samples = Samples(folder, card, "validation", None, settings.resize, [], cache, settings.window)
        batch_size = max(1, (recipe.evaluate.batch_size or settings.batch_size) // self.world_size)
        if batch_size > 1 and not self.valid_samples.uniform:
            raise UserError(f"images of {card.name} differ in size, so they can't be evaluated in batches: set data.resize=[H,W] or evaluate.batch_size=1")
        shard = Shard(len(self.valid_samples), batch_size, self.rank, self.world_size)
        self.valid_batches = Batches(self.valid_samples, shard, self.workers)

    def _build_model(self) -> None:
        """Task, optimizer, schedule and average; the model wrapped for N processes and mixed precision."""
        train = self.recipe.train
        self.task = build_task(self.recipe, self.info)
        self.task.loss.to(self.device)
        model = self.task.model.to(self.device)
        if train.precision == "fp64":
            model.double()
        if train.channels_last:
            model.to(memory_format=torch.channels_last)
        if self.world_size > 1:
            use_global_batch_norm(model)
        if train.compile:
            model.compile()  # in place: the keys of the state dict stay as they are
        self.trainable: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.ema = Ema(model, train.ema) if train.ema else None
        self.schedule = build_schedule(self.recipe, self.clock)
        optimizer = self.recipe.build("optimizer", parameters=list(self.trainable))
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.model = self.accelerator.prepare_model(model, evaluation_mode=self.world_size == 1)  # DDP only where there are others
        if self.world_size > 1:
            # Batch norms that learn use the statistics of all processes and frozen ones don't change, so buffers are equal everywhere.
            # The constructor's argument of this name is deprecated in torch 2.15; older versions and Accelerate don't know its successor.
            self.model.broadcast_buffers = False

    # ------------------------------------------------------------ the loop

    def fit(self) -> Status:
        """Trains until the duration has passed or a stop is asked for; returns `finished` or `stopped`.

        Raises:
            TrainingFailed: the loss is not finite, or a sample can't be read.
        """
        restored = checkpoints.load(self.restore_from) if self.restore_from else None
        if restored and self.clock.finished(restored.step, restored.counters["seconds"]):
            self.step, self.seconds = restored.step, restored.counters["seconds"]
            if self.is_main:
                self._write_summary("finished")  # a kill may have come between the last save and this
            self.display.say(f"{self.recipe.name} is finished already, at step {self.step}; a longer train.duration goes on from there")
            return "finished"
        batches = self._begin(restored)
        del restored
        try:
            status = self._loop(batches)
        except BaseException:
            with suppress(Exception):  # what went wrong first is what is reported
                self._end("failed")
            raise
        self._end(status)
        return status

    def _begin(self, restored: Checkpoint | None) -> Iterator[Batch]:
        """Restores the state, opens trackers and progress bar, starts the clock; returns the micro-batches to come."""
        first_step = restored.step if restored else 0
        slices = Slices(self.clock.batch_size, self.recipe.train.accumulate, self.rank, self.world_size, first_step)
        batches: Iterator[Batch] = iter(Batches(self.train_samples, slices, self.workers))
        set_train_mode(self.task.model)
        if self.world_size > 1:
            first = next(batches)
            self._rehearse(first)  # before the state is restored, which undoes what it did
            batches = chain([first], batches)
        if restored:
            self._restore(restored)
        if self.is_main:
            precision = resolve_precision(self.recipe.train.precision)
            self.folder.write_environment(environment() | {"precision": precision, "device": str(self.device)})
            self._write_summary("running")
        self.mirrors = Mirrors(self.recipe.trackers if self.is_main else [], self.folder.path, self.recipe.name, self.recipe.resolved())
        self.display.start(self.clock.total_steps, self.step)
        self.logged_step, self.logged_at = self.step, time.monotonic()
        self.started = self.curves_drawn_at = self.logged_at
        self.started -= self.seconds
        return batches

    def _loop(self, batches: Iterator[Batch]) -> Status:
        status: Status | None = None
        while status is None:
            self._train_step(batches)
            seconds_before = self.seconds
            asked, self.seconds = self.control.maximum([float(STOP.signal_name is not None), self._elapsed()])
            finished = self.clock.finished(self.step, self.seconds)
            status = "finished" if finished else "stopped" if asked else None

            if finished or self._due(self.recipe.train.log_every, seconds_before):
                self._log_training()
            pause = time.monotonic()
            improved = False
            if finished or self._due(self.recipe.evaluate.every, seconds_before):
                improved = self._evaluate()
            if status or improved or self._due(self.recipe.checkpoint.every, seconds_before):
                self._save(improved)
            self.logged_at += time.monotonic() - pause  # the logged speed is that of training alone
            self.display.step(self.step)
        return status

    def _end(self, status: Status) -> None:
        """Says how the run ended: in the run folder, to the trackers and to people."""
        self.display.close()
        if not self.is_main:
            return
        summary = self._write_summary(status)
        if self.step:
            self._draw_curves()
        self.mirrors.finish(summary)
        if status == "stopped":
            self.display.say(f"stopped on {STOP.signal_name or 'a signal'} at step {self.step}, checkpoint saved; the same command goes on from there")
        elif status == "finished":
            best = summary["best"].get(self.recipe.evaluate.best)
            figure = f", best {self.recipe.evaluate.best} {best['value']:.4f} at step {best['step']}" if best else ""
            self.display.say(f"finished {self.recipe.name}: {self.step} steps in {self.seconds:.0f} s{figure}; see {self.folder.path}")
        self._lock.release()

    # ------------------------------------------------------------ one optimizer step

    def _train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step on `data.batch_size` samples over all processes and micro-batches."""
        train = self.recipe.train
        torch.manual_seed(mix(train.seed, Use.STEP, self.step, self.rank))
        self.learning_rate = self.recipe.optimizer.lr * self.schedule(self.clock.progress(self.step, self.seconds))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate

        for micro in range(train.accumulate):
            batch = self._to_device(next(batches))
            last = micro == train.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):  # gradients travel once a step
                terms = self._forward_backward(batch, weight=1 / train.accumulate)
            self._record(batch, terms)

        if train.clip_norm:
            self.accelerator.clip_grad_norm_(list(self.trainable), train.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.steps_since_log += 1
        if self.ema:
            self.ema.update(self.step)

    def _forward_backward(self, batch: Batch, weight: float) -> dict[str, Tensor]:
        """Adds `weight` times the gradients of a micro-batch; returns the terms of its loss over all processes.

        The loss is a function of sums over all processes, of which each process differentiates its own summands. The whole
        gradient is the sum of these parts; DDP takes their mean, which the number of processes makes up for.
        """
        local_sums = self.task.loss_sums(self.model, batch)
        terms = self.task.loss.combine(add_over_processes(local_sums))
        self.accelerator.backward(terms["loss"] * (weight * self.world_size))
        return {name: term.detach() for name, term in terms.items()}

    def _record(self, batch: Batch, terms: dict[str, Tensor]) -> None:
        """Adds a micro-batch to what the next train line says, without waiting for the device."""
        for name, term in terms.items():
            value = term.double() / self.recipe.train.accumulate
            self.loss_sums[name] = self.loss_sums[name] + value if name in self.loss_sums else value
        for epoch, sample_id in zip(batch["epoch"].tolist(), batch["sample_id"].tolist(), strict=True):
            triple = b"".join(number.to_bytes(8, "little", signed=True) for number in (self.step, epoch, sample_id))
            self.fingerprint += int.from_bytes(blake2b(triple, digest_size=8).digest(), "little")
        self.fingerprint %= FINGERPRINT_MODULUS

    def _rehearse(self, batch: Batch) -> None:
        """One forward and backward whose results are thrown away.

        DDP sends gradients in groups, and arranges these anew after the first backward. With three or more processes the
        new arrangement adds gradients in another order, so a restarted run would differ in its first step if that were
        not over before.
        """
        buffers = {name: buffer.clone() for name, buffer in self.task.model.named_buffers()}
        self._forward_backward(self._to_device(batch), weight=1.0)
        self.optimizer.zero_grad()
        for name, buffer in self.task.model.named_buffers():
            buffer.copy_(buffers[name])

    # ------------------------------------------------------------ logging and evaluation

    def _log_training(self) -> None:
        """Writes a train line: means since the last one, equal on all processes."""
        now = time.monotonic()
        rate = (self.step - self.logged_step) * self.clock.batch_size / max(now - self.logged_at, 1e-9)
        self.logged_step, self.logged_at = self.step, now
        means = {name: float(value) / self.steps_since_log for name, value in self.loss_sums.items()}
        self.loss_sums, self.steps_since_log = {}, 0
        self._check_finite(means)
        line = self._line("train") | {
            "samples": self.step * self.clock.batch_size,
            "data_fingerprint": f"{self._global_fingerprint():016x}",
            **means,
            "learning_rate": self.learning_rate,
            "samples_per_second": rate,
            "seconds": self.seconds,
        }
        if self.is_main:
            self.folder.log(line)
            self.mirrors.log(line, self.step, "train")
            self.display.train(line)

    def _check_finite(self, losses: dict[str, float]) -> None:
        wrong = [f"{name} is {value}" for name, value in losses.items() if not isfinite(value)]
        if wrong:
            raise TrainingFailed(
                f"{', '.join(wrong)} in the steps up to {self.step}: lower optimizer.lr, set train.clip_norm=1.0, or use train.precision=fp32; "
                "the last checkpoint is from before"
            )

    def _evaluate(self) -> bool:
        """Evaluates on the whole validation set; returns whether `evaluate.best` improved, the same on all processes."""
        model = self.ema.model if self.ema else self.task.model
        forward = self._as_in_training(model)
        metrics = evaluate(self.task, model, forward, self.valid_batches, self.valid_samples, self._to_device)
        improved = self._update_best(metrics.get(self.recipe.evaluate.best))
        if self.is_main:
            line = self._line("validation") | metrics
            self.folder.log(line)
            self.mirrors.log(line, self.step, "validation")
            figures = "  ".join(f"{name} {metrics[name]:.4f}" for name in self.task.metric_names if name in metrics)
            self.display.say(f"step {self.step:6d}  validation: {figures}{'  (best so far)' if improved else ''}")
            self._draw_pictures(forward)
            if time.monotonic() - self.curves_drawn_at > CURVES_EVERY_S:
                self._draw_curves()
        set_train_mode(self.task.model)
        return improved

    def _update_best(self, value: float | None) -> bool:
        """Keeps the watched metric (None: it has no value on this set) if it is better than ever before; returns whether it is.

        Rank 0 decides for all: a rounding error between different GPUs must not part them.
        """
        sign = -1.0 if lower_is_better(self.recipe.evaluate.best) else 1.0
        improved = value is not None and isfinite(value) and (self.best is None or sign * value > sign * self.best)
        improved = bool(self.control.from_main([improved])[0])
        if improved:
            self.best, self.best_step = value, self.step
        return improved

    @torch.no_grad()
    def _draw_pictures(self, forward: Callable[..., Any]) -> None:
        """Draws a few samples from all over the validation set, always the same ones; the model is in eval mode still."""
        size = len(self.valid_samples)
        count = min(self.recipe.evaluate.pictures, size)
        if not count:
            return
        # One by one, since they may differ in size.
        batches = (self._to_device(self.valid_samples.__getitems__([i * size // count])) for i in range(count))
        file = self.folder.pictures / f"validation_step_{self.step:08d}.png"
        save_sheet([self.task.pictures(forward, batch)[0] for batch in batches], file)
        self.mirrors.pictures([file], self.step)

    def _draw_curves(self) -> None:
        draw_curves(self.folder.read_metrics(), self.folder.pictures / "curves.png")
        self.curves_drawn_at = time.monotonic()

    # ------------------------------------------------------------ saving and restoring

    def _save(self, best: bool) -> None:
        """Saves the state of the run. Rank 0 writes it; the others add their part of the fingerprint."""
        fingerprint = self._global_fingerprint()
        loss_sums = {name: float(value) for name, value in self.loss_sums.items()}
        self._check_finite(loss_sums)
        if not all(bool(parameter.isfinite().all()) for parameter in self.trainable):
            raise TrainingFailed(f"weights are not finite after step {self.step} and aren't saved; lower optimizer.lr or set train.clip_norm=1.0")
        if not self.is_main:
            return
        scaler = self.accelerator.scaler
        counters = {
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "best_step": self.best_step,
            "loss_sums": loss_sums,
            "steps_since_log": self.steps_since_log,
            "fingerprint": fingerprint,
            "scaler": scaler.state_dict() if scaler else None,
            "world_size": self.world_size,
            "threads": torch.get_num_threads(),
        }
        state = Checkpoint(
            model=checkpoints.snapshot(self.task.model),
            ema=checkpoints.snapshot(self.ema.model) if self.ema else None,
            optimizer=checkpoints.optimizer_tensors(self.optimizer.optimizer, self.trainable),
            counters=counters,
        )
        try:
            checkpoints.save(self.folder.checkpoints, state, self.recipe.checkpoint.keep, best)
        except OSError as error:
            raise UserError(f"the checkpoint of step {self.step} can't be written to {self.folder.checkpoints}: {error.strerror or error}") from error
        self._write_summary("running")

    def _restore(self, state: Checkpoint) -> None:
        """Puts a checkpoint's state in place."""
        counters = state.counters
        self.task.model.load_state_dict(state.model)
        if self.ema and state.ema:
            self.ema.model.load_state_dict(state.ema)
        checkpoints.load_optimizer(self.optimizer.optimizer, state.optimizer, self.trainable)
        if self.accelerator.scaler and counters["scaler"]:
            self.accelerator.scaler.load_state_dict(counters["scaler"])
        self.step, self.seconds = counters["step"], counters["seconds"]
        self.best, self.best_step = counters["best"], counters["best_step"]
        if self.is_main:
            checkpoints.restore_best(self.folder.checkpoints, self.best_step)
        self.loss_sums = {name: torch.tensor(value, dtype=torch.float64, device=self.device) for name, value in counters["loss_sums"].items()}
        self.steps_since_log = counters["steps_since_log"]
        self.fingerprint = counters["fingerprint"] if self.is_main else 0
        self.display.say(f"resumed {self.recipe.name} from step {self.step}")
        before, now = (counters["world_size"], counters["threads"]), (self.world_size, torch.get_num_threads())
        if before != now:
            self.display.say(
                f"saved by {before[0]} processes of {before[1]} threads, going on with {now[0]} of {now[1]}: the same batches, but roundings may differ"
            )

    def _write_summary(self, status: Status) -> dict[str, Any]:
        rate = self.step * self.clock.batch_size / self.seconds if self.seconds else 0.0
        return self.folder.write_summary(status, seconds=self.seconds, samples_per_second=rate, world_size=self.world_size)

    # ------------------------------------------------------------ small things

    def _elapsed(self) -> float:
        """Seconds in the loop on rank 0, whose clock is the run's; 0 on the others, so the largest is rank 0's."""
        return time.monotonic() - self.started if self.is_main else 0.0

    def _due(self, every: Span, seconds_before: float) -> bool:
        """Whether the step just done completed another `every`; `seconds_before` is the time when it began."""
        return self.clock.due(every, self.step, self.seconds, seconds_before)

    def _line(self, split: str) -> dict[str, Any]:
        return {"step": self.step, "epoch": self.step * self.clock.batch_size / self.clock.dataset_size, "split": split}

    def _global_fingerprint(self) -> int:
        return self.control.sum([self.fingerprint])[0] % FINGERPRINT_MODULUS

    def _to_device(self, batch: Batch) -> Batch:
        """Moves what the model sees; ids stay where they are."""
        stay = ("sample_id", "epoch")
        return {key: value.to(self.device, non_blocking=True) if key not in stay else value for key, value in batch.items()}

    def _as_in_training(self, model: nn.Module) -> Callable[..., Any]:
        """Calls a bare model as the wrapped one is called in training: under autocast, with fp32 outputs."""

        def call(*inputs: Any) -> Any:
            with self.accelerator.autocast():
                return convert_to_fp32(model.forward(*inputs))  # not compiled: each size of a last batch would be compiled anew

        return call
