"""Samples become a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.data.augment import Sample
from trainer.errors import UserError

OF_OBJECTS = ("boxes", "labels", "crowd", "masks")  # what a sample says of each of its objects


def collate(samples: Sequence[Sample], place: str) -> dict[str, Tensor]:
    """A batch of samples: images and masks uint8 (B, C, H, W); those with objects as `join` has them.

    Args:
        samples: with the same fields.
        place: what a message calls the set and its split.

    Raises:
        UserError: images of samples without objects differ in size.
    """
    if "boxes" in samples[0]:
        return join(samples)
    for name in samples[0]:
        shapes = {tuple(sample[name].shape) for sample in samples}
        if len(shapes) > 1:
            raise UserError(
                f"{place}: images of a batch differ in size ({', '.join(map(str, sorted(shapes)[:2]))}, …): "
                "set data.resize=[H,W]"
            )
    return {name: torch.stack([sample[name].as_subclass(Tensor) for sample in samples]) for name in samples[0]}


def join(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of samples with objects.

    Images and masks are padded with zeros, at the right and at the bottom, to the largest of the batch; `height` and
    `width`, int64 (B,), are those of each. The objects stand one after the other; `image_index`, int64 (M,), says which
    image each is in. `content`, float32 (B, 4), says what of each image isn't the padding of a letterbox; augmented
    samples have none.
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
    """Pixels (…, H, W) of one image with zeros up to a height and width."""
    if tuple(pixels.shape[-2:]) == (height, width):
        return pixels.as_subclass(Tensor)
    padded = pixels.new_zeros(*pixels.shape[:-2], height, width).as_subclass(Tensor)
    padded[..., : pixels.shape[-2], : pixels.shape[-1]] = pixels
    return padded
