"""`trainer summary`: the size of a recipe's network, and the cost of training it."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where it is used: `trainer --help` must not wait for torch
    from torch import nn

    from trainer.profiling.arithmetic import Layer
    from trainer.recipe.recipe import Recipe

HELP = "count the weights, outputs, connections and FLOPs of each layer, and measure the memory of training"
COUNTS = ("weights", "outputs", "connections", "flops", "trainable")
MAX_NAMED = 4  # layers that a label lists
# Sizes at which weights, outputs and connections are counted to fit the polynomials.
VARIABLES = {"NIC": (1, 2, 3), "NF": (4, 8, 12), "NC": (3, 5, 9)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this verb."""
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. model.train_only=[classifier.4]")
    parser.add_argument("--input-size", metavar="HxW", help="height and width of an image (default: as in training)")
    parser.add_argument(
        "--no-measure",
        action="store_true",
        help="only count; don't run training steps to measure memory and time",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    """Prints the tables.

    Raises:
        UserError: the recipe is invalid, its samples aren't images, or the size of its images is unknown.
    """
    from trainer.data.roles import has_pixels
    from trainer.errors import UserError
    from trainer.models.freeze import train_only
    from trainer.profiling.arithmetic import layers
    from trainer.recipe.load import load_recipe
    from trainer.tasks.build import build_untrained, trainable_layers
    from trainer.tasks.checks import TASK_CHECKS

    recipe = load_recipe(options.recipe, options.overrides, TASK_CHECKS)
    if not has_pixels(recipe.source.columns):
        raise UserError(f"{options.recipe}: {recipe.data.name} has no images, but `trainer summary` counts per image")
    height, width = _input_size(recipe, options.input_size)
    model = build_untrained(recipe)
    trainable = trainable_layers(recipe, model)
    channels = _input_channels(model)

    def count(model: nn.Module) -> list[list[Layer]]:
        train_only(model, trainable)
        return [layers(model, (channels, factor * height, factor * width)) for factor in (1, 2)]

    try:
        single, doubled = count(model)
    except NotImplementedError:  # its computation depends on the values, which meta tensors don't have
        single, doubled = count(build_untrained(recipe, "cpu"))
    report: dict[str, Any] = {
        "recipe": str(options.recipe),
        "input": [channels, height, width],
        "layers": [asdict(layer) for layer in single],
        "totals": _totals(single),
        "totals_at_doubled_size": _totals(doubled),
    }
    if {"num_filters", "num_in_channels"} <= recipe.components["model"].schema.model_fields.keys():
        report["polynomials"] = _polynomials(recipe, height, width)
    if not options.no_measure:
        report["training"] = _measure(recipe, trainable, height, width)
    print(json.dumps(report, indent=2) if options.json else _text(report))


def _input_size(recipe: Recipe, given: str | None) -> tuple[int, int]:
    """Height and width: the given ones, else of the last crop or resize, else of the first prepared image."""
    from trainer.data.card import CARD, Card
    from trainer.data.parquet import RowGroups
    from trainer.data.prepare import data_dir
    from trainer.errors import UserError

    if given:
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", given)
        if not match:
            raise UserError(f"--input-size {given}: give height and width, e.g. 224x288")
        return int(match[1]), int(match[2])
    for _, settings in reversed(recipe.augmentations):
        if size := getattr(settings, "size", None):
            return int(size[0]), int(size[1])
    if recipe.data.resize:
        height, width = recipe.data.resize
        return height, width
    folder = data_dir() / recipe.source.name
    if not (folder / CARD).exists():
        raise UserError(
            f"{recipe.data.name} isn't prepared, so the size of its images is unknown: give --input-size HxW"
        )
    card = Card.load(folder)
    rows = RowGroups(
        {
            file: shard.row_groups
            for file, shard in zip(card.files(folder, "train"), card.splits["train"].files, strict=True)
        },
        keep=1,
    )
    return int(rows.integers("height")[0]), int(rows.integers("width")[0])


def _input_channels(model: nn.Module) -> int:
    """Input channels of the first layer with a 2-d kernel; 3 if there is none."""
    return next((parameter.shape[1] for parameter in model.parameters() if parameter.dim() == 4), 3)


def _totals(layers: list[Layer]) -> dict[str, int]:
    return {what: sum(getattr(layer, what) for layer in layers) for what in COUNTS}


def _polynomials(recipe: Recipe, height: int, width: int) -> dict[str, str]:
    """Totals as polynomials in input channels (NIC), filters (NF) and classes (NC), at the recipe's kernel."""
    import torch

    from trainer.profiling.arithmetic import layers, polynomial
    from trainer.recipe.recipe import build

    def count(NIC: int, NF: int, NC: int) -> dict[str, int]:
        with torch.device("meta"):
            settings = recipe.model.model_copy(update={"num_in_channels": NIC, "num_filters": NF})
            model = build(recipe.components["model"], settings, num_classes=NC)
        totals = _totals(layers(model, (NIC, height, width)))
        return {what: totals[what] for what in ("weights", "outputs", "connections")}

    return polynomial(count, VARIABLES)


def _measure(recipe: Recipe, trainable: list[str], height: int, width: int) -> list[dict[str, Any]]:
    """Cost of training all layers and of training only the recipe's trainable layers, at this size and at twice the
    height and width.
    """
    from trainer.data.card import CARD, Card
    from trainer.data.prepare import data_dir
    from trainer.distributed.accelerator import configure_backends
    from trainer.profiling.memory import measure

    configure_backends(recipe)
    source = recipe.source
    info = Card.load(data_dir() / source.name).info if (data_dir() / source.name / CARD).exists() else source.info
    trained: dict[str, list[str]] = {"everything": []}
    if trainable:
        few = len(trainable) <= MAX_NAMED
        trained[f"only {', '.join(trainable) if few else f'{trainable[0]} to {trainable[-1]}'}"] = trainable
    costs = []
    for size in ((height, width), (2 * height, 2 * width)):
        for label, layers in trained.items():
            cost = measure(recipe, info, layers, *size)
            costs.append({"trained": label, "input": size, "batch_size": recipe.data.batch_size, **asdict(cost)})
    return costs


def _text(report: dict[str, Any]) -> str:
    """The report as tables."""
    from trainer.reporting.table import table

    shape = "x".join(map(str, report["input"]))
    rows = [["layer", "kind", "output", *COUNTS]]
    rows += [
        [layer["name"], layer["kind"], "x".join(map(str, layer["shape"])), *(f"{layer[what]:,}" for what in COUNTS)]
        for layer in report["layers"]
    ]
    rows += [[f"total, {shape}", "", "", *(f"{report['totals'][what]:,}" for what in COUNTS)]]
    rows += [
        ["total, height and width doubled", "", "", *(f"{report['totals_at_doubled_size'][what]:,}" for what in COUNTS)]
    ]
    parts = ["\n".join(table(rows, left=3))]
    if "polynomials" in report:
        parts.append("\n".join(f"{what} = {text}" for what, text in report["polynomials"].items()))
    if "training" in report:
        keys = ("saved_bytes", "gradient_bytes", "optimizer_bytes", "peak_bytes")
        rows = [
            [
                "trained",
                "input",
                "batch",
                "weights",
                "saved activations",
                "gradients",
                "optimizer",
                "peak",
                "GFLOP per step",
                "s per step",
            ]
        ]
        for cost in report["training"]:
            sizes = ("?" if cost[key] is None else f"{cost[key] / 2**20:,.1f} MiB" for key in keys)
            row = [
                cost["trained"],
                "x".join(map(str, cost["input"])),
                str(cost["batch_size"]),
                f"{cost['trainable']:,}",
            ]
            rows.append([*row, *sizes, f"{cost['flops'] / 1e9:,.2f}", f"{cost['seconds']:.3f}"])
        parts.append("\n".join(table(rows, left=2)))
    return "\n\n".join(parts)
