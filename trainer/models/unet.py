"""A small U-Net (Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", 2015)."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.components import model


class Block(nn.Sequential):
    """Two 3x3 convolutions, each with batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers += [
                nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


class UNet(nn.Module):
    """Images (B, 3, H, W) of any size to logits (B, C, H, W).

    Args:
        num_classes: C.
        width: channels at full resolution; each halving of the resolution doubles them.
        depth: number of resolutions.
    """

    def __init__(self, num_classes: int, width: int, depth: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth)]
        self.down = nn.ModuleList(Block(before, after) for before, after in pairwise([3, *widths]))
        # Rounding up keeps a pixel of every row and column, whatever the size of the image.
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.up = nn.ModuleList(nn.ConvTranspose2d(below, here, 2, stride=2) for here, below in pairwise(widths))
        self.merge = nn.ModuleList(Block(2 * here, here) for here in widths[:-1])
        self.head = nn.Conv2d(width, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not self.head:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # He et al., 2015

    def forward(self, images: Tensor) -> Tensor:
        """Down to the lowest resolution, then up again, at each one beside what was seen on the way down."""
        x = self.down[0](images)
        skips = []
        for block in self.down[1:]:
            skips.append(x)
            x = block(self.pool(x))
        for up, merge in zip(reversed(self.up), reversed(self.merge), strict=True):
            skip = skips.pop()
            x = up(x)[..., : skip.shape[-2], : skip.shape[-1]]
            x = merge(torch.cat([skip, x], dim=1))
        logits: Tensor = self.head(x)
        return logits


@model(interface="dense")
def unet(
    num_classes: int,
    /,
    *,
    width: Annotated[int, Field(gt=0, le=4096)] = 16,
    depth: Annotated[int, Field(gt=0, le=10)] = 3,
) -> nn.Module:
    """Builds a U-Net with `width` channels at full resolution and `depth` resolutions; 118k parameters by default.

    Args:
        num_classes: channels of the logits.
        width: channels at full resolution, doubled at each level below; twice the width takes about four times as long.
        depth: number of resolutions, each half the one above.
    """
    return UNet(num_classes, width, depth)
