"""`trainer check`: is a recipe valid, and what will it do?"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where it is used: `trainer --help` must not wait for torch
    from torch import Tensor

    from trainer.data.build import Data
    from trainer.recipe.recipe import Recipe

HELP = "validate recipes and their data; print the resolved recipe"
SHOWN_SAMPLES, SHOWN_EPOCHS = 4, 4
MAX_SIDE = 512  # of the picture of a sample, in pixels
OPACITY = 0.65  # of the class colours over the image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this verb."""
    parser.add_argument(
        "recipes", nargs="+", metavar="RECIPE | key.path=value", help="recipe files, and overrides for all of them"
    )
    parser.add_argument(
        "--num_processes",
        "--num-processes",
        type=int,
        help="check for this many processes (default: from the launch file)",
    )
    parser.add_argument(
        "--config_file",
        type=Path,
        default=None,
        help="launch file to check against (default: accelerate_config.yaml)",
    )
    parser.add_argument(
        "--anchors",
        action="store_true",
        help="print how many training boxes the model's anchors fit, and suggest better anchors",
    )
    parser.add_argument(
        "--show-samples",
        type=Path,
        metavar="OUT.png",
        help="draw training samples, original and augmented, to this file",
    )


def run(options: argparse.Namespace) -> None:
    """Checks every recipe; raises `UserError` with all problems of all of them."""
    from dataclasses import replace

    from ruamel.yaml import YAML

    from trainer.distributed.launch import LAUNCH_FILE, Launch
    from trainer.errors import UserError
    from trainer.recipe.file import RecipeError
    from trainer.recipe.load import load_recipe
    from trainer.tasks.checks import TASK_CHECKS, batch_checks

    paths = [argument for argument in options.recipes if "=" not in argument]
    overrides = [argument for argument in options.recipes if "=" in argument]
    if not paths:
        raise UserError("give at least one recipe file")
    if options.config_file and not options.config_file.is_file():
        raise UserError(f"--config_file {options.config_file}: no such file")
    if options.anchors and len(paths) > 1:
        raise UserError("--anchors: give only one recipe")
    if options.show_samples and (options.show_samples.suffix != ".png" or len(paths) > 1):
        raise UserError(f"--show-samples {options.show_samples}: give a .png file and only one recipe")
    launch = Launch.read(file=options.config_file or LAUNCH_FILE)
    launch = replace(launch, processes=options.num_processes or max(launch.processes, launch.file_processes))
    recipes: list[Recipe] = []
    problems = []
    for path in paths:
        try:
            recipes.append(
                load_recipe(path, overrides, [*launch.checks(), *TASK_CHECKS, *batch_checks(launch.processes)])
            )
        except RecipeError as error:
            problems.extend(error.problems)
    if problems:
        raise RecipeError(problems)
    for recipe in recipes:
        text = io.StringIO()
        YAML().dump(recipe.resolved(), text)
        print("---\n" * (len(recipes) > 1) + text.getvalue(), end="")
        for line in recipe.dropped:
            print(line, file=sys.stderr)
        print(f"{recipe.path}: ok", _data_line(recipe, launch.processes), sep="; ", file=sys.stderr)
    if options.anchors:
        _compare_anchors(recipes[0])
    if options.show_samples:
        _show_samples(recipes[0], options.show_samples)


def _data_line(recipe: Recipe, processes: int) -> str:
    """The contents of the recipe's data set and the cost of reading it, or how to prepare it."""
    from trainer.data.card import CARD, Card
    from trainer.data.order import Order, read_amplification
    from trainer.data.prepare import data_dir
    from trainer.distributed.accelerator import num_workers
    from trainer.recipe.durations import Clock

    source = recipe.source
    folder = data_dir() / source.name
    if not (folder / CARD).exists():
        return (
            f"{source.name} is not prepared yet: run `trainer prepare {source.command or source.name}`, or just train"
        )
    card = Card.load(folder, source.command)
    card.verify(folder, everything=False)
    order = Order(card.row_groups("train"), recipe.train.seed, recipe.data.window)
    clock = Clock(recipe.train.duration, recipe.data.batch_size, order.size)
    workers = num_workers(recipe.data.workers, processes)
    amplification = read_amplification(order, recipe.data.batch_size, recipe.train.accumulate, processes, workers)
    rows = ", ".join(f"{split} {held.rows}" for split, held in card.splits.items())
    return (
        f"{card.name}: {rows} rows; {clock.total_steps or 'an unknown number of'} steps; "
        f"the first epoch reads {amplification:.1f} rows for each row used ({processes} processes, {workers} workers)"
    )


# ---------------------------------------------------------------- --anchors


def _compare_anchors(recipe: Recipe) -> None:
    """Prints how many boxes of the training set, resized as in training, the model's anchors fit, and how many
    re-estimated anchors would.
    """
    import numpy as np

    from trainer.detection.anchors import best_possible_recall, estimate_anchors
    from trainer.errors import UserError
    from trainer.models.yolo import PUBLISHED_ANCHORS

    data = _uncached(recipe)
    max_ratio = getattr(recipe.loss, "max_ratio", None)
    if (
        "anchors" not in recipe.components["model"].schema.model_fields
        or max_ratio is None
        or data.train.reader.objects is None
    ):
        raise UserError(
            f"--anchors: {recipe.path} doesn't train a detection model with anchors on boxes; choose a recipe that does"
        )
    sizes = data.train.reader.objects.box_sizes()
    anchors = getattr(recipe.model, "anchors", None) or PUBLISHED_ANCHORS
    estimated = estimate_anchors(sizes).round(1).reshape(3, 3, 2)
    for label, candidates in (("the model's", np.array(anchors)), ("re-estimated", estimated)):
        share = best_possible_recall(sizes, candidates.reshape(-1, 2), max_ratio)
        print(
            f"{label} anchors fit {share:.2%} of {len(sizes)} boxes: model.anchors={json.dumps(candidates.tolist())}",
            file=sys.stderr,
        )


def _uncached(recipe: Recipe) -> Data:
    """The prepared data as one process reads it, without the pixel cache, which would decode all samples."""
    import copy

    import torch

    from trainer.data.build import Data
    from trainer.data.card import Card
    from trainer.data.prepare import data_dir

    source = recipe.source
    Card.load(data_dir() / source.name, source.command)
    uncached = copy.copy(recipe)
    uncached.data = recipe.data.model_copy(update={"cache": "off"})
    return Data(uncached, 0, 1, torch.device("cpu"))


# ---------------------------------------------------------------- --show-samples


def _show_samples(recipe: Recipe, file: Path) -> None:
    """Draws a few training samples, original and augmented as in each of the first epochs, with their objects drawn in
    or their masks below.
    """
    import torch

    from trainer.data.stream import TrainingSamples
    from trainer.detection.boxes import Detections
    from trainer.errors import UserError
    from trainer.reporting.figures import save_sheet
    from trainer.tasks.drawing import class_colors, draw_objects

    data = _uncached(recipe)
    if "image" not in data.train.reader.columns:
        raise UserError(f"--show-samples: {recipe.path}: the samples of {recipe.data.name} have no `image`")
    plain = TrainingSamples(data.train.reader, data.order)
    size = data.order.size
    # For each epoch, the position of each sample in the data order.
    positions = [
        {data.order.sample(p)[1]: p for p in range(epoch * size, (epoch + 1) * size)} for epoch in range(SHOWN_EPOCHS)
    ]
    shown = list(positions[0])[:SHOWN_SAMPLES]
    rows: list[list[Tensor]] = []
    seen_classes: set[int] = set()
    for sample_id in shown:
        views = [plain.batch([positions[0][sample_id]]), *(data.train.batch([epoch[sample_id]]) for epoch in positions)]
        rows.append([view["image"][0] for view in views])
        if "mask" in views[0]:
            rows.append([_painted(view["image"][0], view["mask"][0], data.info.num_classes) for view in views])
            seen_classes |= set(views[0]["mask"].unique().tolist()) - {data.info.ignore_index}
        if "boxes" in views[0]:
            ground_truth = [
                Detections(view["boxes"], torch.ones(len(view["boxes"])), view["labels"], view.get("masks"))
                for view in views
            ]
            rows[-1] = [
                draw_objects(image, objects, data.info.classes, with_scores=False)
                for image, objects in zip(rows[-1], ground_truth, strict=True)
            ]
    headings = ["original", *(f"epoch {epoch + 1}" for epoch in range(SHOWN_EPOCHS))]
    colors = class_colors(data.info.num_classes)
    legend = {data.info.classes[index]: colors[index] for index in sorted(seen_classes)}
    try:
        save_sheet([[_fitted(panel) for panel in row] for row in rows], file, headings, legend)
    except OSError as error:
        raise UserError(f"--show-samples {file} can't be written: {error.strerror or error}") from error
    print(f"drew {len(shown)} training samples to {file}", file=sys.stderr)


def _fitted(image: Tensor) -> Tensor:
    """An image (3, H, W), scaled down if a side is longer than `MAX_SIDE`."""
    from torchvision.transforms.v2.functional import resize

    scale = MAX_SIDE / max(image.shape[1:])
    return resize(image, [max(1, round(scale * side)) for side in image.shape[1:]]) if scale < 1 else image


def _painted(image: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """The class colours of a mask (1, H, W) over its image uint8 (3, H, W); ignored pixels stay unpainted."""
    import torch
    from torchvision.utils import draw_segmentation_masks

    from trainer.tasks.drawing import class_colors

    painted: Tensor = draw_segmentation_masks(
        image, mask == torch.arange(num_classes).view(-1, 1, 1), alpha=OPACITY, colors=class_colors(num_classes)
    )
    return painted
