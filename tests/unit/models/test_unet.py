from __future__ import annotations

import pytest
import torch

from trainer.models.unet import unet


@pytest.mark.parametrize("size", [(64, 64), (63, 37), (5, 1)])
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_logits_have_the_resolution_of_images_of_any_size(size: tuple[int, int], depth: int) -> None:
    model = unet(3, width=4, depth=depth)
    assert model(torch.randn(2, 3, *size)).shape == (2, 3, *size)


def test_the_default_is_small() -> None:
    with torch.device("meta"):
        assert 100_000 < sum(parameter.numel() for parameter in unet(2).parameters()) < 130_000


def test_it_learns_where_a_square_is() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.rand(8, 3, 24, 24) * 0.5
    masks = torch.zeros(8, 24, 24, dtype=torch.long)
    for i, (top, left) in enumerate(torch.randint(0, 14, (8, 2)).tolist()):
        masks[i, top : top + 10, left : left + 10] = 1
    images += 0.5 * masks[:, None]
    model = unet(2, width=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), masks).backward()
        optimizer.step()
    assert (model(images).argmax(1) == masks).float().mean() > 0.97


def test_every_parameter_gets_a_gradient() -> None:
    model = unet(2)
    model(torch.randn(2, 3, 16, 16)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
