from __future__ import annotations

import pytest
import torch

from trainer.detection.watershed import instances, watershed_targets
from trainer.losses.watershed import WatershedLoss
from trainer.models.watershed_unet import watershed_unet


@pytest.mark.parametrize("size", [(64, 64), (63, 37)])
def test_classes_with_background_and_distance_have_the_resolution_of_images_of_any_size(size: tuple[int, int]) -> None:
    output = watershed_unet(3, width=4)(torch.randn(2, 3, *size))
    assert output.semantic.shape == (2, 4, *size) and output.distance.shape == (2, *size)


def test_the_default_has_two_million_parameters() -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in watershed_unet(1).parameters()) == 1_942_611


def test_both_heads_are_trained_and_every_parameter_gets_a_gradient() -> None:
    model = watershed_unet(1, width=4, depth=3)
    output = model(torch.randn(2, 3, 16, 16))
    (output.semantic.square().mean() + output.distance.square().mean()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert model.unet.head.weight.grad.flatten(1).any(dim=1).all()


def test_it_learns_to_tell_apart_two_squares_that_touch() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    masks = torch.zeros(2, 32, 40, dtype=torch.uint8)
    masks[0, 6:24, 3:19] = 1
    masks[1, 8:26, 19:36] = 1
    image = (
        0.3 * torch.rand(1, 3, 32, 40)
        + masks[0] * torch.tensor([1.0, 0, 0]).view(3, 1, 1)
        + masks[1] * torch.tensor([0, 1.0, 0]).view(3, 1, 1)
    )
    size = (torch.tensor([32]), torch.tensor([40]))
    targets = watershed_targets(
        masks,
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.bool),
        torch.zeros(2, dtype=torch.int64),
        *size,
    )
    model, loss = watershed_unet(1, width=8, depth=3), WatershedLoss(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss.combine(loss(model(image), targets))["loss"].backward()
        optimizer.step()
    output = model(image)
    found = instances(output.semantic.detach()[0].softmax(0), output.distance.detach()[0], min_pixels=20)
    assert found.masks is not None and len(found.masks) == 2
    overlap = (found.masks[:, None] & masks.bool()).sum((2, 3)) / (found.masks[:, None] | masks.bool()).sum((2, 3))
    assert (overlap.amax(dim=0) > 0.9).all()
