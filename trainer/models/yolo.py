"""YOLO, a one-stage detector with anchors at three scales, in sizes n, s, m and l that differ in depth and width.

The trunk is a cross-stage partial network (Wang et al., "CSPNet", 2020) that ends in spatial pyramid pooling (He et
al., 2015). Features are merged from coarse to fine and back (Liu et al., "Path Aggregation Network", 2018; Bochkovskiy
et al., "YOLOv4", 2020), and each of three scales predicts boxes relative to anchors (Redmon & Farhadi, "YOLOv3", 2018).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from trainer.components import model
from trainer.detection.boxes import Level
from trainer.models.layers import check_sides

SIZES = {"n": (0.33, 0.25), "s": (0.33, 0.5), "m": (0.67, 0.75), "l": (1.0, 1.0)}  # factors of depth and width
STRIDES = (8, 16, 32)
# Width and height in pixels, three at each stride: those of the weights published for COCO.
PUBLISHED_ANCHORS: list[list[list[float]]] = [
    [[10, 13], [16, 30], [33, 23]],
    [[30, 61], [62, 45], [59, 119]],
    [[116, 90], [156, 198], [373, 326]],
]
# Probability that a new head gives to an object, and to each class (Lin et al., "Focal Loss", 2017, section 3.3).
PRIOR = 0.01

Anchor = Annotated[list[PositiveFloat], Field(min_length=2, max_length=2)]
Anchors = Annotated[list[Annotated[list[Anchor], Field(min_length=3, max_length=3)]], Field(min_length=3, max_length=3)]


class Conv(nn.Module):
    """Convolution, batch norm and SiLU; (B, C, H, W) to (B, channels_out, H / stride, W / stride)."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=(kernel - 1) // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the three in turn."""
        activated: Tensor = self.act(self.bn(self.conv(x)))
        return activated


class Bottleneck(nn.Module):
    """A 1x1 and a 3x3 convolution; a shortcut adds their input."""

    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1 = Conv(channels, channels, 1)
        self.cv2 = Conv(channels, channels, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape."""
        changed: Tensor = self.cv2(self.cv1(x))
        return x + changed if self.shortcut else changed


class C3(nn.Module):
    """A cross-stage partial block of three convolutions: half of the channels go through the bottlenecks,
    half bypass them.
    """

    def __init__(self, channels_in: int, channels_out: int, depth: int, shortcut: bool = True) -> None:
        super().__init__()
        half = channels_out // 2
        self.cv1 = Conv(channels_in, half, 1)
        self.cv2 = Conv(channels_in, half, 1)
        self.cv3 = Conv(2 * half, channels_out, 1)
        self.m = nn.Sequential(*(Bottleneck(half, shortcut) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) to (B, channels_out, H, W)."""
        merged: Tensor = self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], dim=1))
        return merged


class SPPF(nn.Module):
    """Spatial pyramid pooling, fast: a 5x5 maximum, applied one to three times, covers 5, 9 and 13 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.cv1 = Conv(channels, half, 1)
        self.cv2 = Conv(4 * half, channels, 1)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape."""
        pyramid = [self.cv1(x)]
        for _ in range(3):
            pyramid.append(self.pool(pyramid[-1]))
        merged: Tensor = self.cv2(torch.cat(pyramid, dim=1))
        return merged


class Concat(nn.Module):
    """Joins the channels of its inputs."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """(B, C1, H, W), (B, C2, H, W), … to (B, C1 + C2 + …, H, W)."""
        return torch.cat(inputs, dim=1)


class Detect(nn.Module):
    """The head: a 1x1 convolution at each scale.

    Args:
        num_classes: C.
        anchors: width and height in pixels, three at each scale.
        channels: of the features of each scale.
    """

    anchors: Tensor

    def __init__(self, num_classes: int, anchors: list[list[list[float]]], channels: list[int]) -> None:
        super().__init__()
        strides = torch.tensor(STRIDES).view(-1, 1, 1)
        # In cells, as in the published weights.
        self.register_buffer("anchors", torch.tensor(anchors, dtype=torch.float32) / strides)
        self.m = nn.ModuleList(
            nn.Conv2d(width, len(level) * (5 + num_classes), 1) for width, level in zip(channels, anchors, strict=True)
        )
        for conv in self.m:
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            conv.bias.detach().unflatten(0, (-1, 5 + num_classes))[:, 4:] = torch.tensor(PRIOR).logit()

    def forward(self, *features: Tensor) -> tuple[Level, ...]:
        """Features (B, channels, H, W) of each scale to its boxes."""
        levels = []
        for conv, x, anchors, stride in zip(self.m, features, self.anchors, STRIDES, strict=True):
            logits = conv(x).unflatten(1, (len(anchors), -1)).permute(0, 1, 3, 4, 2)
            levels.append(Level(logits, anchors * stride, stride))
        return tuple(levels)


class Yolo(nn.Module):
    """Images (B, 3, H, W) in [0, 1], with sides divisible by 32, to three `Level`s, the finest first.

    Names and shapes of the state dict are those of the published weights (YOLO v5, release 6): `model.0.conv.weight` to
    `model.24.m.2.bias`.

    Args:
        num_classes: C.
        depth: factor of the number of bottlenecks.
        width: factor of the number of channels.
        anchors: width and height in pixels, three at each scale; None for those of the loaded weights, or else the
            published ones.
    """

    size_divisor = STRIDES[-1]
    # Where a layer's input comes from, if not from the layer before.
    SOURCES = {12: (11, 6), 16: (15, 4), 19: (18, 14), 22: (21, 10), 24: (17, 20, 23)}

    def __init__(self, num_classes: int, depth: float, width: float, anchors: list[list[list[float]]] | None) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = (round(width * channels) for channels in (64, 128, 256, 512, 1024))
        few, some, many = (max(round(depth * bottlenecks), 1) for bottlenecks in (3, 6, 9))
        layers = [
            Conv(3, c1, 6, 2),  # 0: half the resolution
            Conv(c1, c2, 3, 2),
            C3(c2, c2, few),
            Conv(c2, c3, 3, 2),
            C3(c3, c3, some),  # 4: stride 8
            Conv(c3, c4, 3, 2),
            C3(c4, c4, many),  # 6: stride 16
            Conv(c4, c5, 3, 2),
            C3(c5, c5, few),
            SPPF(c5),  # 9: stride 32, end of the trunk
            Conv(c5, c4, 1),
            nn.Upsample(scale_factor=2),
            Concat(),
            C3(2 * c4, c4, few, shortcut=False),
            Conv(c4, c3, 1),
            nn.Upsample(scale_factor=2),
            Concat(),
            C3(2 * c3, c3, few, shortcut=False),  # 17: boxes at stride 8
            Conv(c3, c3, 3, 2),
            Concat(),
            C3(2 * c3, c4, few, shortcut=False),  # 20: boxes at stride 16
            Conv(c4, c4, 3, 2),
            Concat(),
            C3(2 * c4, c5, few, shortcut=False),  # 23: boxes at stride 32
            Detect(num_classes, anchors or PUBLISHED_ANCHORS, [c3, c4, c5]),
        ]
        self.model = nn.ModuleList(layers)
        if anchors:
            self.register_load_state_dict_pre_hook(_keep_anchors)  # type: ignore[no-untyped-call]

    def forward(self, images: Tensor) -> tuple[Level, ...]:
        """Applies the layers in turn.

        Raises:
            UserError: a side isn't divisible by 32.
        """
        check_sides(self.size_divisor, *images.shape[-2:])
        needed = {index for sources in self.SOURCES.values() for index in sources}
        kept: dict[int, Tensor] = {}
        x: Any = images
        for index, layer in enumerate(self.model):
            x = layer(*(kept[source] for source in self.SOURCES[index])) if index in self.SOURCES else layer(x)
            if index in needed:
                kept[index] = x
        levels: tuple[Level, ...] = x
        return levels


def _keep_anchors(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Anchors that a recipe names replace those of the weights."""
    state[f"{prefix}model.24.anchors"] = module.get_buffer("model.24.anchors")


@model(interface="boxes")
def yolo(
    num_classes: int,
    /,
    *,
    size: Literal["n", "s", "m", "l"] = "n",
    anchors: Anchors | None = None,
) -> nn.Module:
    """Builds YOLO.

    Args:
        num_classes: C.
        size: for 80 classes n has 1.9 million parameters, s 7.2, m 21.2 and l 46.6.
        anchors: width and height in pixels, three for each of the strides 8, 16 and 32; by default those of `weights`,
            or else the ones published for COCO.
    """
    depth, width = SIZES[size]
    return Yolo(num_classes, depth, width, anchors)
