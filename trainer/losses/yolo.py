"""The loss of an anchor-based detector: the position of boxes, whether there is one, and its class."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor
from torchvision.ops import box_convert

from trainer.components import FractionBelowOne, loss
from trainer.detection.boxes import Level, Targets, decode
from trainer.losses.loss import Loss

EPS = 1e-9
"""The smallest side in pixels, far below what training reaches."""


class Matches(NamedTuple):
    """The predictions of a level that are responsible for boxes: P pairs, each field int64 (P,).

    Attributes:
        image, anchor, row, column: the prediction.
        target: the box.
    """

    image: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor
    target: Tensor


def assign(level: Level, targets: Targets, max_ratio: float) -> Matches:
    """Assigns boxes to the anchors that fit them, in the three cells nearest to their centre.

    An anchor fits if width and height differ from the box's by less than the factor `max_ratio`. The cells are the one
    that contains the centre, its nearer neighbour in the row and its nearer neighbour in the column: a decoded centre
    can lie up to half a cell outside its own cell.

    Args:
        level: one scale of the output.
        targets: the true boxes of the batch.
        max_ratio: above 1 and at most 4, since a side decodes to at most four times its anchor's.
    """
    height, width = level.logits.shape[2:4]
    boxes = targets.boxes.double()
    ratios = (boxes[:, 2:] - boxes[:, :2])[:, None] / level.anchors.double()
    fits = torch.maximum(ratios, 1 / ratios).amax(dim=2) < max_ratio  # (M, A)

    centres = (boxes[:, :2] + boxes[:, 2:]) / (2 * level.stride)
    last = boxes.new_tensor([width - 1, height - 1])
    own = centres.floor().clamp(torch.zeros_like(last), last)
    towards = (centres - own - 0.5).sign()  # the nearer neighbours: -1, 1, or 0 if both are equally near
    cells = torch.cat([own[:, None], own[:, None] + torch.diag_embed(towards)], dim=1)  # (M, 3, 2)
    exists = ((cells >= 0) & (cells <= last)).all(dim=2)
    exists[:, 1:] &= towards != 0

    target, anchor, cell = (fits[:, :, None] & exists[:, None]).nonzero(as_tuple=True)
    column, row = cells[target, cell].long().unbind(dim=1)
    return Matches(targets.image_index[target], anchor, row, column, target)


def complete_iou(predicted: Tensor, true: Tensor) -> Tensor:
    """The complete IoU of pairs of boxes (Zheng et al., "Distance-IoU Loss", 2020, equations 8 to 11).

    The IoU minus the squared distance of the centres over the squared diagonal of the smallest box around both, minus
    α · v for different aspect ratios, with α a constant in the backward pass.

    Args:
        predicted: (P, 4) as (centre x, centre y, width, height).
        true: (P, 4), likewise, with sides above 0.

    Returns:
        (P,), in (-1.5, 1].
    """
    centres, sizes = predicted[:, :2], predicted[:, 2:].clamp(min=EPS)
    true_centres, true_sizes = true[:, :2], true[:, 2:]
    low, high, true_low, true_high = (
        centres - sizes / 2,
        centres + sizes / 2,
        true_centres - true_sizes / 2,
        true_centres + true_sizes / 2,
    )

    overlap = _area((torch.minimum(high, true_high) - torch.maximum(low, true_low)).clamp(min=0))
    iou = overlap / (_area(sizes) + _area(true_sizes) - overlap)
    around = torch.maximum(high, true_high) - torch.minimum(low, true_low)
    distance = (centres - true_centres).square().sum(dim=1) / around.square().sum(dim=1)
    aspect = 4 / pi**2 * (_angle(true_sizes) - _angle(sizes)).square()
    with torch.no_grad():
        alpha = aspect / (1 - iou + aspect).clamp(min=EPS)
    return iou - distance - alpha * aspect


def _largest(values: Tensor, place: Tensor, num_places: int) -> Tensor:
    """The largest of the values (P,) at each place, 0 at a place without one; `scatter_reduce` is not deterministic on
    CUDA.

    Args:
        values: at least 0.
        place: int64 (P,).
        num_places: length of the result.
    """
    order = values.argsort(stable=True)
    order = order[place[order].argsort(stable=True)]  # by place, then by value
    values, place = values[order], place[order]
    largest = torch.ones_like(place, dtype=torch.bool)
    largest[:-1] = place[1:] != place[:-1]
    # The others go to a place of their own: to drop them, the host would have to wait for the device.
    place = torch.where(largest, place, num_places)
    return values.new_zeros(num_places + 1).scatter(0, place, torch.where(largest, values, 0.0))[:num_places]


def _area(sizes: Tensor) -> Tensor:
    return sizes[:, 0] * sizes[:, 1]


def _angle(sizes: Tensor) -> Tensor:
    """arctan(width / height)."""
    return torch.atan2(sizes[:, 0], sizes[:, 1])


@loss(name="yolo", interface="boxes")
class YoloLoss(Loss):
    """The weighted sum of three terms, each of which is a mean over the predictions of a scale, summed over the scales.

    - `box_loss`: 1 - complete IoU, of the predictions that are responsible for a box (see `assign`).
    - `objectness_loss`: binary cross entropy, of all predictions. The target is the complete IoU with the box that a
      prediction is responsible for, the largest if there are several, and 0 if it is negative or there is no box. It
      is a constant in the backward pass.
    - `class_loss`: binary cross entropy, of the predictions that are responsible for a box, also a mean over the
      classes. The target is 1 - ε / 2 for the true class and ε / 2 for the others. A single class has no such term.

    Takes `Level`s and `Targets`. Without boxes only the objectness contributes.

    Targets, default gains and their scaling are those that YOLO v5's weights were trained with. The defaults are
    meant for 80 classes, 640 x 640 pixels and three scales; for others, `scale_gains` multiplies the gain of the
    classes by C / 80, that of the objectness by the pixels of the network's input over 640², and all by 3 / number of
    scales. The terms are reported without gains.

    Args:
        num_classes: C.
        box_gain, obj_gain, cls_gain: weights of the terms in the loss.
        scale_gains: whether the gains are scaled.
        obj_pw, cls_pw: weights of the positive part of a cross entropy.
        label_smoothing: ε, how much the targets of the classes are softened.
        max_ratio: the largest ratio between the sides of a box and of an anchor that is responsible for it.
        balance: weights of the scales in the objectness, the finest first. Fine ones have many cells and few boxes.
    """

    balance: Tensor
    obj_pw: Tensor
    cls_pw: Tensor

    def __init__(
        self,
        num_classes: int,
        /,
        *,
        box_gain: NonNegativeFloat = 0.05,
        obj_gain: NonNegativeFloat = 1.0,
        cls_gain: NonNegativeFloat = 0.5,
        scale_gains: bool = True,
        obj_pw: PositiveFloat = 1.0,
        cls_pw: PositiveFloat = 1.0,
        label_smoothing: FractionBelowOne = 0.0,
        max_ratio: Annotated[float, Field(gt=1, le=4)] = 4.0,
        balance: Annotated[list[NonNegativeFloat], Field(min_length=3, max_length=3)] = [4.0, 1.0, 0.4],  # noqa: B006
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.gains = {"box_loss": box_gain, "objectness_loss": obj_gain, "class_loss": cls_gain}
        self.scale_gains = scale_gains
        self.label_smoothing = label_smoothing
        self.max_ratio = max_ratio
        # Buffers, so that they move to the device with the loss.
        for name, value in (("obj_pw", obj_pw), ("cls_pw", cls_pw), ("balance", balance)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    def forward(self, outputs: Sequence[Level], targets: Targets) -> dict[str, Tensor]:
        """Local sums of each scale, float64 (3,).

        `box`, `objectness` and `classes`, which become the terms; the number of predictions that are responsible for a
        box, `positives`, and of all, `cells`; the number of `images` and of their `pixels`.
        """
        scales = [self._scale_sums(level, targets) for level in outputs]
        return {name: torch.stack([sums[name] for sums in scales]) for name in scales[0]}

    def _scale_sums(self, level: Level, targets: Targets) -> dict[str, Tensor]:
        """In double precision, which costs little: these are few numbers compared with those of the network."""
        matches = assign(level, targets, self.max_ratio)
        logits = level.logits[matches.image, matches.anchor, matches.row, matches.column].double()  # (P, 5 + C)
        cells = torch.stack([matches.column, matches.row], dim=1)
        predicted = decode(logits, cells, level.anchors.double()[matches.anchor], level.stride)
        ciou = complete_iou(predicted, box_convert(targets.boxes.double(), "xyxy", "cxcywh")[matches.target])

        objectness = level.logits[..., 4].double()
        images, anchors, height, width = objectness.shape
        place = ((matches.image * anchors + matches.anchor) * height + matches.row) * width + matches.column
        expected = _largest(ciou.detach().clamp(min=0), place, objectness.numel()).view_as(objectness)
        labels = F.one_hot(targets.labels[matches.target], self.num_classes).double()
        smoothed = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
        return {
            "box": (1 - ciou).sum(),
            "objectness": F.binary_cross_entropy_with_logits(
                objectness, expected, pos_weight=self.obj_pw, reduction="sum"
            ),
            "classes": F.binary_cross_entropy_with_logits(
                logits[:, 5:], smoothed, pos_weight=self.cls_pw, reduction="sum"
            ),
            "positives": torch.full_like(self.obj_pw, len(matches.target)),
            "cells": torch.full_like(self.obj_pw, objectness.numel()),
            "images": torch.full_like(self.obj_pw, images),
            "pixels": torch.full_like(self.obj_pw, images * height * width * level.stride**2),
        }

    def combine(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The `loss` and its three terms."""
        positives = sums["positives"].clamp(min=1)
        terms = {
            "box_loss": (sums["box"] / positives).sum(),
            "objectness_loss": (self.balance * sums["objectness"] / sums["cells"].clamp(min=1)).sum(),
        }
        if self.num_classes > 1:
            terms["class_loss"] = (sums["classes"] / positives).sum() / self.num_classes
        scales = self._gain_scales(sums)
        return {
            "loss": torch.stack([self.gains[name] * scales[name] * term for name, term in terms.items()]).sum(),
            **terms,
        }

    def _gain_scales(self, sums: dict[str, Tensor]) -> dict[str, Any]:
        """The factor of each term's gain."""
        if not self.scale_gains:
            return dict.fromkeys(self.gains, 1.0)
        levels = 3 / len(sums["images"])
        pixels = sums["pixels"].sum() / sums["images"].sum().clamp(min=1)
        return {
            "box_loss": levels,
            "objectness_loss": levels * pixels / 640**2,
            "class_loss": levels * self.num_classes / 80,
        }
