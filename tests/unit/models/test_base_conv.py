from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.models.base_conv import BaseConv, base_conv


@pytest.mark.parametrize("size", [(64, 96), (63, 37), (5, 1)])
@pytest.mark.parametrize("skips", [False, True])
def test_logits_have_the_resolution_of_images_of_any_size(size: tuple[int, int], skips: bool) -> None:
    model = base_conv(3, width=2, skips=skips)
    assert model(torch.randn(2, 3, *size)).shape == (2, 3, *size)


@pytest.mark.parametrize("skips", [False, True])
def test_the_layers_are_those_of_the_assignment(skips: bool) -> None:
    shapes: list[tuple[int, ...]] = []
    with torch.device("meta"):
        model = base_conv(9, skips=skips)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                layer.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
        model(torch.empty(2, 3, 224, 288))
    assert isinstance(model, BaseConv)
    encoder = [(64, 112, 144), (64, 56, 72), (128, 28, 36), (256, 14, 18), (512, 7, 9)]
    decoder = [(256, 14, 18), (128, 28, 36), (64, 56, 72), (64, 112, 144), (32, 224, 288)]
    assert shapes == [*encoder, *(shape for shape in decoder for _ in range(2)), (9, 224, 288)]
    stem = model.encoder[0][0]
    assert (stem.kernel_size, stem.stride) == ((7, 7), (2, 2))


@pytest.mark.parametrize("skips", [False, True])
def test_every_block_is_a_convolution_then_relu_then_batch_norm(skips: bool) -> None:
    leaves = [module for module in base_conv(2, width=2, skips=skips).modules() if not list(module.children())]
    kinds = [type(module) for module in leaves]
    block = [nn.Conv2d, nn.ReLU, nn.BatchNorm2d]
    assert kinds == block + 4 * [nn.MaxPool2d, *block] + 5 * [nn.ConvTranspose2d, *block] + [nn.Conv2d]


@pytest.mark.parametrize("skips", [False, True])
def test_the_decoder_sees_every_level_with_skips_and_the_coarsest_alone_without(skips: bool) -> None:
    model = base_conv(2, width=2, skips=skips)
    seen: list[int] = []
    assert isinstance(model, BaseConv)
    for i, level in enumerate(model.encoder):
        # The output of each level is passed to the next one without a gradient, so what is left came through a skip.
        level.register_forward_pre_hook(lambda module, inputs: inputs[0].detach())
        level.register_forward_hook(
            lambda module, inputs, output, i=i: output.register_hook(lambda gradient: seen.append(i)) and None
        )
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert sorted(seen) == ([0, 1, 2, 3, 4] if skips else [4])


@pytest.mark.parametrize("skips", [False, True])
def test_every_parameter_gets_a_gradient(skips: bool) -> None:
    model = base_conv(2, width=4, skips=skips)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_width_scales_all_layers() -> None:
    with torch.device("meta"):
        counts = [
            sum(parameter.numel() for parameter in base_conv(9, width=width, skips=True).parameters())
            for width in (32, 64)
        ]
    assert 3.9 < counts[1] / counts[0] < 4


def test_it_learns_where_a_square_is() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.rand(8, 3, 32, 32) * 0.5
    masks = torch.zeros(8, 32, 32, dtype=torch.long)
    for i, (top, left) in enumerate(torch.randint(0, 20, (8, 2)).tolist()):
        masks[i, top : top + 12, left : left + 12] = 1
    images += 0.5 * masks[:, None]
    model = base_conv(2, width=8, skips=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), masks).backward()
        optimizer.step()
    assert (model(images).argmax(1) == masks).float().mean() > 0.97
