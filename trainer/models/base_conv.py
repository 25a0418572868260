"""A plain convolutional encoder and decoder; with skips between them, a U-Net (Ronneberger et al., 2015)
on a strided stem.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.components import model


class Block(nn.Sequential):
    """Convolution, ReLU, batch norm, in this order; a stride of 2 halves height and width, rounding up."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(out_channels),
        )


class Up(nn.Module):
    """Doubles the resolution by a transposed convolution, followed by a `Block`.

    Args:
        below: channels of the coarser input.
        beside: channels of the encoder's level at the doubled resolution if there is a skip, else 0.
        out_channels: channels of the result.
    """

    def __init__(self, below: int, beside: int, out_channels: int) -> None:
        super().__init__()
        self.skip = beside > 0
        self.enlarge = nn.ConvTranspose2d(below, out_channels, 2, stride=2)
        self.block = Block(beside + out_channels, out_channels)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """From x (B, below, ⌈H/2⌉, ⌈W/2⌉) to (B, out_channels, H, W), with H and W of the encoder's `level`."""
        x = self.enlarge(x)[..., : level.shape[-2], : level.shape[-1]]
        result: Tensor = self.block(torch.cat([level, x], dim=1) if self.skip else x)
        return result


class Decoder(nn.Module):
    """From the coarsest of an encoder's five levels up to logits at the resolution of the image.

    Args:
        num_classes: channels of the logits.
        channels: of the levels, fine to coarse; the first has half the resolution of the image, each other half that of
            the one before.
        width: channels at a half and a quarter of the resolution; coarser ones have twice and four times as many, the
            full one half.
        skips: whether each step up also gets the encoder's level at its resolution.
    """

    def __init__(self, num_classes: int, channels: Sequence[int], width: int, skips: bool) -> None:
        super().__init__()
        widths = [channels[-1], 4 * width, 2 * width, width, width, width // 2]
        beside = [*reversed(channels[:-1]), 0] if skips else [0] * 5
        self.up = nn.ModuleList(
            Up(below, skip, here) for (below, here), skip in zip(pairwise(widths), beside, strict=True)
        )
        self.head = nn.Conv2d(widths[-1], num_classes, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_classes, H, W) from the image (B, 3, H, W) and the encoder's levels, fine to coarse."""
        *finer, x = levels
        for up, level in zip(self.up, reversed(finer), strict=True):
            x = up(x, level)
        logits: Tensor = self.head(x)
        return logits


class BaseConv(nn.Module):
    """Images (B, 3, H, W) of any size to logits (B, C, H, W).

    Args:
        num_classes: C.
        width: channels of the first level; the five have 1, 1, 2, 4 and 8 times as many.
        skips: whether the decoder gets each level of the encoder.
    """

    def __init__(self, num_classes: int, width: int, skips: bool) -> None:
        super().__init__()
        channels = [width, width, 2 * width, 4 * width, 8 * width]
        self.encoder = nn.ModuleList([Block(3, width, kernel=7, stride=2)])
        for above, here in pairwise(channels):
            # Rounding up keeps a pixel of every row and column, whatever the size of the image.
            self.encoder.append(nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), Block(above, here)))
        self.decoder = Decoder(num_classes, channels, width, skips)

    def forward(self, images: Tensor) -> Tensor:
        """Down to a 32nd of the resolution, then up again."""
        levels = [images]
        for block in self.encoder:
            levels.append(block(levels[-1]))
        logits: Tensor = self.decoder(levels)
        return logits


@model(interface="dense")
def base_conv(
    num_classes: int, /, *, width: Annotated[int, Field(ge=2, le=4096)] = 64, skips: bool = False
) -> nn.Module:
    """Builds the network with `width` channels at half the resolution; `skips: true` makes it a U-Net.
    3.1 and 3.9 million parameters by default.

    Args:
        num_classes: channels of the logits.
        width: channels at half the resolution.
        skips: whether the decoder also gets each level of the encoder, as in a U-Net.
    """
    return BaseConv(num_classes, width, skips)
