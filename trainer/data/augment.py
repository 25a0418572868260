"""Augmentations of a recipe's `data.augment`, applied in the order it lists them.

Each is one of torchvision's v2 transforms: it moves the image and its masks together (masks by nearest
neighbour) and draws from torch's generator, which the stream seeds for every sample.

    augment: [{name: random_crop, size: [224, 224]}, {name: horizontal_flip, p: 0.5}]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field, PositiveInt
from torchvision import tv_tensors
from torchvision.transforms import v2

from trainer.components import augmentation


def _in_order(interval: list[float]) -> list[float]:
    if interval[0] > interval[1]:
        raise ValueError("must be the smallest and the largest, in this order")
    return interval


Size = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
"""Height and width in pixels."""
Interval = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=2), AfterValidator(_in_order)]
"""The smallest and the largest."""
Shares = Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=2, max_length=2), AfterValidator(_in_order)]
Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]


@augmentation()
def random_crop(ignore_index: int | None, /, *, size: Size) -> v2.Transform:
    """Cuts `size` (height, width) out at a random place; a smaller image is padded, its mask with the ignored label.

    Where no label is ignored, the padding repeats what stands at the edges: black with the label of a class would be learnt.
    """
    if ignore_index is None:
        return v2.RandomCrop(size, pad_if_needed=True, padding_mode="edge")
    return v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Mask: ignore_index, "others": 0})


@augmentation()
def random_resized_crop(
    resize: Sequence[int] | None,
    /,
    *,
    size: Size | None = None,
    scale: Shares = [0.08, 1.0],  # noqa: B006
    ratio: Interval = [3 / 4, 4 / 3],  # noqa: B006
) -> v2.Transform:
    """Cuts out a random share `scale` of the area with a random aspect `ratio` and resizes it to `size`, by default that of `data.resize`.

    Raises:
        ValueError: neither is there.
    """
    if not size and not resize:
        raise ValueError("random_resized_crop needs a size: set its size=[H,W], or data.resize")
    return v2.RandomResizedCrop(size or resize, scale=tuple(scale), ratio=tuple(ratio))


@augmentation()
def horizontal_flip(*, p: Probability = 0.5) -> v2.Transform:
    """Mirrors left and right with probability `p`."""
    return v2.RandomHorizontalFlip(p)


@augmentation()
def vertical_flip(*, p: Probability = 0.5) -> v2.Transform:
    """Mirrors top and bottom with probability `p`."""
    return v2.RandomVerticalFlip(p)


@augmentation()
def color_jitter(
    *, brightness: Strength = 0.0, contrast: Strength = 0.0, saturation: Strength = 0.0, hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
) -> v2.Transform:
    """Changes the image's colours by random factors in [1 - strength, 1 + strength]; hue by a shift of at most `hue` turns."""
    return v2.ColorJitter(brightness, contrast, saturation, hue)
