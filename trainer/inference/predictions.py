"""Predictions for a split of a prepared set, as files beside its metrics, in pixels of the network's input.

So that whoever computes the metrics from these files alone gets the same values.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.data.build import EvaluationData
from trainer.data.images import encode_png
from trainer.distributed.control import Control
from trainer.errors import UserError
from trainer.metrics import coco
from trainer.runs.durable import atomic_write
from trainer.tasks.objects import ObjectTask
from trainer.tasks.sums import EvaluationSums
from trainer.tasks.task import Batch, Task


class PredictionFiles(ABC):
    """The predictions for a split: each process adds those of its share, and one finishes the files."""

    @abstractmethod
    def prepare(self) -> None:
        """Makes sure, on one process, that the files can be written.

        Raises:
            UserError: they can't.
        """

    @abstractmethod
    def add(self, predictions: Any, batch: Batch) -> None:
        """Takes the predictions for a batch."""

    @abstractmethod
    def finish(self, sums: EvaluationSums) -> None:
        """Completes the files, on one process, when all have added theirs; before that there are none."""

    @abstractmethod
    def discard(self) -> None:
        """Removes what is unfinished."""


class CocoFiles(PredictionFiles):
    """A COCO result file, and beside it the annotation file that it is measured against.

    Args:
        file: the result file; `x.json` goes with `x.annotations.json`.
        classes: names of the classes; category ids count from 1.
        names: of the images, by sample id.
    """

    def __init__(self, file: Path, classes: Sequence[str], names: Sequence[str]) -> None:
        self.file, self.annotations = file, file.with_suffix(".annotations.json")
        self.classes, self.names = classes, names

    def prepare(self) -> None:
        """See `PredictionFiles`."""
        if self.file.suffix != ".json":
            raise UserError(f"--predictions {self.file}: this task writes COCO JSON; name a .json file")
        check_parent("--predictions", self.file)

    def add(self, predictions: Any, batch: Batch) -> None:
        """Nothing: they are among the rows that average precision follows from."""

    def finish(self, sums: EvaluationSums) -> None:
        """See `PredictionFiles`."""
        annotations, results = coco.as_coco(sums.rows, self.classes)
        for image in annotations["images"]:
            image["file_name"] = self.names[image["id"]]
        atomic_write(self.annotations, json.dumps(annotations))
        atomic_write(self.file, json.dumps(results))

    def discard(self) -> None:
        """Nothing: each file appears as a whole."""


class PictureFolder(PredictionFiles):
    """A folder with a PNG for each sample: class indices in one channel, or colours.

    Args:
        folder: must not exist yet, or be empty.
        task: the name of the task.
        names: of the images, by sample id: a PNG is called like its image, or by its id where these aren't unique.
    """

    def __init__(self, folder: Path, task: str, names: Sequence[str]) -> None:
        self.folder, self.task, self.unfinished = folder, task, folder.parent / f".{folder.name}.unfinished"
        stems = [Path(name).stem for name in names]
        unique = all(stems) and len(set(stems)) == len(stems)
        self.stems = stems if unique else [f"{sample_id:08d}" for sample_id in range(len(names))]

    def prepare(self) -> None:
        """See `PredictionFiles`."""
        if self.folder.suffix == ".json":
            raise UserError(f"--predictions {self.folder}: task {self.task} writes PNG files; name a folder")
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"--predictions {self.folder}: exists already; remove it or name another folder")
        check_parent("--predictions", self.folder)
        self.discard()
        self.unfinished.mkdir()

    def add(self, predictions: Tensor, batch: Batch) -> None:
        """See `PredictionFiles`.

        Raises:
            UserError: these are no pictures.
        """
        if predictions.dim() < 3:
            raise UserError(f"--predictions: task {self.task} predicts no pictures and no objects; leave it out")
        for sample_id, prediction in zip(batch["sample_id"].tolist(), predictions.cpu(), strict=True):
            pixels = prediction.byte() if prediction.dim() == 2 else prediction.movedim(0, -1)
            (self.unfinished / f"{self.stems[sample_id]}.png").write_bytes(encode_png(pixels.numpy()))

    def finish(self, sums: EvaluationSums) -> None:
        """See `PredictionFiles`."""
        self.unfinished.replace(self.folder)

    def discard(self) -> None:
        """See `PredictionFiles`."""
        shutil.rmtree(self.unfinished, ignore_errors=True)


@contextmanager
def prediction_files(
    path: Path | None, task: Task[Any], data: EvaluationData, control: Control
) -> Iterator[PredictionFiles | None]:
    """The files for the predictions of a task on a split, ready to be added to; None without a path.

    Raises:
        UserError: they can't be written.
    """
    if path is None:
        yield None
        return
    names, kind = data.validation.reader.file_names(), type(task).__name__.lower()
    objects = isinstance(task, ObjectTask)
    files = CocoFiles(path, data.info.classes, names) if objects else PictureFolder(path, kind, names)
    control.on_main(files.prepare)
    try:
        yield files
    except BaseException:
        files.discard()
        raise


def check_parent(option: str, path: Path) -> None:
    """Makes sure that there is a folder to write to.

    Raises:
        UserError: there is none, or `path` can't be a file.
    """
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}; create it first")
    if path.suffix == ".json" and path.is_dir():
        raise UserError(f"{option} {path}: this is a folder; name a file")
