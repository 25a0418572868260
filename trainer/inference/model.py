"""A trained model as a function from images to results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trainer.data.source import DataInfo
from trainer.detection.boxes import Detections
from trainer.distributed.accelerator import resolve_precision
from trainer.errors import UserError
from trainer.inference.geometry import Frame, Preparation
from trainer.inference.inputs import read_image
from trainer.inference.results import Result, result_of
from trainer.inference.trained import TrainedModel, find_trained
from trainer.recipe.file import RecipeError
from trainer.recipe.load import load_recipe
from trainer.recipe.recipe import Recipe
from trainer.runs.folder import RunFolder
from trainer.tasks.build import build_task
from trainer.tasks.objects import SHOWN_SCORE
from trainer.tasks.task import Task

AS_TRAINED = ("model.weights=none", "model.reset_layers=[]", "track=[]")
"""Overrides of the recipe of a run whose model is only used: its weights are loaded once the network is built."""
Prepared = tuple[Tensor, Tensor, Frame]
"""An image uint8 (3, H, W), the network's input uint8 (3, h, w) for it, and how it lies in that."""
Input = str | Path | bytes | Image.Image | np.ndarray | Tensor
"""An image, see `read_image`."""


class Model:
    """A trained model: `model = trainer.load("runs/x"); result = model("photo.jpg")`.

    Args:
        trained: its files.
        device: where it computes; the first GPU where there is one, else the CPU.

    Attributes:
        recipe: what it was trained with.
        task: what a prediction means.
        classes: names of the classes.
        module: the network, in eval mode, with the averaged weights where the run has them.
        preparation: from an image of any size to the network's input.

    Raises:
        UserError: files are missing or damaged, or belong to another network.
    """

    def __init__(self, trained: TrainedModel, device: str | torch.device | None = None) -> None:
        self.trained = trained
        self.recipe = _recipe(trained)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.task = load_task(self.recipe, trained, trained.info)
        self.classes = trained.info.classes
        self.module: nn.Module = self.task.model
        self.module.to(self.device).eval().requires_grad_(False)
        if self.recipe.train.channels_last:
            self.module.to(memory_format=torch.channels_last)
        letterbox = self.recipe.data.resize_mode == "letterbox"
        self.preparation = Preparation(trained.size, letterbox, getattr(self.module, "size_divisor", 1))

    def __repr__(self) -> str:
        return f"Model({self.recipe.name}: {self.recipe.task.name}, {self.recipe.model.name}, step {self.trained.step})"

    def __call__(
        self, images: Input | list[Input] | tuple[Input, ...], *, threshold: float = SHOWN_SCORE, batch_size: int = 8
    ) -> Any:
        """Predicts on one image, or on a list of them.

        Args:
            images: a file, a Pillow image, an array or a tensor, see `read_image`; or a list of these.
            threshold: objects of a lower score are left out; of no meaning to other tasks.
            batch_size: images that the network sees at once, if they have one size.

        Returns:
            A `Result`, or a list of them.

        Raises:
            UserError: an image can't be read.
        """
        if isinstance(images, list | tuple):
            return list(self.predict(map(read_image, images), threshold=threshold, batch_size=batch_size))
        (result,) = self.predict([read_image(images)], threshold=threshold)
        return result

    def predict(
        self, images: Iterable[Tensor], *, threshold: float = SHOWN_SCORE, batch_size: int = 8
    ) -> Iterator[Result]:
        """Predicts on images uint8 (3, H, W), one after the other; neighbours of one size form batches."""
        prepared = ((image, *self.preparation(image)) for image in images)
        yield from self.predict_prepared(prepared, threshold=threshold, batch_size=batch_size)

    def predict_prepared(
        self, images: Iterable[Prepared], *, threshold: float = SHOWN_SCORE, batch_size: int = 8
    ) -> Iterator[Result]:
        """Does the same for images that are prepared: threads can do that while the network computes."""
        for _, group in groupby(images, key=lambda each: each[1].shape):
            batch: list[Prepared] = []
            for each in group:
                batch.append(each)
                if len(batch) == batch_size:
                    yield from self._predict_batch(batch, threshold)
                    batch = []
            if batch:
                yield from self._predict_batch(batch, threshold)

    @torch.no_grad()
    def _predict_batch(self, images: Sequence[Prepared], threshold: float) -> list[Result]:
        inputs = torch.stack([prepared for _, prepared, _ in images]).to(self.device)
        predictions = self.predictions(inputs, [frame for _, _, frame in images], threshold)
        return [
            result_of(prediction, image, self.classes)
            for (image, _, _), prediction in zip(images, predictions, strict=True)
        ]

    def predictions(self, inputs: Tensor, frames: Sequence[Frame], threshold: float = 0.0) -> list[Tensor | Detections]:
        """The task's predictions for prepared inputs uint8 (B, 3, h, w), at the sizes of the images.

        Maps of huge images are decoded in strips, so a task must decode each pixel by itself.
        """
        batch = {
            "image": inputs,
            "sample_id": torch.arange(len(inputs)),
            "height": torch.full((len(inputs),), inputs.shape[2]),
            "width": torch.full((len(inputs),), inputs.shape[3]),
            "content": torch.tensor([frame.content for frame in frames], dtype=torch.float32, device=inputs.device),
        }
        with torch.inference_mode():  # not what follows: users may change a result
            outputs = self.task.infer(self.forward, batch)
        if isinstance(outputs, Tensor) and outputs.dim() == 4:  # maps: resized before they are decoded
            return [
                torch.cat([self.task.decode(strip, batch)[0] for strip in frame.strips(maps[None])], dim=-2)
                for maps, frame in zip(outputs, frames, strict=True)
            ]
        predictions = self.task.decode(outputs, batch)
        return [
            frame.detections_back(_at_least(each, threshold)) if isinstance(each, Detections) else each
            for each, frame in zip(predictions, frames, strict=True)
        ]

    def forward(self, *inputs: Any) -> Any:
        """Calls the network as evaluation does: in the precision of the run, with fp32 outputs."""
        with self._autocast():
            outputs = self.module(*inputs)
        return tree_map(_as_fp32, outputs)

    def _autocast(self) -> AbstractContextManager[Any]:
        precision = resolve_precision(self.recipe.train.precision)
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return torch.autocast(self.device.type, dtypes[precision]) if precision in dtypes else nullcontext()


def _at_least(detections: Detections, threshold: float) -> Detections:
    kept = detections.scores >= threshold
    return Detections(*(None if part is None else part[kept] for part in detections))  # type: ignore[arg-type]


def _as_fp32(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_half else value


def _recipe(trained: TrainedModel) -> Recipe:
    """The recipe of a run, as what is needed of it to predict: its weights are loaded afterwards.

    A published recipe needs neither its data set nor its plugins, whose code isn't run: they may be anything.
    """
    if not trained.published:
        return load_recipe(trained.recipe, AS_TRAINED)
    plugins = RunFolder(trained.checkpoint).read_recipe().get("plugins", [])
    try:
        return load_recipe(trained.recipe, [*AS_TRAINED, "plugins=[]"], data=False)
    except RecipeError as error:
        if not plugins:
            raise
        raise UserError(
            f"{trained.recipe} needs plugins ({', '.join(map(str, plugins))}), and code of published models isn't run: "
            f"import your own copy of them before trainer.load ({str(error).strip().splitlines()[-1].strip()})"
        ) from error


def load_task(recipe: Recipe, trained: TrainedModel, info: DataInfo) -> Task[Any]:
    """The task of a recipe with the trained weights, on the CPU.

    Args:
        recipe: of the run, loaded with `AS_TRAINED`.
        trained: its files.
        info: what the task must know of the data set.

    Raises:
        UserError: the weights are damaged, or belong to another network.
    """
    task = build_task(recipe, info)
    if recipe.train.precision == "fp64":
        task.model.double()  # before its weights, which would be rounded
    try:
        task.model.load_state_dict(load_file(trained.weights))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{trained.weights}: these weights can't be loaded: {str(error)[:300]}") from error
    return task


def load(run: str | Path, checkpoint: str = "best", device: str | torch.device | None = None) -> Model:
    """Loads a trained model.

    Args:
        run: a run folder or a run's name, a checkpoint folder, or a published model: its folder or
            `hf://OWNER/NAME[@REVISION]`.
        checkpoint: of a run: `best` (the newest one, where none is the best), `last`, or the name of one.
        device: where it computes; the first GPU where there is one, else the CPU.

    Raises:
        UserError: there is no such run, it has no checkpoint yet, or its files are damaged.
    """
    return Model(find_trained(str(run), checkpoint), device)
