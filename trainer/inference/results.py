"""What a model predicts for one image, in the coordinates and at the size of that image."""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from trainer.data.images import encode_png
from trainer.detection.boxes import Detections
from trainer.detection.rle import encode_masks
from trainer.tasks.drawing import draw_objects, paint_classes

OVERLAY, LAST_SUFFIXES = ".overlay.jpg", (".json", ".png")
JPEG_QUALITY = 90  # of overlays


@dataclass(frozen=True)
class Result(ABC):
    """A prediction for one image.

    Attributes:
        image: uint8 (3, H, W), on the CPU as all tensors of a result.
        classes: names of the classes, in the order of their index.
    """

    image: Tensor = field(repr=False)
    classes: tuple[str, ...]

    @abstractmethod
    def plot(self) -> Image.Image:
        """The prediction drawn for people."""

    @abstractmethod
    def contents(self, overlay: bool = True) -> dict[str, bytes]:
        """The files of the prediction by their suffixes, the one that stands for all of them last."""

    def _overlay(self, wanted: bool) -> dict[str, bytes]:
        return {OVERLAY: _jpeg(self.plot())} if wanted else {}

    @classmethod
    @abstractmethod
    def last_suffix(cls) -> str:
        """The suffix of the file that `save` writes last: where it exists, the others do too."""

    def save(self, path: str | Path, overlay: bool = True) -> list[Path]:
        """Writes the prediction, e.g. for `out/photo` to `out/photo.overlay.jpg` and `out/photo.png`.

        Each file appears as a whole or not at all.

        Args:
            path: of the files, without their suffixes.
            overlay: whether to write the overlay, where there is one.

        Returns:
            The files.

        Raises:
            OSError: one can't be written.
        """
        base = Path(path)
        base.parent.mkdir(parents=True, exist_ok=True)
        files = []
        for suffix, content in self.contents(overlay).items():
            file = base.with_name(base.name + suffix)
            temporary = file.with_name(f".{file.name}.tmp")
            try:
                temporary.write_bytes(content)
                temporary.replace(file)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
            files.append(file)
        return files


@dataclass(frozen=True)
class ClassMap(Result):
    """A class for each pixel.

    Attributes:
        mask: class indices int64 (H, W).
    """

    mask: Tensor

    def plot(self) -> Image.Image:
        """The colours of the classes over the image."""
        return _as_pillow(paint_classes(self.image[None], self.mask[None], len(self.classes))[0])

    def contents(self, overlay: bool = True) -> dict[str, bytes]:
        """An overlay, and the class indices as a one-channel PNG."""
        indices = encode_png(self.mask.to(torch.uint8).numpy())
        return self._overlay(overlay) | {self.last_suffix(): indices}

    @classmethod
    def last_suffix(cls) -> str:
        """Of the index PNG."""
        return ".png"

    def shares(self) -> dict[str, float]:
        """The share of the pixels that each class has, 0 to 1."""
        counts = self.mask.flatten().bincount(minlength=len(self.classes))
        return dict(zip(self.classes, (counts / self.mask.numel()).tolist(), strict=True))


@dataclass(frozen=True)
class Objects(Result):
    """Objects, the best first.

    Attributes:
        boxes: float32 (N, 4): left, top, right, bottom in pixels.
        scores: float32 (N,) in [0, 1].
        labels: class indices int64 (N,).
        masks: bool (N, H, W), or None where only boxes are detected.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = field(default=None, repr=False)

    def plot(self) -> Image.Image:
        """Boxes with names and scores, and masks, over the image."""
        detections = Detections(self.boxes, self.scores, self.labels, self.masks)
        return _as_pillow(draw_objects(self.image, detections, self.classes, with_scores=True))

    def contents(self, overlay: bool = True) -> dict[str, bytes]:
        """An overlay, and the objects as JSON."""
        text = json.dumps({"height": self.image.shape[1], "width": self.image.shape[2], "objects": self.as_dicts()})
        return self._overlay(overlay) | {self.last_suffix(): text.encode()}

    @classmethod
    def last_suffix(cls) -> str:
        """Of the JSON file."""
        return ".json"

    def as_dicts(self) -> list[dict[str, Any]]:
        """One dictionary for each object, ready for JSON: `class`, `score`, `box` (left, top, right, bottom), and the
        mask as COCO's run-length encoding.
        """
        found = zip(self.labels.tolist(), self.scores.tolist(), self.boxes.tolist(), strict=True)
        objects: list[dict[str, Any]] = [
            {"class": self.classes[label], "score": score, "box": box} for label, score, box in found
        ]
        if self.masks is not None:
            size = list(self.masks.shape[1:])
            for each, counts in zip(objects, encode_masks(self.masks), strict=True):
                each["mask"] = {"size": size, "counts": counts.decode("ascii")}
        return objects

    def as_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Entries of a COCO result file; category ids count from 1."""
        entries = []
        for each, label in zip(self.as_dicts(), self.labels.tolist(), strict=True):
            left, top, right, bottom = each["box"]
            entry = {"image_id": image_id, "category_id": label + 1, "score": each["score"]}
            entry["bbox"] = [left, top, right - left, bottom - top]
            entries.append(entry | ({"segmentation": each["mask"]} if "mask" in each else {}))
        return entries


@dataclass(frozen=True)
class Picture(Result):
    """Another picture of the same size.

    Attributes:
        picture: uint8 (3, H, W).
    """

    picture: Tensor = field(repr=False)

    def plot(self) -> Image.Image:
        """The picture."""
        return _as_pillow(self.picture)

    def contents(self, overlay: bool = True) -> dict[str, bytes]:
        """The picture as PNG."""
        return {self.last_suffix(): encode_png(self.picture.permute(1, 2, 0).numpy())}

    @classmethod
    def last_suffix(cls) -> str:
        """Of the PNG."""
        return ".png"


@dataclass(frozen=True)
class ImageClass(Result):
    """One class for the whole image.

    Attributes:
        label: its index.
    """

    label: int

    @property
    def name(self) -> str:
        """The name of the class."""
        return self.classes[self.label]

    def plot(self) -> Image.Image:
        """The image under the name of its class."""
        whole = torch.tensor([[0.0, 0.0, self.image.shape[2], self.image.shape[1]]])
        detections = Detections(whole, torch.ones(1), torch.tensor([self.label]))
        return _as_pillow(draw_objects(self.image, detections, self.classes, with_scores=False))

    def contents(self, overlay: bool = True) -> dict[str, bytes]:
        """The class as JSON."""
        return {self.last_suffix(): json.dumps({"class": self.name}).encode()}

    @classmethod
    def last_suffix(cls) -> str:
        """Of the JSON file."""
        return ".json"


def result_of(prediction: Tensor | Detections, image: Tensor, classes: Sequence[str]) -> Result:
    """The result that a task's prediction for one image is, by its shape and type.

    Args:
        prediction: class indices int64 (H, W) or (), a picture uint8 (3, H, W), or detections; on any device.
        image: uint8 (3, H, W).
        classes: names of the classes.
    """
    names = tuple(classes)
    if isinstance(prediction, Detections):
        boxes, scores, labels, masks = (None if part is None else part.cpu() for part in prediction)
        assert boxes is not None and scores is not None and labels is not None
        return Objects(image, names, boxes.float(), scores.float(), labels, masks)
    if prediction.dtype == torch.uint8:
        return Picture(image, names, prediction.cpu())
    if prediction.dim():
        return ClassMap(image, names, prediction.cpu())
    return ImageClass(image, names, int(prediction))


def _as_pillow(picture: Tensor) -> Image.Image:
    image: Image.Image = to_pil_image(picture)
    return image


def _jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
