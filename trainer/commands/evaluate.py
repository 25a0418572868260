"""`trainer evaluate RUN`: the metrics of a trained model, on its own set or another one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where it is used: `trainer --help` must not wait for torch
    from trainer.inference.evaluation import Evaluation

HELP = "measure a trained model on a split of its data set, or of another one with the same classes"
EXAMPLES = """for example
  trainer evaluate quickstart
  trainer evaluate quickstart --split test --out metrics.json
  trainer evaluate quickstart data.name=folder data.set=mine evaluate.batch_size=4
on several processes, which give the same metrics
  accelerate launch --config_file accelerate_config.yaml --num_processes 2 -m trainer evaluate quickstart"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this verb."""
    parser.usage = "trainer evaluate RUN [key.path=value …] [options]"
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", metavar="RUN", help="a run's name or folder, or a checkpoint folder")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="changes to the run's recipe: data.* (e.g. another set), evaluate.batch_size, train.precision, "
        "train.threads",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="best|last|NAME",
        help="of the run, e.g. step_00000100 (default: best, or last where the run has no best one)",
    )
    parser.add_argument(
        "--split",
        choices=("validation", "test", "train"),
        default="validation",
        help="what to evaluate on, always without augmentation (default: validation)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all metrics to this file")
    parser.add_argument(
        "--predictions",
        type=Path,
        metavar="PATH",
        help="write the predictions, at the size of the network's input: for objects a COCO result file, e.g. p.json, "
        "with the ground truth in p.annotations.json; else a new folder of PNG files (class indices or colours)",
    )


def run(options: argparse.Namespace) -> None:
    """Evaluates; prints a table and writes the files.

    Raises:
        UserError: the run, an override or an option is wrong.
        TrainingFailed: out of memory, or a sample can't be read.
    """
    import os

    from trainer.distributed.accelerator import leave_processes
    from trainer.errors import UserError
    from trainer.inference.evaluation import evaluate_trained
    from trainer.inference.predictions import check_parent
    from trainer.inference.trained import find_trained
    from trainer.runs.durable import atomic_write
    from trainer.runs.folder import pretty
    from trainer.runs.published import MODEL

    if options.checkpoint and (Path(options.run) / MODEL).is_file():
        raise UserError(f"--checkpoint {options.checkpoint}: {options.run} is a checkpoint already; leave it out")
    if options.out:
        check_parent("--out", options.out)
    trained = find_trained(options.run, options.checkpoint or "best")
    failed = True
    try:
        evaluation = evaluate_trained(trained, options.split, options.overrides, options.predictions)
        failed = False
    finally:
        leave_processes(failed)
    if os.environ.get("RANK", "0") != "0":
        return
    print(table(evaluation))
    if options.out:
        try:
            atomic_write(options.out, pretty(evaluation.as_dict()))
        except OSError as error:
            raise UserError(f"--out {options.out}: can't be written: {error.strerror or error}") from error


def table(evaluation: Evaluation) -> str:
    """What was evaluated, the metrics that people look at before the others, and those of each class."""
    trained = evaluation.trained
    title = f"{trained.name}, step {trained.step}: {evaluation.split} split of {evaluation.data}"
    metrics = {name: value for name, value in evaluation.metrics.items() if isinstance(value, int | float)}
    others = (name for name in metrics if "/" not in name and not name.startswith("num_"))
    names = [name for name in dict.fromkeys([*evaluation.headline, *others]) if name in metrics]
    rows = [[name, f"{metrics[name]:.4f}"] for name in names]
    by_class = _by_class(metrics)
    parts = [f"{title}, {evaluation.samples} samples", *aligned(rows)]
    if by_class:
        classes = dict.fromkeys(name for values in by_class.values() for name in values)
        columns = [
            [f"{values[name]:.4f}" if name in values else "" for name in classes] for values in by_class.values()
        ]
        parts += ["", *aligned([["class", *by_class], *map(list, zip(classes, *columns, strict=True))])]
    return "\n".join(parts)


def _by_class(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Metrics such as `iou/flower`, by the name of the metric and of the class."""
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        metric, slash, label = name.partition("/")
        if slash:
            found.setdefault(metric, {})[label] = value
    return found


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns: the first to the left, the others, which hold numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]
