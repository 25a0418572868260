"""The colourisation networks: shapes for every kernel, and the arithmetic of the assignment."""

from __future__ import annotations

import pytest
import torch

from trainer.components import catalogue

NETS = ("pool_upsample_net", "conv_transpose_net", "colorization_unet")


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kernel", [3, 4, 5, 6, 7])
def test_every_kernel_keeps_height_and_width_of_every_tensor(name: str, kernel: int) -> None:
    net = catalogue("model")[name].build({"kernel": kernel, "num_filters": 4}, num_classes=5)
    shapes: dict[int, set[tuple[int, ...]]] = {}
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            layer.register_forward_hook(
                lambda module, inputs, output: shapes.setdefault(kernel, set()).add(tuple(output.shape[2:]))
            )
    assert net(torch.zeros(2, 1, 24, 32)).shape == (2, 5, 24, 32)
    assert shapes[kernel] <= {(24, 32), (12, 16), (6, 8)}


@pytest.mark.parametrize(("num_in_channels", "num_filters", "num_classes"), [(1, 32, 24), (3, 8, 5)])
def test_pool_upsample_net_has_as_many_weights_as_the_assignment_says(
    num_in_channels: int, num_filters: int, num_classes: int
) -> None:
    net = catalogue("model")["pool_upsample_net"].build(
        {"num_filters": num_filters, "num_in_channels": num_in_channels}, num_classes=num_classes
    )
    nic, nf, nc = num_in_channels, num_filters, num_classes
    assert (
        sum(p.numel() for p in net.parameters())
        == 36 * nf**2 + 9 * nc**2 + 9 * nf * nc + 9 * nic * nf + 12 * nf + 4 * nc
    )
