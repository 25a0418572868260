"""The Trainer: one loop for every task, on any number of processes.

`Trainer.fit` is the whole of it; the other methods follow in the order in which it calls them. Every process runs this
file. Rank 0 alone writes files and prints. What happens inside an optimizer step is in `optim/learner.py`.

Everything random is seeded from (seed, step, rank) or (seed, position in the data order), and the learning rate is a
function of progress and evaluations. So a checkpoint holds weights, moving average, optimizer state and a few counters,
and a run resumed from it on as many processes ends with the same bits as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from trainer.data.build import Data
from trainer.data.prepare import archives_dir, data_dir, ensure_prepared
from trainer.data.sample_log import SampleLog
from trainer.distributed.accelerator import as_in_training, build_accelerator, launched_as, why_bits_may_differ
from trainer.distributed.control import Control
from trainer.distributed.failures import failures_reported, reported_to_peers
from trainer.distributed.watchdog import Watchdog
from trainer.errors import TrainingFailed
from trainer.metrics.best import Best
from trainer.metrics.means import Means
from trainer.models.freeze import set_train_mode
from trainer.optim.learner import Learner
from trainer.optim.schedules import build_schedule
from trainer.recipe.durations import Clock, Span
from trainer.recipe.recipe import Recipe
from trainer.reporting.reporter import Reporter
from trainer.reporting.stopwatch import Stopwatch
from trainer.runs.checkpoint import read_counters
from trainer.runs.folder import Line, RunFolder, Status, runs_dir
from trainer.runs.lock import lock_run
from trainer.runs.resume import open_run
from trainer.runs.state import Checkpoint
from trainer.runs.train_state import TrainState
from trainer.runs.writer import Writer
from trainer.signals import STOP, Stopped, TimeLimit
from trainer.tasks import evaluation
from trainer.tasks.build import build_task
from trainer.tasks.checks import check_sizes
from trainer.tasks.task import Batch, Forward


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
        self.is_main = self.rank == 0
        self.folder = RunFolder(runs_dir() / recipe.name)
        self.report = Reporter(self.folder, recipe, self.is_main)
        self.writer = Writer(self.folder, recipe.checkpoint.keep)
        self.state = TrainState(Best(recipe.evaluate.best))
        # Before anything that waits for another rank, which may never start.
        timeout_s = 60 * float(recipe.train.timeout.value)  # the recipe has it in minutes
        self.watchdog = Watchdog(self.rank, self.world_size, timeout_s, on_failure=self.fail)
        with reported_to_peers(self.watchdog, self.world_size):
            self.accelerator = build_accelerator(recipe)
            self.control = Control()  # small messages between the processes
        self.device = self.accelerator.device
        self.samples = SampleLog(self.control, recipe.data.max_unreadable)
        self.means = Means()  # of the loss terms, since the last train line
        self.stopping = False  # whether a stop was requested of any process
        self.limit_near = False  # whether the job's time limit has just come near

    def fit(self) -> Status:
        """Trains until the duration has passed or a stop is requested; returns `finished` or `stopped`.

        Raises:
            UserError: the run can't be what the recipe asks for.
            TrainingFailed: a value isn't finite, a sample unreadable, a checkpoint unwritable, the memory too small.
            Stopped: a stop was requested before the first step, so there is nothing new to save.
        """
        with failures_reported(self.watchdog, self.fail, self.recipe, self.world_size, self.folder.path):
            checkpoint_folder = self.open_run()
            self.build()
            if self.is_over and not self.state.evaluation_pending:
                return self.already_finished()
            self.begin(checkpoint_folder)
            if self.state.evaluation_pending:  # a stop interrupted the evaluation after this step
                self.evaluate()
                self.save()
            while not (self.is_over or self.stopping):
                self.train_step()
                self.agree()
                if self.is_due(self.recipe.train.log_every):
                    self.log()
                if self.is_due(self.recipe.evaluate.every):
                    self.evaluate()
                if self.is_due(self.recipe.checkpoint.every) or self.is_best or self.limit_near or self.stopping:
                    self.save()
            return self.end()

    # ------------------------------------------------------------ before the first step

    def open_run(self) -> Path | None:
        """Takes the run folder; returns the checkpoint to resume from. Restores its counters, but no tensors yet."""
        self.watchdog.enter("preparing", patient=True)  # may take hours: a data set may have to be downloaded
        folder = self.control.on_main(self._lock_and_open)  # to the other ranks it comes as text
        if not folder:
            return None
        counters = read_counters(Path(folder))
        self.state.restore(counters)
        self.samples.restore(counters, self.is_main)
        self.means.restore(counters["means"], self.device)
        return Path(folder)

    def _lock_and_open(self) -> Path | None:
        self.folder.lock = lock_run(self.folder.path)  # until this process ends, however it does
        return open_run(self.folder, self.recipe, self.resume, self.report.say)

    def build(self) -> None:
        """Prepares the data set where it is missing; builds data, task and learner."""
        recipe, source = self.recipe, self.recipe.source
        self.control.on_main(lambda: ensure_prepared(source, data_dir(), archives_dir(), self.report.say).name)
        self.data = Data(recipe, self.rank, self.world_size, self.device)
        self.clock = Clock(recipe.train.duration, recipe.data.batch_size, self.data.order.size)
        self.control.main_first(self._build_task)  # what rank 0 downloads, the others find
        schedule = build_schedule(recipe, self.clock, self.state.best)
        self.learner = Learner(self.task, recipe, self.accelerator, schedule, self.data.train.uniform)

    def _build_task(self) -> None:
        self.task = build_task(self.recipe, self.data.info)
        check_sizes(self.recipe, self.task.model)

    def already_finished(self) -> Status:
        """Reports that nothing is left to train."""
        self.report.summary("finished", **self.facts())  # it still says "running" if killed right after the last save
        self.report.already_finished(self.state.step)
        return "finished"

    def begin(self, checkpoint_folder: Path | None) -> None:
        """Restores the state of a resumed run, opens trackers and progress bar, and starts the clock.

        Raises:
            Stopped: a stop was requested meanwhile.
        """
        self.batches = self.data.train_batches(self.state.step)
        if self.world_size > 1:
            first = next(self.batches)
            self.enter("first forward and backward")
            self.learner.rehearse(first)  # changes nothing but how DDP adds up gradients from then on
            self.batches = chain([first], self.batches)
        self.enter("restoring")
        if checkpoint_folder:
            self.restore(checkpoint_folder)
        if not self.may_continue("waiting for the other ranks"):
            raise Stopped
        self.report.summary("running", **self.facts())
        self.report.begin(self.state.step, self.clock.total_steps, self.device, self.data.description())
        self.time_limit = TimeLimit()
        self.stopwatch = Stopwatch(self.state.step, self.state.seconds)

    def restore(self, folder: Path) -> None:
        """Restores weights, moving average and optimizer from a checkpoint of the same data."""
        checkpoint = Checkpoint.load(folder)
        self.data.check_unchanged(checkpoint.counters.get("data"))
        self.learner.restore(checkpoint)
        if self.is_main:
            self.folder.checkpoints.link_best(self.state.best.step)
        self.report.resumed(self.state.step, why_bits_may_differ(checkpoint.counters, self.world_size, self.device))

    # ------------------------------------------------------------ the loop

    def train_step(self) -> None:
        """One optimizer step on `data.batch_size` samples, over all processes and micro-batches."""
        self.seconds_before = self.state.seconds  # for `is_due`
        step, progress = self.state.step, self.clock.progress(self.state.step, self.state.seconds)
        terms, verdict = self.learner.step(step, progress, self.micro_batches())
        self.means.add(terms, verdict.is_good)
        self.state.step += 1
        if not verdict.call_optimizer:  # else a bad step becomes known when the host next waits for the device
            self.check_skipped()
        self.writer.check()  # raises if a checkpoint couldn't be written
        self.report.step(self.state.step)

    def micro_batches(self) -> Iterator[Batch]:
        """This process's share of an optimizer step."""
        for _ in range(self.recipe.train.accumulate):
            self.enter("reading data")
            batch = next(self.batches)
            self.samples.add(self.state.step, batch)
            self.enter("forward and backward")
            yield batch

    def agree(self) -> None:
        """Shares rank 0's clock, whether any process received a stop signal, and whether the time limit is near."""
        self.enter("waiting for the other ranks")
        mine = [self.time_limit.comes_near(), self.stopwatch.seconds()] if self.is_main else [False, 0.0]
        stop, near, self.state.seconds = self.control.maximum([STOP.is_requested, *mine])
        self.stopping, self.limit_near = bool(stop), bool(near)
        if self.limit_near:
            self.report.time_limit_near(self.state.step)

    def is_due(self, every: Span) -> bool:
        """Whether the step just done completed another `every`, or the training is over."""
        return self.is_over or self.clock.due(every, self.state.step, self.state.seconds, self.seconds_before)

    @property
    def is_over(self) -> bool:
        """Whether the training duration has passed, or too many evaluations since the best one."""
        patience = self.recipe.evaluate.stop_after
        stale = patience is not None and self.state.best.stale >= patience
        return stale or self.clock.finished(self.state.step, self.state.seconds)

    @property
    def is_best(self) -> bool:
        """Whether the evaluation after this step is the best so far."""
        return self.state.best.step == self.state.step

    def log(self) -> None:
        """Writes a train line: means since the last one, equal on all processes."""
        self.enter("logging")
        self.check_skipped()
        self.samples.gather()
        line = self.new_line("train") | {
            "samples": self.state.step * self.clock.batch_size,
            "data_fingerprint": f"{self.samples.fingerprint():016x}",
            **self.means.take(),
            "learning_rate": self.learner.learning_rate,
            "samples_per_second": self.stopwatch.steps_per_second(self.state.step) * self.clock.batch_size,
            "seconds": self.state.seconds,
        }
        if self.state.num_skipped:
            line["num_skipped_steps"] = self.state.num_skipped
        if self.samples.unreadable:
            line["num_unreadable"] = len(self.samples.unreadable)
        self.report.train(line)

    def check_skipped(self) -> None:
        """Counts skipped steps; reports those that weren't finite, or ends the training. Waits for the device."""
        finding = self.learner.guard.look()
        self.state.num_skipped += finding.num_skipped
        if finding.what:
            description = finding.describe(self.data.sample_ids, self.control)
            if self.recipe.train.non_finite == "error":
                raise TrainingFailed(f"{description}; no weight was changed: {finding.advice}")
            self.report.skipped(description, self.state.num_skipped, finding.advice)

    def evaluate(self) -> None:
        """Evaluates on the whole validation set. An interrupted evaluation is pending: the resumed run repeats it."""
        self.state.evaluation_pending = True
        if self.stopping:
            return
        with self.stopwatch.paused():
            self.check_skipped()
            model = self.learner.evaluation_model
            forward = as_in_training(self.accelerator, model)
            metrics = evaluation.evaluate(self.task, model, forward, self.data, lambda: self.may_continue("evaluating"))
            if metrics is None:
                self.stopping = True
                return
            self.state.evaluation_pending = False
            # Rank 0 decides for all: a rounding error between different GPUs must not make ranks diverge.
            value = metrics.get(self.recipe.evaluate.best)  # None where it is undefined, e.g. for an absent class
            improved = bool(self.control.from_main([self.state.best.is_improved_by(value)])[0])
            self.state.best.add(value, self.state.step, improved)
            line = self.new_line("validation") | metrics
            self.report.validation(line, self.task.metric_names, improved, self.task.advice(metrics))
            self.enter("drawing pictures")
            if self.is_main and self.recipe.evaluate.pictures:
                self.draw(line, forward)
            set_train_mode(self.learner.model)  # an evaluation leaves it in eval mode

    @torch.no_grad()
    def draw(self, line: Line, forward: Forward) -> None:
        """Draws a few validation samples, always the same ones, on rank 0 alone."""
        shown = self.data.validation.spread(self.recipe.evaluate.pictures)
        batches = (self.data.validation_batch([sample_id]) for sample_id in shown)  # they may differ in size
        samples = [picture for batch in batches for picture in self.task.pictures(forward, batch)]
        self.report.pictures(line, samples, self.task.panels, self.task.legend)

    def save(self) -> None:
        """Saves the state of the run: rank 0 copies it, and a thread writes the copy."""
        self.enter("saving")
        with self.stopwatch.paused():
            self.check_skipped()
            self.samples.gather()
            self.learner.check_finite(self.state.step)
            counters = {**self.state.counters(), **self.samples.counters(), "means": self.means.state()}
            counters |= {"world_size": self.world_size, "threads": torch.get_num_threads(), "data": self.data.identity}
            if self.is_main:
                self.writer.wait()  # one copy in memory at a time
                self.writer.write(self.learner.checkpoint(counters), self.is_best)
                self.report.summary("running", **self.facts())

    # ------------------------------------------------------------ after the last step

    def end(self) -> Status:
        """Waits for the last checkpoint, then reports how the run ended."""
        self.enter("ending")
        self.writer.wait()
        if self.stopping:
            self.report.stopped(self.resume, self.facts())
            return "stopped"
        is_early = not self.clock.finished(self.state.step, self.state.seconds)
        self.report.finished(self.state.best.stale if is_early else None, self.facts())
        return "finished"

    def fail(self, error: BaseException) -> None:
        """Records in run folder and trackers why training failed; the watchdog may call it from its thread."""
        with suppress(TrainingFailed):  # the first error is the one to report
            self.writer.wait(seconds=60.0)
        self.report.failed(error, self.facts() if self.report.is_open else {})

    # ------------------------------------------------------------ used throughout

    def enter(self, phase: str) -> None:
        """Tells the watchdog what comes next."""
        self.watchdog.enter(phase, self.state.step)

    def may_continue(self, phase: str) -> bool:
        """Whether no process was asked to stop."""
        self.enter(phase)
        return not self.control.maximum([STOP.is_requested])[0]

    def new_line(self, split: str) -> Line:
        """The beginning of a line of the metrics."""
        step = self.state.step
        return {"step": step, "epoch": step * self.clock.batch_size / self.clock.dataset_size, "split": split}

    def facts(self) -> dict[str, Any]:
        """What summary.json holds besides metrics."""
        step, seconds, unreadable = self.state.step, self.state.seconds, self.samples.unreadable
        facts: dict[str, Any] = {
            "step": step,
            "total_steps": self.clock.total_steps,
            "seconds": seconds,
            "samples_per_second": step * self.clock.batch_size / seconds if seconds else 0.0,
            "world_size": self.world_size,
        }
        facts |= {"skipped_steps": self.state.num_skipped} if self.state.num_skipped else {}
        return facts | ({"unreadable": unreadable} if unreadable else {})
