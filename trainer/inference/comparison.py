"""Whether an exported file computes what its network does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from math import inf, isnan
from operator import add
from typing import Any

import torch
from torch import Tensor

from trainer.data.build import Data
from trainer.data.card import CARD
from trainer.data.prepare import data_dir
from trainer.data.sizes import micro_batch_sizes
from trainer.errors import UserError
from trainer.inference.graphs import Graph, Tensors, example_size, graph_of, sums_of
from trainer.inference.model import Model
from trainer.tasks.sums import EvaluationSums
from trainer.tasks.task import Batch

RANDOM_IMAGES = 4
BEYOND = 32  # pixels by which images of another size are larger, on which a file for any size is compared too
TOLERANCES = {"fp32": 1e-3, "fp16": 3e-2}
"""The largest tolerated difference: of the raw outputs relative to their largest value (at least 1), of metrics and of
the share of equal classes absolute."""


@dataclass
class Comparison:
    """How far a file and its network part.

    Attributes:
        tolerance: see `TOLERANCES`.
        num_samples: validation samples compared; 0 if the prepared set was missing.
        num_images: images compared, samples included.
        num_compared: raw outputs compared, of all batches.
        difference: the largest of a raw output.
        relative: the largest, relative to the largest value of the output (at least 1).
        other_numbers: images for which file and network have different numbers of detections.
        agreement: the share of equal classes or colours; 1 for a task without them.
        by_file, by_network: metrics of the samples.
    """

    tolerance: float
    num_samples: int = 0
    num_images: int = 0
    num_compared: int = 0
    difference: float = 0.0
    relative: float = 0.0
    other_numbers: int = 0
    agreement: float = 1.0
    by_file: dict[str, float] = field(default_factory=dict)
    by_network: dict[str, float] = field(default_factory=dict)

    @property
    def largest(self) -> float:
        """The largest difference of those that have a tolerance; nan is one, too."""
        metrics = [abs(self.by_file.get(name, inf) - value) for name, value in self.by_network.items()]
        values = [self.relative if self.num_compared else inf, 1 - self.agreement, *metrics]
        return max(values, key=_nan_last)

    @property
    def is_close(self) -> bool:
        """Whether all are within the tolerance."""
        return self.largest <= self.tolerance


def validation_data(model: Model) -> Data | None:
    """The prepared set that the model was trained on, if it is there.

    Raises:
        UserError: it has other classes.
    """
    if model.trained.published:  # without its data set
        return None
    folder = data_dir() / model.recipe.source.name
    if not (folder / CARD).exists():
        return None
    data = Data(model.recipe, 0, 1, torch.device("cpu"))
    if data.info.classes != model.classes:
        raise UserError(f"{folder} has other classes than the run was trained on: prepare the run's own set again")
    return data


def batches(data: Data, recipe: Any, count: int, one_image: bool) -> Iterator[Batch]:
    """So many validation samples, spread evenly over the set."""
    ids = sorted(data.validation.spread(count))
    together = 1 if one_image else min(micro_batch_sizes(recipe, 1)["validation"], 8)
    for start in range(0, len(ids), together):
        yield data.validation_batch(ids[start : start + together])


@torch.no_grad()
def compare(
    model: Model,
    run: Callable[[Tensor], Tensors],
    precision: str,
    size: tuple[int, int] | None,
    data: Data | None,
    count: int,
    done: Callable[[int], None] = lambda _: None,
) -> Comparison:
    """Compares a file with the network in fp32.

    Args:
        model: on the CPU.
        run: the file.
        precision: of the file.
        size: height and width of its inputs; None for any.
        data: the run's set; None compares on random images.
        count: validation samples to compare.
        done: is called with the number of samples compared so far.
    """
    task, graph = model.task, graph_of(model.task)
    comparison = Comparison(TOLERANCES[precision])
    sums: dict[str, list[EvaluationSums]] = {"file": [], "network": []}
    for batch in batches(data, model.recipe, count, graph.one_image) if data else ():
        image, outputs = batch["image"], graph.task.infer(graph.network, batch)
        by_file = run(image)
        _add(comparison, graph, by_file, graph.tensors(outputs, image), len(image))
        sums["file"].append(graph.evaluation_sums(by_file, batch))
        sums["network"].append(sums_of(task, outputs, batch))
        comparison.num_samples += len(image)
        done(comparison.num_samples)
    if data:
        comparison.by_file, comparison.by_network = (
            _figures(task.metrics(reduce(add, each)), task.metric_names) for each in sums.values()
        )
    height, width = example_size(model, size)
    sizes = [] if data else [(height, width)]
    if size is None:
        sizes.append((height + BEYOND + -height % BEYOND, width + 2 * BEYOND + -width % BEYOND))
    random = torch.Generator().manual_seed(0)
    for height, width in sizes:
        images = torch.randint(0, 256, (RANDOM_IMAGES, 3, height, width), dtype=torch.uint8, generator=random)
        for image in images.split(1 if graph.one_image else RANDOM_IMAGES):
            _add(comparison, graph, run(image), graph(image), len(image))
    return comparison


def _add(comparison: Comparison, graph: Graph, by_file: Tensors, by_network: Tensors, num_images: int) -> None:
    before = comparison.num_images
    comparison.num_images += num_images
    if "boxes" in by_network:
        mine, theirs = (_detections(each, num_images) for each in (by_file, by_network))
        comparison.other_numbers += int((mine != theirs).sum())
    for name, expected in by_network.items():
        got = by_file[name]
        if got.shape != expected.shape:
            continue
        if name in graph.raw:
            comparison.num_compared += 1
            if not expected.numel():
                continue
            difference = float((got.double() - expected.double()).abs().max())
            comparison.difference = max(difference, comparison.difference, key=_nan_last)
            relative = difference / max(1.0, float(expected.abs().max()))
            comparison.relative = max(relative, comparison.relative, key=_nan_last)
        elif name in ("classes", "picture"):
            equal = float((got == expected).double().mean())
            comparison.agreement = (before * comparison.agreement + num_images * equal) / comparison.num_images


def _detections(tensors: Tensors, num_images: int) -> Tensor:
    """The number of detections in each image."""
    index = tensors.get("image_index", torch.zeros_like(tensors["labels"]))
    return index.bincount(minlength=num_images)


def _nan_last(value: float) -> float:
    """A key for `max`, which then returns nan where there is one."""
    return inf if isnan(value) else value


def _figures(metrics: dict[str, Any], names: tuple[str, ...]) -> dict[str, float]:
    """The metrics that people look at."""
    return {name: metrics[name] for name in names if name in metrics}
