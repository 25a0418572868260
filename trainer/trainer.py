"""The Trainer: one loop for every task, on any number of processes.

    open the run folder, build, restore the newest checkpoint
    until the training duration has passed:
        one optimizer step:
            for each micro-batch: forward, sums over all processes, loss, backward
            clip, step, move the average
        log, evaluate and save, where due
        stop, if a process was asked to and all agree

Everything random is seeded from (seed, step, rank) or (seed, position), and the schedule is a function of the
progress, so the state of a run is: weights, optimizer, step, and what has been summed up for the next log line.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.operations import convert_to_fp32
from PIL import Image
from torch import Tensor, nn

from trainer import checkpoint as checkpoints
from trainer.accelerator import build_accelerator, num_workers, resolve_precision
from trainer.checkpoint import Checkpoint
from trainer.curves import draw_curves
from trainer.data.order import Order, Shard, Slices
from trainer.data.prepare import archives_dir, data_dir, ensure_prepared
from trainer.data.stream import EvaluationBatches, Samples, Stream
from trainer.durations import Clock
from trainer.ema import Ema
from trainer.errors import TrainingFailed, UserError
from trainer.evaluation import evaluate
from trainer.models.freeze import set_train_mode
from trainer.progress import Progress
from trainer.recipe import Recipe, build
from trainer.reduce import Control, add_over_processes, use_global_batch_norm
from trainer.resume import lock_run, open_run, runs_dir
from trainer.seeds import Use, mix
from trainer.signals import STOP
from trainer.tasks.build import build_task
from trainer.tasks.task import Batch
from trainer.trackers import Mirrors
from trainer.tracking import RunFolder, Status, environment, lower_is_better

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
        self.control = Control()

        # What the state of a run consists of, beside weights and optimizer.
        self.step = 0  # optimizer steps done
        self.seconds = 0.0  # of training
        self.fingerprint = 0  # of the samples this process trained on; rank 0 also holds what was restored
        self.window: dict[str, Tensor] = {}  # sums of the loss terms since the last log line
        self.window_steps = 0
        self.best: float | None = None

        self._started = self._logged_at = self._curves_drawn = time.monotonic()
        self._logged_step = 0

        self.progress = Progress(self.is_main)
        self.folder = RunFolder(runs_dir() / recipe.name)
        self.mirrors = Mirrors([], self.folder.path, recipe.name, {})
        self.restore_from = self._on_main(lambda: self._open_run(resume))
        self._build_data()
        self._build_model()

    # ------------------------------------------------------------ building

    def _build_data(self) -> None:
        """Prepares the data set where it is missing; then the Order and both splits."""
        recipe, settings = self.recipe, self.recipe.data
        source = recipe.build("data")
        self.card = ensure_prepared(source, data_dir(), archives_dir(), self.progress.say)
        self.order = Order(self.card.row_groups("train"), recipe.train.seed, settings.window)
        self.clock = Clock(recipe.train.duration, settings.batch_size, self.order.size)
        self.workers = num_workers(settings.workers, self._local_processes)
        augmentations = [build(component, chosen, ignore_index=self.card.ignore_index) for component, chosen in recipe.augmentations]
        shared = (data_dir() / source.name, self.card)
        cache = settings.cache == "auto"
        self.train_samples = Samples(*shared, "train", self.order, settings.resize, augmentations, cache, settings.window)
        self.valid_samples = Samples(*shared, "validation", None, settings.resize, [], cache, settings.window)
        batch_size = max(1, (recipe.evaluate.batch_size or settings.batch_size) // self.world_size)
        shard = Shard(len(self.valid_samples), batch_size, self.rank, self.world_size)
        self.valid_batches = EvaluationBatches(self.valid_samples, shard, self.workers)

    def _build_model(self) -> None:
        """Task, optimizer, schedule and average; the model wrapped for N processes and mixed precision."""
        train = self.recipe.train
        self.task = build_task(self.recipe, self.card.info)
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
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.ema = Ema(model, train.ema) if train.ema else None
        self.schedule = self.recipe.build("schedule", share=self.clock.share)
        self.base_lr = self.recipe.optimizer.lr
        optimizer = self.recipe.build("optimizer", parameters=list(self.names))
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.model = self.accelerator.prepare_model(model, evaluation_mode=self.world_size == 1)  # DDP only where there are others
        if self.world_size > 1:
            # Buffers are equal on all processes: batch norm that learns is global, the rest is frozen. The argument of this
            # name is deprecated in torch 2.15, and the one that replaces it is unknown to older versions and to Accelerate.
            self.model.broadcast_buffers = False

    # ------------------------------------------------------------ the loop

    def fit(self) -> Status:
        """Trains until the duration has passed or a stop is agreed; returns `finished` or `stopped`.

        Raises:
            TrainingFailed: the loss is not finite, or a sample can't be read.
        """
        try:
            return self._fit()
        except BaseException:
            self._close("failed")
            raise

    def _fit(self) -> Status:
        restored = checkpoints.load(self.restore_from) if self.restore_from else None
        if restored and self.clock.finished(restored.step, restored.trainer["seconds"]):
            self.progress.say(f"{self.recipe.name} is finished already, at step {restored.step}; a longer train.duration goes on from there")
            return "finished"
        slices = Slices(self.recipe.data.batch_size, self.recipe.train.accumulate, self.rank, self.world_size, first_step=restored.step if restored else 0)
        batches: Iterator[Batch] = iter(Stream(self.train_samples, slices, self.workers))
        set_train_mode(self.task.model)
        if self.world_size > 1:
            first = next(batches)
            self._rehearse(first)
            batches = chain([first], batches)
        if restored:
            self._restore(restored)
        self._begin()

        status: Status | None = None
        while status is None:
            self._train_step(batches)
            before = self.seconds
            asked, self.seconds = self.control.maximum([float(STOP.signal_name is not None), self._elapsed()])
            finished = self.clock.finished(self.step, self.seconds)
            status = "finished" if finished else "stopped" if asked else None

            if finished or self._due(self.recipe.train.log_every, before):
                self._log_training()
            improved = False
            if finished or self._due(self.recipe.evaluate.every, before):
                improved = self._evaluate()
            if status or improved or self._due(self.recipe.checkpoint.every, before):
                self._save(improved)
            self.progress.step(self.step)

        self._close(status)
        return status

    def _train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step on `data.batch_size` samples over all processes and micro-batches."""
        train = self.recipe.train
        torch.manual_seed(mix(train.seed, Use.STEP, self.step, self.rank))
        learning_rate = self.base_lr * self.schedule(self.clock.progress(self.step, self.seconds))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

        for micro in range(train.accumulate):
            batch = self._to_device(next(batches))
            last = micro == train.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):  # gradients travel once a step
                terms = self._backward(batch, 1 / train.accumulate)
            self._count(batch, terms)

        if train.clip_norm:
            self.accelerator.clip_grad_norm_(self.names, train.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.window_steps += 1
        self.learning_rate = learning_rate
        if self.ema:
            self.ema.update(self.step)

    def _backward(self, batch: Batch, share: float) -> dict[str, Tensor]:
        """Loss of a micro-batch over all processes, and `share` of its gradients; returns the loss's terms."""
        local = self.task.loss_sums(self.model, batch)
        terms = self.task.loss.combine(add_over_processes(local))
        self.accelerator.backward(terms["loss"] * (share * self.world_size))  # DDP divides by the number of processes
        return {name: term.detach() for name, term in terms.items()}

    def _count(self, batch: Batch, terms: dict[str, Tensor]) -> None:
        """Adds a micro-batch to what the next log line says, without waiting for the device."""
        for name, term in terms.items():
            value = term.double() / self.recipe.train.accumulate
            self.window[name] = self.window[name] + value if name in self.window else value
        for epoch, sample_id in zip(batch["epoch"].tolist(), batch["sample_id"].tolist(), strict=True):
            triple = b"".join(number.to_bytes(8, "little", signed=True) for number in (self.step, epoch, sample_id))
            self.fingerprint += int.from_bytes(blake2b(triple, digest_size=8).digest(), "little")
        self.fingerprint %= FINGERPRINT_MODULUS

    def _rehearse(self, batch: Batch) -> None:
        """One forward and backward whose results are thrown away.

        DDP arranges its buckets anew after the first backward. With three or more processes the new arrangement adds
        gradients in another order, so a restarted run would differ in its first step if that were not over before.
        """
        buffers = {name: buffer.clone() for name, buffer in self.task.model.named_buffers()}
        torch.manual_seed(mix(self.recipe.train.seed, Use.STEP, 0, self.rank))
        self._backward(self._to_device(batch), 1.0)
        self.optimizer.zero_grad()
        for name, buffer in self.task.model.named_buffers():
            buffer.copy_(buffers[name])

    # ------------------------------------------------------------ what is done now and then

    def _log_training(self) -> None:
        """Writes a train line: means since the last one."""
        now = time.monotonic()
        rate = (self.step - self._logged_step) * self.clock.batch_size / max(now - self._logged_at, 1e-9)
        self._logged_step, self._logged_at = self.step, now
        means = {name: float(value) / self.window_steps for name, value in self.window.items()}
        self.window, self.window_steps = {}, 0
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
            self.progress.train(line)

    def _check_finite(self, terms: dict[str, float]) -> None:
        for name, value in terms.items():
            if not abs(value) < float("inf"):
                raise TrainingFailed(
                    f"{name} is {value} in the steps up to {self.step}: lower optimizer.lr, set train.clip_norm=1.0, "
                    "or use train.precision=fp32; the last checkpoint is from before"
                )

    def _evaluate(self) -> bool:
        """Evaluates on the whole validation set; returns whether `evaluate.best` improved."""
        model = self.ema.model if self.ema else self.task.model
        forward = self._forward(model)
        metrics = evaluate(self.task, model, forward, self.valid_batches, self.valid_samples, self._to_device)
        improved = self._is_best(metrics.get(self.recipe.evaluate.best))
        if self.is_main:
            line = self._line("validation") | metrics
            self.folder.log(line)
            self.mirrors.log(line, self.step, "validation")
            figures = "  ".join(f"{name} {metrics[name]:.4f}" for name in self.task.metric_names if name in metrics)
            self.progress.say(f"step {self.step:6d}  validation: {figures}{'  (best so far)' if improved else ''}")
            self._draw_pictures(forward)
        set_train_mode(self.task.model)
        return improved

    def _is_best(self, value: float | None) -> bool:
        """Whether the watched metric (None: it has no value on this set) is better than ever before; keeps it if so."""
        sign = -1.0 if lower_is_better(self.recipe.evaluate.best) else 1.0
        improved = value is not None and (self.best is None or sign * value > sign * self.best)
        if improved:
            self.best = value
        return improved

    @torch.no_grad()
    def _draw_pictures(self, forward: Callable[..., Any]) -> None:
        """Draws a few samples from all over the validation set, always the same ones, and the curves now and then."""
        size = len(self.valid_samples)
        count = min(self.recipe.evaluate.pictures, size)
        if count:
            batch = self._to_device(self.valid_samples.__getitems__([i * size // count for i in range(count)]))
            rows = self.task.pictures(forward, batch).cpu()
            file = self.folder.pictures / f"validation_step_{self.step:08d}.png"
            Image.fromarray(rows.permute(0, 2, 3, 1).flatten(0, 1).numpy()).save(file)  # one below the other
            self.mirrors.pictures([file], self.step)
        if time.monotonic() - self._curves_drawn > CURVES_EVERY_S:
            self._draw_curves()

    def _draw_curves(self) -> None:
        draw_curves(self.folder.read_metrics(), self.folder.pictures / "curves.png")
        self._curves_drawn = time.monotonic()

    # ------------------------------------------------------------ saving and restoring

    def _save(self, best: bool) -> None:
        """Saves the state of the run; all processes take part in collecting it, rank 0 writes it."""
        fingerprint = self._global_fingerprint()
        terms = {name: float(value) for name, value in self.window.items()}
        self._check_finite(terms)
        if not self.is_main:
            return
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "fingerprint": fingerprint,
            "window": terms,
            "window_steps": self.window_steps,
            "best": self.best,
            "scaler": scaler.state_dict() if scaler else None,
            "world_size": self.world_size,
            "threads": torch.get_num_threads(),
        }
        saved = Checkpoint(
            model=checkpoints.snapshot(self.task.model),
            ema=checkpoints.snapshot(self.ema.model) if self.ema else None,
            optimizer=checkpoints.optimizer_tensors(self.optimizer.optimizer, self.names),
            trainer=state,
        )
        try:
            checkpoints.save(self.folder.checkpoints, saved, self.recipe.checkpoint.keep, best)
        except OSError as error:
            raise UserError(f"the checkpoint of step {self.step} can't be written to {self.folder.checkpoints}: {error.strerror or error}") from error
        self._write_summary("running")

    def _restore(self, saved: Checkpoint) -> None:
        """Puts a checkpoint's state in place."""
        state = saved.trainer
        self.task.model.load_state_dict(saved.model)
        if self.ema and saved.ema:
            self.ema.model.load_state_dict(saved.ema)
        checkpoints.load_optimizer(self.optimizer.optimizer, saved.optimizer, self.names)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
        self.fingerprint = state["fingerprint"] if self.is_main else 0
        self.window = {name: torch.tensor(value, dtype=torch.float64, device=self.device) for name, value in state["window"].items()}
        self.window_steps = state["window_steps"]
        self.progress.say(f"resumed {self.recipe.name} from step {self.step}")
        before, now = (state["world_size"], state["threads"]), (self.world_size, torch.get_num_threads())
        if before != now:
            what = "processes and threads a process"
            self.progress.say(f"saved with {before[0]} x {before[1]}, going on with {now[0]} x {now[1]} {what}: same batches, but roundings may differ")

    # ------------------------------------------------------------ beginning and end

    def _open_run(self, resume: str) -> Path | None:
        """On rank 0: takes the run folder; returns the checkpoint to go on from."""
        self._lock = lock_run(self.folder)
        found = open_run(self.folder, self.recipe, resume, self.progress.say)
        precision = resolve_precision(self.recipe.train.precision)
        self.folder.write_environment(environment() | {"precision": precision, "device": str(self.device)})
        return found

    def _begin(self) -> None:
        """Opens the mirrors and the progress bar, and starts the clock."""
        if self.is_main:
            self._write_summary("running")
            self.mirrors = Mirrors(self.recipe.trackers, self.folder.path, self.recipe.name, self.recipe.resolved())
        self.progress.start(self.clock.total_steps, self.step)
        self._curves_drawn = self._logged_at = time.monotonic()
        self._logged_step = self.step
        self._started = self._logged_at - self.seconds

    def _write_summary(self, status: Status) -> dict[str, Any]:
        rate = self.step * self.recipe.data.batch_size / self.seconds if self.seconds else 0.0
        return self.folder.write_summary(status, seconds=self.seconds, samples_per_second=rate, world_size=self.world_size)

    def _close(self, status: Status) -> None:
        """Says how the run ended, in the run folder, to the mirrors and to people."""
        self.progress.close()
        if not self.is_main:
            return
        summary = self._write_summary(status)
        if self.step:
            self._draw_curves()
        self.mirrors.finish(summary)
        if status == "stopped":
            self.progress.say(f"stopped on {STOP.signal_name or 'a signal'} at step {self.step}, checkpoint saved; the same command goes on from there")
        elif status == "finished":
            best = summary["best"].get(self.recipe.evaluate.best)
            figure = f", best {self.recipe.evaluate.best} {best['value']:.4f} at step {best['step']}" if best else ""
            self.progress.say(f"finished {self.recipe.name}: {self.step} steps in {self.seconds:.0f} s{figure}; see {self.folder.path}")
        self._lock.release()

    # ------------------------------------------------------------ small things

    @property
    def _local_processes(self) -> int:
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def _elapsed(self) -> float:
        """Seconds of training; rank 0's clock is the run's."""
        return time.monotonic() - self._started if self.is_main else 0.0

    def _due(self, every: Any, seconds_before: float) -> bool:
        return self.clock.due(every, self.step, self.seconds, seconds_before)

    def _line(self, split: str) -> dict[str, Any]:
        return {"step": self.step, "epoch": self.step * self.clock.batch_size / self.clock.dataset_size, "split": split}

    def _global_fingerprint(self) -> int:
        return self.control.sum([self.fingerprint])[0] % FINGERPRINT_MODULUS

    def _to_device(self, batch: Batch) -> Batch:
        """Moves what the model sees; ids stay where they are."""
        stay = ("sample_id", "epoch")
        return {key: value.to(self.device, non_blocking=True) if key not in stay else value for key, value in batch.items()}

    def _forward(self, model: nn.Module) -> Callable[..., Any]:
        """Calls a bare model as the wrapped one is called in training: under autocast, with fp32 outputs."""

        def call(*inputs: Any) -> Any:
            with self.accelerator.autocast():
                return convert_to_fp32(model(*inputs))

        return call

    def _on_main(self, decide: Callable[[], Path | None]) -> Path | None:
        """Rank 0 decides on a path below the runs folder and tells the others; where it can't, all end with its error."""
        if self.world_size == 1:
            return decide()
        text, failure = "", None
        if self.is_main:
            try:
                text = str(decide() or "")
            except UserError as error:
                failure = error
        encoded = list(text.encode())
        length = self.control.from_main([len(encoded) if failure is None else -1])[0]
        if length < 0:
            raise failure or UserError("rank 0 refused to start the run")
        path = bytes(self.control.from_main(encoded if self.is_main else [0] * length)).decode()
        return Path(path) if path else None
