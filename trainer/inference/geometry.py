"""From an image to the input of a network, and from its outputs back to the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from trainer.data.objects import Letterbox
from trainer.detection.boxes import Detections

STRIP_VALUES = 2**22
"""Values of a map that are resized at a time, so that huge images with many classes need no more memory."""


@dataclass(frozen=True)
class Frame:
    """How an image lies in the input of a network.

    Attributes:
        size: height and width of the image.
        content: left, top, right and bottom of the image within the input, in pixels.
    """

    size: tuple[int, int]
    content: tuple[int, int, int, int]

    @property
    def is_identity(self) -> bool:
        """Whether the image was neither resized nor padded on the left or at the top."""
        height, width = self.size
        return self.content == (0, 0, width, height)

    def map_back(self, maps: Tensor) -> Tensor:
        """Maps float (…, C, h, w) at the size of the input, as (…, C, H, W) at that of the image; bilinear."""
        return torch.cat(list(self.strips(maps)), dim=-2)

    def strips(self, maps: Tensor) -> Iterator[Tensor]:
        """What `map_back` returns, from top to bottom in strips (…, C, rows, W) of at most `STRIP_VALUES` values."""
        left, top, right, bottom = self.content
        inner, (height, width) = maps[..., top:bottom, left:right], self.size
        if inner.shape[-2:] == self.size:
            yield inner
            return
        count = max(1, STRIP_VALUES // (width * inner[..., 0, 0].numel()))
        if count >= height:
            yield F.interpolate(inner, self.size, mode="bilinear", align_corners=False)
            return
        rows, last = torch.arange(height, device=inner.device), inner.shape[-2] - 1
        places = ((rows + 0.5) * (inner.shape[-2] / height) - 0.5).clamp(0, last)  # of centres of pixels
        upper = places.floor().long()
        share = (places - upper).to(inner.dtype)[:, None]
        for some, lower_share in zip(upper.split(count), share.split(count), strict=True):
            strip = inner[..., some, :].lerp(inner[..., (some + 1).clamp(max=last), :], lower_share)
            yield F.interpolate(strip, (len(some), width), mode="bilinear", align_corners=False)

    def detections_back(self, detections: Detections) -> Detections:
        """Boxes and masks in pixels of the image."""
        left, top, right, bottom = self.content
        height, width = self.size
        scale = detections.boxes.new_tensor([width / (right - left), height / (bottom - top)] * 2)
        origin = detections.boxes.new_tensor([left, top] * 2)
        limits = detections.boxes.new_tensor([width, height] * 2)
        boxes = ((detections.boxes - origin) * scale).clamp(torch.zeros_like(limits), limits)
        masks = detections.masks
        if masks is not None and not (self.is_identity and masks.shape[-2:] == self.size):
            resized = masks.new_empty(len(masks), height, width, dtype=torch.bool)
            for mask, target in zip(
                masks, resized, strict=True
            ):  # one by one: as float they need four times the memory
                target.copy_(self.map_back(mask[None, None].float())[0, 0] > 0.5)
            masks = resized
        return detections._replace(boxes=boxes, masks=masks)


class Preparation:
    """What validation does to an image before the network sees it, for an image of any size.

    Args:
        size: height and width that images are resized to, or None: the network takes images at their own size.
        letterbox: whether the resize keeps the aspect.
        divisor: what both sides of an input must be divisible by; at its own size, an image is padded on the right
            and at the bottom with its last pixels.
    """

    def __init__(self, size: Sequence[int] | None, letterbox: bool = False, divisor: int = 1) -> None:
        self.size, self.divisor = (int(size[0]), int(size[1])) if size else None, divisor
        self._letterbox = Letterbox(self.size) if letterbox and self.size else None

    def __call__(self, image: Tensor) -> tuple[Tensor, Frame]:
        """The input uint8 (3, h, w) for an image uint8 (3, H, W), and how the image lies in it."""
        height, width = image.shape[-2:]
        if self._letterbox:
            from torchvision import tv_tensors

            prepared: Tensor = self._letterbox(tv_tensors.Image(image)).as_subclass(Tensor)
            return prepared, Frame((height, width), self._letterbox.content(height, width))
        if self.size:
            resized: Tensor = v2.functional.resize(image, list(self.size), antialias=True)
            return resized, Frame((height, width), (0, 0, self.size[1], self.size[0]))
        frame = Frame((height, width), (0, 0, width, height))
        missing = [-side % self.divisor for side in (width, height)]
        if not any(missing):
            return image, frame
        padded: Tensor = F.pad(image[None].float(), (0, missing[0], 0, missing[1]), mode="replicate")[0]
        return padded.to(torch.uint8), frame
