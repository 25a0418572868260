"""The three networks of the colourisation assignment: grey images to a colour class for each pixel.

Each keeps height and width (divisible by 4) for any kernel from 3 up, even ones too.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.components import model

Kernel = Annotated[int, Field(ge=3, le=99)]
Positive = Annotated[int, Field(gt=0, le=4096)]


class SameConv2d(nn.Conv2d):
    """A convolution that keeps height and width; with an even kernel it pads one more to the right and below."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int) -> None:
        super().__init__(channels_in, channels_out, kernel, padding=(kernel - 1) // 2)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to (B, channels_out, H, W)."""
        missing = 1 - self.kernel_size[0] % 2
        return super().forward(nn.functional.pad(input, (0, missing, 0, missing)) if missing else input)


def _halve(channels_in: int, channels_out: int, kernel: int) -> nn.Module:
    return nn.Conv2d(channels_in, channels_out, kernel, stride=2, padding=(kernel - 1) // 2)


def _double(channels_in: int, channels_out: int, kernel: int) -> nn.Module:
    """Doubles height and width: 2 · padding - output_padding = kernel - 2."""
    return nn.ConvTranspose2d(
        channels_in, channels_out, kernel, stride=2, padding=(kernel - 1) // 2, output_padding=kernel % 2
    )


def _block(*layers: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU())


@model(interface="dense")
def pool_upsample_net(
    num_classes: int, /, *, kernel: Kernel = 3, num_filters: Positive = 32, num_in_channels: Positive = 1
) -> nn.Module:
    """Pools twice, upsamples twice: images (B, num_in_channels, H, W) to logits (B, num_classes, H, W).

    Args:
        num_classes: channels of the logits.
        kernel: side of the convolutions' kernels in pixels.
        num_filters: channels after the first block.
        num_in_channels: channels of the images.
    """
    k, filters, colours = kernel, num_filters, num_classes
    return nn.Sequential(
        _block(SameConv2d(num_in_channels, filters, k), nn.MaxPool2d(2), channels=filters),
        _block(SameConv2d(filters, 2 * filters, k), nn.MaxPool2d(2), channels=2 * filters),
        _block(SameConv2d(2 * filters, filters, k), nn.Upsample(scale_factor=2), channels=filters),
        _block(SameConv2d(filters, colours, k), nn.Upsample(scale_factor=2), channels=colours),
        SameConv2d(colours, colours, k),
    )


@model(interface="dense")
def conv_transpose_net(
    num_classes: int, /, *, kernel: Kernel = 3, num_filters: Positive = 32, num_in_channels: Positive = 1
) -> nn.Module:
    """Strided convolutions down, transposed ones up: images (B, num_in_channels, H, W) to logits (B, num_classes, H,
    W).

    Args:
        num_classes: channels of the logits.
        kernel: side of the convolutions' kernels in pixels.
        num_filters: channels after the first block.
        num_in_channels: channels of the images.
    """
    k, filters, colours = kernel, num_filters, num_classes
    return nn.Sequential(
        _block(_halve(num_in_channels, filters, k), channels=filters),
        _block(_halve(filters, 2 * filters, k), channels=2 * filters),
        _block(_double(2 * filters, filters, k), channels=filters),
        _block(_double(filters, colours, k), channels=colours),
        SameConv2d(colours, colours, k),
    )


@model(name="colorization_unet", interface="dense")
class ColorizationUNet(nn.Module):
    """`conv_transpose_net` with skips: the fourth block also gets the output of the first one, the last convolution
    the image.

    Images (B, num_in_channels, H, W) to logits (B, num_classes, H, W).

    Args:
        num_classes: channels of the logits.
        kernel: side of the convolutions' kernels in pixels.
        num_filters: channels after the first block.
        num_in_channels: channels of the images.
    """

    def __init__(
        self, num_classes: int, /, *, kernel: Kernel = 3, num_filters: Positive = 32, num_in_channels: Positive = 1
    ) -> None:
        super().__init__()
        k, filters, colours = kernel, num_filters, num_classes
        self.down1 = _block(_halve(num_in_channels, filters, k), channels=filters)
        self.down2 = _block(_halve(filters, 2 * filters, k), channels=2 * filters)
        self.up1 = _block(_double(2 * filters, filters, k), channels=filters)
        self.up2 = _block(_double(2 * filters, colours, k), channels=colours)
        self.head = SameConv2d(colours + num_in_channels, colours, k)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, num_classes, H, W) of an image (B, num_in_channels, H, W)."""
        half = self.down1(image)
        up = self.up1(self.down2(half))
        up = self.up2(torch.cat([up, half], dim=1))
        logits: Tensor = self.head(torch.cat([up, image], dim=1))
        return logits
