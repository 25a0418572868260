"""Boxes and masks of the objects in images: held in memory as stored in Parquet, decoded sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from trainer.detection.rle import decode_masks

ROLES = ("boxes", "instances")  # of columns that hold objects


def _fit_boxes(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    """Shrinks boxes to what is left of their masks."""
    if "masks" not in sample:
        return sample
    masks, boxes = sample["masks"].as_subclass(Tensor), torch.zeros(sample["boxes"].shape)
    seen = (masks > 0).flatten(1).any(1)
    boxes[seen] = masks_to_boxes(masks[seen]) + torch.tensor(
        [0.0, 0, 1, 1]
    )  # right and bottom are the far edges of the last pixels
    return sample | {"boxes": tv_tensors.wrap(boxes, like=sample["boxes"])}


def _labels(sample: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What is removed together with a box, in addition to its mask."""
    return sample["labels"], sample["crowd"]


# After augmentation: clips boxes to the image, and removes those without area, with their labels and masks.
TIDY: tuple[Callable[[Any], Any], ...] = (
    _fit_boxes,
    v2.ClampBoundingBoxes("hard"),
    v2.SanitizeBoundingBoxes(labels_getter=_labels),
)


class Objects:
    """The objects of a split.

    Args:
        column: an Arrow array with a list of boxes, labels, masks and `crowd` for each sample.
        sizes: int64 (N, 2), height and width of every image as prepared.
        role: `boxes` or `instances`.
        resize: applied to images, boxes and masks, or None.
    """

    def __init__(self, column: Any, sizes: npt.NDArray[np.int64], role: str, resize: v2.Transform | None) -> None:
        self.column, self.sizes, self.with_masks, self.resize = column, sizes, role == "instances", resize

    def __len__(self) -> int:
        return len(self.column)

    def read(self, sample_id: int) -> dict[str, Tensor]:
        """The objects of one sample: `boxes` float32 (M, 4), `labels` int64 (M,), `crowd` bool (M,) and, for instances,
        `masks` uint8 (M, H, W).

        `content`, float32 (4,), is the box of the image without letterbox padding.
        """
        size: list[int] = self.sizes[sample_id].tolist()
        objects = self.column[sample_id].as_py()
        boxes = torch.tensor([each["box"] for each in objects], dtype=torch.float32).reshape(-1, 4)
        sample: dict[str, Tensor] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(size[0], size[1]))
        }
        if self.with_masks:
            sample["masks"] = tv_tensors.Mask(decode_masks([each["mask"] for each in objects], size))
        if self.resize:
            sample = self.resize(sample)
        canvas = sample["boxes"].canvas_size  # type: ignore[attr-defined]
        content = self.resize.content(*size) if isinstance(self.resize, Letterbox) else (0, 0, canvas[1], canvas[0])
        sample["content"] = torch.tensor(content, dtype=torch.float32)
        sample["labels"] = torch.tensor([each["label"] for each in objects], dtype=torch.int64)
        sample["crowd"] = torch.tensor([each["crowd"] for each in objects], dtype=torch.bool)
        return sample

    def box_sizes(self) -> npt.NDArray[np.float64]:
        """Width and height of every box, after the resize: float64 (M, 2)."""
        without_masks = Objects(self.column, self.sizes, "boxes", self.resize)
        boxes = torch.cat(
            [without_masks.read(sample_id)["boxes"].as_subclass(Tensor) for sample_id in range(len(self))]
        )
        return (boxes[:, 2:] - boxes[:, :2]).double().numpy()


class Letterbox(v2.Transform):  # type: ignore[misc]  # torchvision has no types
    """Resizes an image to fit into `size` without changing its aspect ratio, and pads it on both sides with grey.

    Boxes and masks are transformed with it; masks are padded with 0.

    Args:
        size: height and width in pixels.
    """

    GREY = 114  # padding value, near the mean of natural images

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = tuple(size)

    def content(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Where an image of this size is placed: left, top, right and bottom, in pixels of the result.

        Its point (x, y) is mapped to (left + x · (right - left) / width, top + y · (bottom - top) / height).
        """
        scale = min(self.size[0] / height, self.size[1] / width)
        inner_height, inner_width = (max(1, round(scale * side)) for side in (height, width))
        top, left = (self.size[0] - inner_height) // 2, (self.size[1] - inner_width) // 2
        return left, top, left + inner_width, top + inner_height

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resizes and pads one field of a sample; all fields have the size of the image."""
        left, top, right, bottom = self.content(*v2.functional.get_size(inpt))
        resized = v2.functional.resize(inpt, [bottom - top, right - left], antialias=True)
        padding = [left, top, self.size[1] - right, self.size[0] - bottom]
        return v2.functional.pad(resized, padding, fill=self.GREY if isinstance(inpt, tv_tensors.Image) else 0)
