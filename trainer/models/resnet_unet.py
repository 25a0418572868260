"""A U-Net (Ronneberger et al., 2015) whose encoder is torchvision's ResNet (He et al.,
"Deep Residual Learning for Image Recognition", 2015).
"""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, ResNet34_Weights, ResNet50_Weights
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from trainer.components import model, weights_field
from trainer.models.base_conv import Decoder
from trainer.models.weights import load_published

# Type of block, number of blocks in each group, published weights.
BACKBONES = {
    "resnet18": (BasicBlock, [2, 2, 2, 2], ResNet18_Weights.IMAGENET1K_V1),
    "resnet34": (BasicBlock, [3, 4, 6, 3], ResNet34_Weights.IMAGENET1K_V1),
    "resnet50": (Bottleneck, [3, 4, 6, 3], ResNet50_Weights.IMAGENET1K_V1),
}
WIDTHS = (64, 128, 256, 512)  # of a ResNet's four groups of blocks, before a bottleneck's expansion


class ResNetUNet(ResNet):  # type: ignore[misc]  # torchvision has no types
    """Images (B, 3, H, W) of any size to logits (B, C, H, W).

    The encoder's keys of the state dict are torchvision's (`conv1.…` to `layer4.…`), all others are below `decoder`. So
    a safetensors file of a torchvision ResNet fits if `decoder` is reset, `reset_layers: [decoder]`; its classifier is
    not used.

    Args:
        num_classes: C.
        block: type of residual block.
        depths: number of blocks in each of the four groups.
        skips: whether the decoder gets each level of the encoder.
    """

    unused_layers = ("fc",)

    def __init__(self, num_classes: int, block: type[BasicBlock | Bottleneck], depths: list[int], skips: bool) -> None:
        super().__init__(block, depths)
        del self.avgpool, self.fc
        channels = [WIDTHS[0], *(width * block.expansion for width in WIDTHS)]
        self.decoder = Decoder(num_classes, channels, WIDTHS[0], skips)

    def forward(self, images: Tensor) -> Tensor:
        """Down to a 32nd of the resolution, then up again."""
        stem = self.relu(self.bn1(self.conv1(images)))
        levels = [images, stem, self.layer1(self.maxpool(stem))]
        for group in (self.layer2, self.layer3, self.layer4):
            levels.append(group(levels[-1]))
        logits: Tensor = self.decoder(levels)
        return logits


@model(interface="dense")
def resnet_unet(
    num_classes: int,
    /,
    *,
    backbone: Literal["resnet18", "resnet34", "resnet50"] = "resnet18",
    weights: Annotated[str, weights_field("imagenet")] = "imagenet",
    skips: bool = True,
) -> nn.Module:
    """Builds the network.

    Args:
        num_classes: channels of the logits.
        backbone: the encoder.
        weights: `imagenet` for torchvision's weights of the encoder, downloaded at first use; `none` for random ones.
            (A file is loaded into the model once it is built.)
        skips: whether the decoder gets each level of the encoder; without skips it is a plain encoder and decoder.

    Raises:
        ConnectionError: the weights can't be downloaded, or the downloaded file is damaged.
    """
    block, depths, published = BACKBONES[backbone]
    net = ResNetUNet(num_classes, block, depths, skips)
    if weights == "imagenet":
        trunk = ResNet(block, depths)
        load_published(trunk, published)
        del trunk.fc
        net.load_state_dict(trunk.state_dict(), strict=False)
    return net
