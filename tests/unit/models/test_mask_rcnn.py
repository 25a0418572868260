from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from trainer.components import catalogue
from trainer.models.freeze import set_train_mode
from trainer.models.mask_rcnn import mask_rcnn
from trainer.models.weights import load_safetensors

PREDICTORS = ["roi_heads.box_predictor", "roi_heads.mask_predictor"]
TORCHVISION = {
    "resnet50": (detection.maskrcnn_resnet50_fpn, detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1),
    "resnet50_v2": (detection.maskrcnn_resnet50_fpn_v2, detection.MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1),
}


def published(backbone: str) -> dict[str, Tensor]:
    """Random tensors with the names and shapes of the published ones."""
    with torch.device("meta"):
        state = TORCHVISION[backbone][0](weights=None, weights_backbone=None, num_classes=91).state_dict()
    if backbone == "resnet50":  # was published with frozen batch norms, which don't count batches
        state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    return {name: torch.rand(tensor.shape).to(tensor.dtype) for name, tensor in state.items()}


def small() -> nn.Module:
    torch.manual_seed(0)
    return mask_rcnn(2, backbone="resnet18", min_size=64, max_size=128)


def sample() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of different sizes, the first one with an object of the last class."""
    masks = torch.zeros(1, 64, 80, dtype=torch.uint8)
    masks[0, 10:50, 20:45] = 1
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 70, 50, dtype=torch.uint8),
    }
    return [torch.rand(3, 64, 80), torch.rand(3, 70, 50)], [
        {"boxes": torch.tensor([[20.0, 10, 45, 50]]), "labels": torch.tensor([2]), "masks": masks},
        nothing,
    ]


@pytest.mark.parametrize("backbone", TORCHVISION)
def test_tensors_are_torchvisions_and_from_scratch_all_are_trainable(backbone: str) -> None:
    with torch.device("meta"):
        ours = mask_rcnn(4, backbone=backbone)  # type: ignore[arg-type]
        theirs = TORCHVISION[backbone][0](weights=None, weights_backbone=None, num_classes=5).state_dict()
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    assert all(parameter.requires_grad for parameter in ours.parameters())
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in ours.modules())


@pytest.mark.parametrize("backbone", TORCHVISION)
def test_coco_weights_are_all_kept_except_new_predictors_and_the_first_layers_are_frozen(
    backbone: str, checkpoints: Path
) -> None:
    expected = published(backbone)
    torch.save(expected, checkpoints / Path(TORCHVISION[backbone][1].url).name)
    model = mask_rcnn(1, backbone=backbone, weights="coco")  # type: ignore[arg-type]
    state = model.state_dict()
    changed = {name for name in state if not torch.equal(state[name], expected[name])}
    assert {name.rpartition(".")[0].rpartition(".")[0] for name in changed} == set(PREDICTORS)
    assert state["roi_heads.mask_predictor.mask_fcn_logits.weight"].shape == (2, 256, 1, 1)
    fixed = {
        ".".join(name.split(".")[:3]) for name, parameter in model.named_parameters() if not parameter.requires_grad
    }
    stem = {"backbone.body.conv1", "backbone.body.layer1"}
    assert fixed == (stem if backbone == "resnet50" else stem | {"backbone.body.bn1"})
    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert len(norms) == (53 if backbone == "resnet50" else 0) and all(norm.eps == 0 for norm in norms)


def test_a_converted_coco_file_loads_with_frozen_norms(tmp_path: Path) -> None:
    expected = published("resnet50")
    save_file(expected, tmp_path / "coco.safetensors")
    model = mask_rcnn(1, frozen_norm=True)
    load_safetensors(model, tmp_path / "coco.safetensors", PREDICTORS)
    assert torch.equal(
        model.state_dict()["backbone.body.layer4.2.bn3.running_var"], expected["backbone.body.layer4.2.bn3.running_var"]
    )


def test_the_small_one_is_small_and_says_what_it_lacks() -> None:
    with torch.device("meta"):
        assert (
            12_000_000
            < sum(parameter.numel() for parameter in mask_rcnn(1, backbone="resnet18").parameters())
            < 13_000_000
        )
    with pytest.raises(ValueError, match="no weights coco for backbone resnet18"):
        mask_rcnn(1, backbone="resnet18", weights="coco")
    with pytest.raises(ValueError, match="frozen_norm is for backbone resnet50"):
        mask_rcnn(1, backbone="resnet50_v2", frozen_norm=True)


def test_every_parameter_is_trained_also_by_images_of_different_sizes_and_without_objects() -> None:
    model = small()
    losses = model(*sample())
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    model.zero_grad()
    images, (_, nothing) = sample()
    empty = model(images[1:], [nothing])
    sum(empty.values()).backward()
    assert all(loss.isfinite() for loss in empty.values()) and empty["loss_mask"] == 0
    assert all(parameter.grad is not None for parameter in model.parameters()), (
        "processes would wait for the missing ones"
    )


def test_frozen_layers_do_not_change_what_the_rest_returns_in_training() -> None:
    model = small()
    for name in ("conv1", "bn1", "layer1"):
        model.backbone.body[name].requires_grad_(False)
    set_train_mode(model)
    assert len(model(*sample())) == 5


def test_detections_have_masks_at_the_size_of_each_image() -> None:
    model, (images, _) = small().eval(), sample()
    model.roi_heads.score_thresh = 0.0  # an untrained net finds nothing with certainty
    with torch.no_grad():
        found = model(images)
    assert [tuple(each["masks"].shape[1:]) for each in found] == [(1, 64, 80), (1, 70, 50)]
    assert all(len(each["boxes"]) and set(each["labels"].tolist()) <= {1, 2} for each in found)


def decoded(model: nn.Module, images: list[Tensor], dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of the proposals and of the final boxes: deltas, the boxes that they refer to, and what these decode to,
    under autocast to `dtype`.
    """
    calls = []
    for part in (model.rpn, model.roi_heads):
        plain = part.box_coder.decode

        def record(deltas: Tensor, boxes: list[Tensor], plain: Any = plain) -> Tensor:
            calls.append((deltas, torch.cat(boxes), plain(deltas, boxes)))
            return calls[-1][2]

        part.box_coder.decode = record
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(images)
    return calls


def expected_boxes(deltas: Tensor, boxes: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Girshick et al., "Rich feature hierarchies", 2014, appendix C, in double precision."""
    parts = deltas.double().view(len(boxes), -1, 4) / torch.tensor(weights, dtype=torch.float64)
    low, high = boxes.double()[:, None].split(2, dim=2)
    centres = (low + high) / 2 + parts[..., :2] * (high - low)
    halves = (high - low) * parts[..., 2:].exp() / 2
    return torch.cat([centres - halves, centres + halves], dim=-1)


@pytest.mark.parametrize("copied", [False, True], ids=["model", "copy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_boxes_under_autocast_are_decoded_in_full_precision(dtype: torch.dtype, copied: bool) -> None:
    images = [torch.rand(3, 120, 64), torch.rand(3, 70, 90)]
    models = [deepcopy(small()).eval() if copied else small().eval() for _ in range(2)]
    calls, plain_calls = decoded(models[0], images, dtype), decoded(models[1], images, torch.float32)
    assert len(calls) == 2, "proposals, then boxes"
    for (deltas, boxes, found), weights in zip(calls, [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)], strict=True):
        assert deltas.dtype == boxes.dtype == found.dtype == torch.float32
        expected = expected_boxes(deltas, boxes, weights)
        assert (found.view_as(expected) - expected).abs().max() < 0.01
    assert torch.equal(calls[0][1], plain_calls[0][1]), "anchors don't depend on the precision of the network"


def test_regression_targets_under_autocast_are_those_of_full_precision() -> None:
    model, (images, targets) = small(), sample()
    encoded: list[Tensor] = []
    for part in (model.rpn, model.roi_heads):
        plain = part.box_coder.encode

        def record(true: list[Tensor], boxes: list[Tensor], plain: Any = plain) -> Any:
            assert {each.dtype for each in (*true, *boxes)} == {torch.float32}
            encoded.extend(plain(true, boxes))
            return encoded[-len(boxes) :]

        part.box_coder.encode = record
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, targets)
    assert len(encoded) == 2 * len(images) and {each.dtype for each in encoded} == {torch.float32}
    sum(losses.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_recipes_know_its_keys() -> None:
    schema = catalogue("model")["mask_rcnn"].schema
    expected = {"backbone": "resnet50", "min_size": 800, "max_size": 1333, "frozen_norm": False, "weights": "none"}
    assert schema.model_validate({}).model_dump() == expected


def test_regions_of_an_image_are_the_same_whichever_image_was_seen_first() -> None:
    """Small images, of which padding makes up much."""
    images = [
        torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
        for height, width in ((50, 53), (64, 49))
    ]
    pooled = []
    for first in images:
        torch.manual_seed(0)
        net = mask_rcnn(2, backbone="resnet18", min_size=32, max_size=48).eval()
        with torch.no_grad():
            net([first])
            net.roi_heads.box_roi_pool.register_forward_hook(lambda pool, inputs, outputs: pooled.append(outputs))
            net([images[0]])
    assert torch.equal(*pooled)
