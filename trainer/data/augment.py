"""The augmentations of `data.augment`, applied in the order listed.

Each is a v2 transform of torchvision: it transforms an image together with its masks (by nearest neighbour) and boxes,
and draws from torch's generator, which the `Augmenter` seeds for every sample.

    augment: [{name: random_crop, size: [224, 224]}, {name: horizontal_flip, p: 0.5}]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from trainer.components import Fraction, Size, augmentation
from trainer.data.objects import TIDY
from trainer.data.order import Order

NEARBY = 64  # positions around a sample from which its mosaic partners are drawn

Sample = dict[str, Any]
"""The fields of one sample, by name."""

Transform = Callable[[Sample], Sample]


def _in_order(interval: list[float]) -> list[float]:
    """The smallest and the largest."""
    if interval[0] > interval[1]:
        raise ValueError("must be [smallest, largest]")
    return interval


Interval = Annotated[list[PositiveFloat], Field(min_length=2, max_length=2), AfterValidator(_in_order)]
"""Smallest and largest value."""
Shares = Annotated[
    list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=2, max_length=2), AfterValidator(_in_order)
]


@augmentation()
def random_crop(ignore_index: int | None, has_objects: bool, /, *, size: Size) -> v2.Transform:
    """Crops a random region of `size` (height, width). Smaller images are padded, masks with the ignored label.

    If no label is ignored, padding repeats the edge pixels: otherwise black would be labelled as a class.

    Args:
        ignore_index: the label of ignored pixels, or None.
        has_objects: whether samples have boxes.
        size: height and width of the result.
    """
    if has_objects:
        return v2.RandomCrop(size, pad_if_needed=True)
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
    """Crops a random share `scale` of the area with a random aspect `ratio`, then resizes it to `size` (default:
    `data.resize`).

    Args:
        resize: `data.resize`.
        size: height and width of the result; by default those of `data.resize`.
        scale: smallest and largest share of the area that is cut out.
        ratio: smallest and largest aspect, width over height, of what is cut out.

    Raises:
        ValueError: neither is set.
    """
    if not size and not resize:
        raise ValueError("random_resized_crop needs a size: set its size=[H,W], or data.resize")
    return v2.RandomResizedCrop(size or resize, scale=tuple(scale), ratio=tuple(ratio))


@augmentation()
def horizontal_flip(*, p: Fraction = 0.5) -> v2.Transform:
    """Mirrors horizontally with probability `p`.

    Args:
        p: how probable it is that a sample is mirrored.
    """
    return v2.RandomHorizontalFlip(p)


@augmentation()
def vertical_flip(*, p: Fraction = 0.5) -> v2.Transform:
    """Mirrors vertically with probability `p`.

    Args:
        p: how probable it is that a sample is mirrored.
    """
    return v2.RandomVerticalFlip(p)


@augmentation()
def color_jitter(
    *,
    brightness: NonNegativeFloat = 0.0,
    contrast: NonNegativeFloat = 0.0,
    saturation: NonNegativeFloat = 0.0,
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0,
) -> v2.Transform:
    """Scales the image's brightness, contrast and saturation by random factors in [1 - strength, 1 + strength], and
    shifts its hue by at most `hue` turns.

    Args:
        brightness: strength of the change of brightness.
        contrast: strength of the change of contrast.
        saturation: strength of the change of saturation.
        hue: the largest shift of the hue, in turns.
    """
    return v2.ColorJitter(brightness, contrast, saturation, hue)


class Mosaic:
    """Four samples around a point, at a random scale (Bochkovskiy et al., "YOLOv4", 2020).

    Args:
        size: height and width of the result, and of the tile that each sample fills.
        p: probability of the mosaic.
        scale: smallest and largest scale of the tiles.
    """

    NUM_PARTNERS = 3

    def __init__(self, size: Sequence[int], p: float, scale: Sequence[float]) -> None:
        self.size, self.p, self.scale = size, p, scale

    def __call__(self, samples: list[Sample]) -> Sample:
        """Joins four samples into one. Boxes may extend beyond it; those of objects outside have no area."""
        height, width = self.size
        corners = [(0, 0), (0, width), (height, 0), (height, width)]
        # Crops a random part of the four tiles side by side; the smaller the scale, the larger the part.
        scale = torch.empty(()).uniform_(*self.scale).item()
        inner = [round(side / scale) for side in self.size]
        top, left = (int(torch.randint(2 * side - part + 1, ())) for side, part in zip(self.size, inner, strict=True))
        tiles = [self._tile(sample) for sample in samples]
        mosaic: Sample = {}
        for name in tiles[0]:
            parts = [tile[name] for tile in tiles]
            if name in ("boxes", "masks"):
                parts = [
                    v2.functional.pad(part, [column, row, width - column, height - row])
                    for part, (row, column) in zip(parts, corners, strict=True)
                ]
            if isinstance(parts[0], tv_tensors.TVTensor):
                plain = [part.as_subclass(Tensor) for part in parts]
                whole = (
                    torch.cat(plain)
                    if name in ("boxes", "masks")
                    else torch.cat([torch.cat(plain[:2], 2), torch.cat(plain[2:], 2)], 1)
                )
                mosaic[name] = v2.functional.resized_crop(
                    tv_tensors.wrap(whole, like=parts[0]), top, left, *inner, [height, width]
                )
            else:
                mosaic[name] = torch.cat(parts)
        return mosaic

    def _tile(self, sample: Sample) -> Sample:
        """Crops an image, without its letterbox padding, to the aspect ratio of a tile at a random place, as large as
        possible, and resizes it to a tile.
        """
        height, width = v2.functional.get_size(sample["image"])
        left, top, right, bottom = sample["content"].int().tolist() if "content" in sample else (0, 0, width, height)
        scale = max(self.size[0] / (bottom - top), self.size[1] / (right - left))
        part = [max(1, round(side / scale)) for side in self.size]
        spare = (bottom - top - part[0], right - left - part[1])
        top, left = (
            start + int(torch.randint(rest + 1, ())) if rest else start
            for start, rest in zip((top, left), spare, strict=True)
        )
        return {
            name: v2.functional.resized_crop(value, top, left, *part, list(self.size))
            if isinstance(value, tv_tensors.TVTensor)
            else value
            for name, value in sample.items()
            if name != "content"
        }


@augmentation()
def mosaic(
    resize: Sequence[int] | None,
    /,
    *,
    p: Fraction = 1.0,
    size: Size | None = None,
    scale: Annotated[
        list[Annotated[float, Field(ge=0.5)]], Field(min_length=2, max_length=2), AfterValidator(_in_order)
    ] = [0.5, 1.5],  # noqa: B006
) -> Mosaic:
    """Joins a sample and three others around a point, with probability `p`; must be the first augmentation.

    The result has the height and width `size` (default: `data.resize`). Each sample is cropped to fill a tile of that
    size; the four tiles are then scaled by a random factor in `scale`.

    Args:
        resize: `data.resize`.
        p: how probable it is that a sample becomes part of a mosaic.
        size: height and width of the result; by default those of `data.resize`.
        scale: smallest and largest factor by which the samples are enlarged.

    Raises:
        ValueError: neither size is set.
    """
    if not size and not resize:
        raise ValueError("mosaic needs a size: set its size=[H,W], or data.resize")
    return Mosaic(size or resize or (), p, scale)


class Augmenter:
    """Augments samples, each with the seed of its position in the training stream.

    Args:
        transforms: the augmentations; a `Mosaic` must be the first.
        order: determines the seeds, and the partners of a mosaic.
        read: reads a sample by its id.
        has_objects: whether to clean up boxes and masks at the end.
    """

    def __init__(
        self, transforms: Sequence[Transform], order: Order, read: Callable[[int], Sample], has_objects: bool
    ) -> None:
        self.order, self.read = order, read
        self.mosaic = (
            transforms[0] if isinstance(transforms[0], Mosaic) else None
        )  # the only one that takes several samples
        self.transform = v2.Compose(
            [*transforms[1 if self.mosaic else 0 :], *(TIDY if has_objects else [nn.Identity()])]
        )

    def __call__(self, positions: Sequence[int], samples: Sequence[Sample]) -> list[Sample]:
        """Augments the samples at these positions; restores the state of torch's generator afterwards."""
        with torch.random.fork_rng(devices=[]):
            return [self._augment(*each) for each in zip(positions, samples, strict=True)]

    def _augment(self, position: int, sample: Sample) -> Sample:
        torch.default_generator.manual_seed(self.order.augment_seed(position))
        if self.mosaic and torch.rand(()) < self.mosaic.p:
            # Partners are nearby, since their row groups are likely to be in memory.
            first = max(0, position - NEARBY // 2)
            near = (first + torch.randint(NEARBY, (self.mosaic.NUM_PARTNERS,))).tolist()
            sample = self.mosaic([sample, *(self.read(self.order.sample(each)[1]) for each in near)])
        sample.pop("content", None)  # the transforms would not move it with the image
        augmented: Sample = self.transform(sample)
        return augmented
