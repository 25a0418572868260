"""Trained networks as self-contained modules: from images uint8 to named tensors."""

from __future__ import annotations

from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchvision.ops import nms

from trainer.detection.boxes import MAX_CANDIDATES, Detections, decode_levels
from trainer.detection.watershed import WatershedOutput
from trainer.inference.model import Model
from trainer.metrics import coco
from trainer.tasks.detection import Detection
from trainer.tasks.mask_rcnn import MaskRcnnTask
from trainer.tasks.sums import EvaluationSums
from trainer.tasks.task import Batch, Task
from trainer.tasks.watershed import Watershed

Tensors = dict[str, Tensor]
SIDE = 256  # of an example where the images of a run have no common size


class Graph(nn.Module):
    """A network with its preprocessing and as much of its postprocessing as a graph can hold. For a task that predicts
    a tensor: logits float32 (B, C, …), and classes int64 (B, …) or pictures uint8 (B, 3, H, W).

    Args:
        task: owns the network; neither is changed.
        dtype: of the network's weights and activations; all floating-point outputs are float32.

    Attributes:
        raw: names of the outputs that precede any decision; they are compared by value.
        note: what is left to do with the outputs, if anything.
        one_image: whether it takes a single image, of any size; only PyTorch's older ONNX exporter can express how such
            a network chooses its regions.
    """

    raw: tuple[str, ...] = ("logits",)
    note = ""
    one_image = False
    task: Any
    network: nn.Module

    def __init__(self, task: Task[Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        # A copy: tasks cache tensors in their attributes, and an exporter would leave symbolic ones there.
        self.task = copy(task)
        self.network = self.task.model = deepcopy(task.model).to(dtype)

    def forward(self, image: Tensor) -> Tensors:
        """Images uint8 (B, 3, H, W) to named outputs."""
        return self.tensors(tree_map(_as_fp32, self.infer(image)), image)

    def infer(self, image: Tensor) -> Any:
        """The network's outputs, as the task's `infer` returns them."""
        return self.task.infer(self.network, {"image": image})

    def tensors(self, outputs: Any, image: Tensor) -> Tensors:
        """The named outputs."""
        predictions = self.task.decode(outputs, {"image": image})
        return {"logits": outputs, "picture" if predictions.dtype == torch.uint8 else "classes": predictions}

    def evaluation_sums(self, tensors: Tensors, batch: Batch) -> EvaluationSums:
        """What the metrics of a validation batch with these outputs follow from."""
        return sums_of(self.task, tensors["logits"], batch)


class Boxes(Graph):
    """All boxes of a detector with anchors, and those that non-maximum suppression keeps, in pixels of the input:
    `all_boxes` float32 (B, N, 4), `all_scores` (B, N, C); of D detections, the best first, `boxes` (D, 4), `scores`
    (D,), `labels` int64 (D,) and `image_index` int64 (D,).
    """

    raw = ("all_boxes", "all_scores")

    def infer(self, image: Tensor) -> Any:
        """The network's `Level`s."""
        return self.network(self.task.inputs(image))

    def tensors(self, outputs: Any, image: Tensor) -> Tensors:
        """As `trainer.detection.boxes.postprocess`, for all images at once."""
        boxes, scores = decode_levels(outputs)
        index, box, labels = (scores > self.task.conf_threshold).nonzero(as_tuple=True)
        order = scores[index, box, labels].sort(descending=True).indices
        order = order[_rank(index[order], image.shape[0]) <= MAX_CANDIDATES]
        index, box, labels = index[order], box[order], labels[order]
        found, values = boxes[index, box], scores[index, box, labels]
        # Classes are moved apart horizontally and images vertically, so boxes compete only within their own class and
        # image. The two boxes at the end are always kept: torch.export assumes that some are.
        apart = 4.0 * max(image.shape[-2:])
        moved = found + apart * torch.stack([labels, index], dim=1).to(found.dtype).repeat(1, 2)
        ends = apart * found.new_tensor([[-2.0, -2.0, -1.0, -1.0], [-4.0, -4.0, -3.0, -3.0]])
        kept = nms(torch.cat([moved, ends]), torch.cat([values, ends.new_zeros(2)]), self.task.iou_threshold)
        kept = kept[kept < values.shape[0]]
        kept = kept[_rank(index[kept], image.shape[0]) <= self.task.max_detections]
        kept_outputs = {"boxes": found, "scores": values, "labels": labels, "image_index": index}
        return {"all_boxes": boxes, "all_scores": scores} | {name: each[kept] for name, each in kept_outputs.items()}

    def evaluation_sums(self, tensors: Tensors, batch: Batch) -> EvaluationSums:
        """What average precision follows from, for the boxes that are kept."""
        parts = [tensors[name] for name in ("boxes", "scores", "labels")]
        images = range(len(batch["image"]))
        detections = [Detections(*(part[tensors["image_index"] == image] for part in parts)) for image in images]
        rows = coco.rows(batch, self.task.clipped(detections, batch))
        return EvaluationSums({}, {}, rows, torch.tensor(len(batch["sample_id"])))


class Depths(Graph):
    """The two maps of a deep watershed: `semantic`, logits float32 (B, C + 1, H, W), and `distance` (B, H, W)."""

    raw = ("semantic", "distance")
    note = "the watershed itself is not in the file: trainer.detection.watershed.instances cuts the maps into instances"

    def infer(self, image: Tensor) -> WatershedOutput:
        """The two maps."""
        maps: WatershedOutput = self.network(self.task.inputs(image))
        return maps

    def tensors(self, outputs: WatershedOutput, image: Tensor) -> Tensors:
        """The two maps."""
        return outputs._asdict()

    def evaluation_sums(self, tensors: Tensors, batch: Batch) -> EvaluationSums:
        """What average precision follows from, for the instances that the watershed finds."""
        return sums_of(self.task, WatershedOutput(**tensors), batch)


class Masks(Graph):
    """The instances that Mask R-CNN finds in one image of any size, the best first: `boxes` float32 (D, 4), `scores`
    (D,), `labels` int64 (D,) and `masks`, probabilities (D, H, W).
    """

    raw = ("boxes", "scores", "masks")
    one_image = True

    def infer(self, image: Tensor) -> Any:
        """The results of torchvision."""
        return self.network([self.task.inputs(image)[0]])

    def tensors(self, outputs: Any, image: Tensor) -> Tensors:
        """Those of the one image; the first class is 0."""
        (found,) = outputs
        return {name: found[name] for name in ("boxes", "scores")} | {
            "labels": found["labels"] - 1,
            "masks": found["masks"][:, 0],
        }

    def evaluation_sums(self, tensors: Tensors, batch: Batch) -> EvaluationSums:
        """What average precision follows from."""
        found = tensors | {"labels": tensors["labels"] + 1, "masks": tensors["masks"][:, None]}
        return sums_of(self.task, [found], batch)


def graph_of(task: Task[Any], dtype: torch.dtype = torch.float32) -> Graph:
    """The graph of a task's network, in eval mode."""
    kinds: dict[type[Task[Any]], type[Graph]] = {Detection: Boxes, Watershed: Depths, MaskRcnnTask: Masks}
    return kinds.get(type(task), Graph)(task, dtype).eval()


def example_size(model: Model, size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of an input that a file for this size, or None for any, certainly takes."""
    return size or model.trained.size or (SIDE, SIDE)


def sums_of(task: Task[Any], outputs: Any, batch: Batch) -> EvaluationSums:
    """What the metrics of a batch follow from, apart from the loss."""
    samples = torch.tensor(len(batch["sample_id"]))
    return EvaluationSums({}, task.sums(outputs, batch), task.rows(outputs, batch), samples)


def _rank(groups: Tensor, num_groups: int) -> Tensor:
    """Of each element int64 (N,), its number among those of its group so far, from 1."""
    member = groups[:, None] == torch.arange(num_groups, device=groups.device)
    return member.long().cumsum(dim=0).gather(1, groups[:, None])[:, 0]


def _as_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
