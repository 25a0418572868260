"""Joins samples into a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.data.augment import Sample
from trainer.errors import UserError

OF_OBJECTS = ("boxes", "labels", "crowd", "masks")  # fields with a value for each object


def collate(samples: Sequence[Sample], name: str) -> dict[str, Tensor]:
    """Joins samples into a batch: images and masks uint8 (B, C, H, W); samples with objects as described in `join`.

    Args:
        samples: all with the same fields.
        name: of the split in messages.

    Raises:
        UserError: images of samples without objects differ in size.
    """
    if "boxes" in samples[0]:
        return join(samples)
    for field in samples[0]:
        shapes = {tuple(sample[field].shape) for sample in samples}
        if len(shapes) > 1:
            raise UserError(
                f"{name}: images of a batch differ in size ({', '.join(map(str, sorted(shapes)[:2]))}, …): "
                "set data.resize=[H,W]"
            )
    return {field: torch.stack([sample[field].as_subclass(Tensor) for sample in samples]) for field in samples[0]}


def join(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Joins samples with objects into a batch.

    Images and masks are zero-padded at the right and bottom to the largest of the batch; `height` and `width`, int64
    (B,), are the sizes before padding. Objects are concatenated; `image_index`, int64 (M,), is the image of each.
    `content`, float32 (B, 4), is the box of each image without letterbox padding; augmented samples have none.
    """
    sizes = torch.tensor([sample["image"].shape[-2:] for sample in samples])
    height, width = sizes.amax(0).tolist()
    index = torch.repeat_interleave(torch.tensor([len(sample["boxes"]) for sample in samples]))
    batch = {
        "height": sizes[:, 0],
        "width": sizes[:, 1],
        "image_index": index,
        "image": torch.stack([_padded(sample["image"], height, width) for sample in samples]),
    }
    if "content" in samples[0]:
        batch["content"] = torch.stack([sample["content"] for sample in samples])
    for name in OF_OBJECTS:
        if name in samples[0]:
            parts = [
                _padded(sample[name], height, width) if name == "masks" else sample[name].as_subclass(Tensor)
                for sample in samples
            ]
            batch[name] = torch.cat(parts)
    return batch


def _padded(pixels: Tensor, height: int, width: int) -> Tensor:
    """Pixels (…, H, W) of one image, zero-padded to this height and width."""
    if tuple(pixels.shape[-2:]) == (height, width):
        return pixels.as_subclass(Tensor)
    padded = pixels.new_zeros(*pixels.shape[:-2], height, width).as_subclass(Tensor)
    padded[..., : pixels.shape[-2], : pixels.shape[-1]] = pixels
    return padded
