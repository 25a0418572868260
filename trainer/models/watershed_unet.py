"""A U-Net with two heads: the class of each pixel, and its depth inside its instance."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from trainer.components import model
from trainer.detection.watershed import WatershedOutput
from trainer.models.unet import UNet


class WatershedUNet(nn.Module):
    """Images (B, 3, H, W) of any size to a `WatershedOutput`. The last channel of the U-Net is the distance.

    Args:
        num_classes: C, without background.
        width: channels at full resolution; each halving of the resolution doubles them.
        depth: number of resolutions.
    """

    def __init__(self, num_classes: int, width: int, depth: int) -> None:
        super().__init__()
        self.unet = UNet(num_classes + 2, width, depth)

    def forward(self, images: Tensor) -> WatershedOutput:
        """The U-Net's channels, split into the two heads."""
        channels = self.unet(images)
        return WatershedOutput(channels[:, :-1], channels[:, -1])


@model(interface="watershed")
def watershed_unet(
    num_classes: int,
    /,
    *,
    width: Annotated[int, Field(gt=0, le=4096)] = 16,
    depth: Annotated[int, Field(gt=0, le=10)] = 5,
) -> nn.Module:
    """Builds a U-Net with two heads, for classes and for distances to boundaries; 1.9 million parameters by default.

    Args:
        num_classes: C, without background.
        width: channels at full resolution, doubled at each level below.
        depth: number of resolutions, each half the one above.
    """
    return WatershedUNet(num_classes, width, depth)
