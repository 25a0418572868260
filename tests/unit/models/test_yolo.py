"""YOLO: the published tensors, weights from a file, a frozen trunk, and boxes that are found again."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import max_pool2d
from torchvision.ops import box_iou

from trainer.components import catalogue
from trainer.detection.boxes import Targets, postprocess
from trainer.errors import UserError
from trainer.losses.yolo import YoloLoss
from trainer.models.freeze import set_train_mode, train_only
from trainer.models.weights import load_safetensors
from trainer.models.yolo import C3, PUBLISHED_ANCHORS, SPPF, yolo

PUBLISHED = json.loads(Path(__file__).with_name("yolo_v5n_tensors.json").read_text())
OTHER_ANCHORS = [
    [[5.0, 5.0], [6.0, 9.0], [9.0, 6.0]],
    [[20.0, 20.0], [20.0, 30.0], [30.0, 20.0]],
    [[50.5, 50.5], [60.0, 90.0], [90.0, 60.0]],
]


def test_tensors_of_size_n_are_the_published_ones() -> None:
    with torch.device("meta"):
        state = yolo(80, size="n").state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == PUBLISHED["tensors"]


@pytest.mark.parametrize("size", ["n", "s", "m", "l"])
def test_every_size_has_as_many_parameters_and_tensors_as_published(size: str) -> None:
    with torch.device("meta"):
        model = yolo(80, size=size)  # type: ignore[arg-type]
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED["parameters"][size]
    assert len(model.state_dict()) == PUBLISHED["entries"][size]


def test_every_layer_is_of_the_published_kind_and_takes_what_the_published_layers_give_it() -> None:
    """In this order: weights for channels that come first must not meet those that come second."""
    model = yolo(2).eval()
    outputs: dict[int, object] = {-1: torch.zeros(1, 3, 64, 64)}
    taken: dict[int, tuple[object, ...]] = {}

    def remember(index: int, module: object, inputs: tuple[object, ...], output: object) -> None:
        taken[index], outputs[index] = inputs, output

    for index, layer in enumerate(model.model):  # type: ignore[arg-type]
        layer.register_forward_hook(partial(remember, index))
    model(outputs[-1])
    for index, sources, kind, *_ in PUBLISHED["layers"][1:]:
        expected = [
            index - 1 if source == -1 else source for source in (sources if isinstance(sources, list) else [sources])
        ]
        assert type(model.model[index]).__name__ == kind.split()[0]  # type: ignore[index]
        assert [id(tensor) for tensor in taken[index]] == [id(outputs[source]) for source in expected], index


def test_what_went_through_the_bottlenecks_comes_before_what_went_past_them_and_wider_maxima_come_last() -> None:
    """Shapes don't reveal the order in which channels are concatenated, but weights depend on it."""
    block, pooling = C3(4, 8, depth=2).eval(), SPPF(8).eval()
    joined: list[Tensor] = []
    for layer in (block.cv3, pooling.cv2):
        layer.register_forward_pre_hook(lambda module, inputs: joined.append(inputs[0]))
    x, y = torch.rand(1, 4, 9, 9), torch.rand(1, 8, 9, 9)
    block(x), pooling(y)
    assert torch.equal(joined[0], torch.cat([block.m(block.cv1(x)), block.cv2(x)], dim=1))
    half = pooling.cv1(y)
    maxima = [half, *(max_pool2d(half, side, stride=1, padding=side // 2) for side in (5, 9, 13))]
    assert torch.equal(joined[1], torch.cat(maxima, dim=1))


def test_only_the_blocks_of_the_trunk_have_shortcuts() -> None:
    """A block whose bottlenecks change nothing passes its input on, or without shortcuts nothing."""
    layers = yolo(2, size="l").eval().model
    for index, _, kind, *_ in PUBLISHED["layers"][1:]:
        if kind.startswith("C3"):
            bottlenecks = layers[index].m  # type: ignore[index]
            for bottleneck in bottlenecks:
                torch.nn.init.zeros_(bottleneck.cv2.bn.weight)
            x = torch.rand(1, bottlenecks[0].cv1.conv.in_channels, 2, 2)
            assert torch.equal(bottlenecks(x), torch.zeros_like(x) if "no shortcut" in kind else x)
            assert len(bottlenecks) == int(kind.split()[1].strip("x,"))


def test_anchors_are_stored_in_cells_and_given_in_pixels() -> None:
    model = yolo(2)
    assert model.state_dict()["model.24.anchors"][1].tolist() == [
        [30 / 16, 61 / 16],
        [62 / 16, 45 / 16],
        [59 / 16, 119 / 16],
    ]
    assert [level.anchors.tolist() for level in model(torch.zeros(2, 3, 32, 32))] == PUBLISHED_ANCHORS


@pytest.mark.parametrize("channels_last", [False, True])
def test_an_image_has_boxes_at_three_strides(channels_last: bool) -> None:
    images = torch.zeros(2, 3, 64, 96)
    levels = yolo(4).eval()(images.to(memory_format=torch.channels_last) if channels_last else images)
    assert [(tuple(level.logits.shape), level.stride) for level in levels] == [
        ((2, 3, 8, 12, 9), 8),
        ((2, 3, 4, 6, 9), 16),
        ((2, 3, 2, 3, 9), 32),
    ]


def test_logits_keep_the_order_of_the_published_channels() -> None:
    model = yolo(2)
    head = model.model[24].m[0]  # type: ignore[union-attr,index]
    with torch.no_grad():
        head.weight.zero_()  # type: ignore[union-attr]
        head.bias.copy_(torch.arange(3.0 * 7))  # type: ignore[union-attr]
    logits = model(torch.rand(2, 3, 64, 32))[0].logits
    # 7 channels for the first anchor, then for the second.
    assert (logits == torch.arange(21.0).view(1, 3, 1, 1, 7)).all()


@pytest.mark.parametrize("size", [(64, 100), (100, 64)])
def test_images_of_another_size_are_refused_with_a_reason(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=rf"divisible by 32, and these are {size[0]} x {size[1]}"):
        yolo(1)(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # published weights are stored in half precision
def test_published_weights_load_with_no_key_missing_or_left(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {
        name: torch.rand(shape).to(dtype if shape else torch.int64) for name, shape in PUBLISHED["tensors"].items()
    }
    save_file(tensors, tmp_path / "n.safetensors")
    model = yolo(80)
    load_safetensors(model, tmp_path / "n.safetensors", [])
    assert all(torch.equal(tensor, tensors[name].to(tensor.dtype)) for name, tensor in model.state_dict().items())


def test_with_other_classes_the_head_starts_new(tmp_path: Path) -> None:
    save_file(yolo(80).state_dict(), tmp_path / "n.safetensors")
    model = yolo(2)
    with pytest.raises(ValueError, match=r"set model.reset_layers=\[model.24.m.0, model.24.m.1, model.24.m.2\]"):
        load_safetensors(model, tmp_path / "n.safetensors", [])
    load_safetensors(model, tmp_path / "n.safetensors", ["model.24.m"])


def test_anchors_come_from_the_recipe_or_else_from_the_weights(tmp_path: Path) -> None:
    trained_for = yolo(2, anchors=OTHER_ANCHORS)
    save_file(trained_for.state_dict(), tmp_path / "other.safetensors")
    image = torch.zeros(2, 3, 32, 32)
    for named, expected in ((None, OTHER_ANCHORS), (PUBLISHED_ANCHORS, PUBLISHED_ANCHORS)):
        model = copy.deepcopy(yolo(2, anchors=named))  # as the average of the weights is made
        load_safetensors(model, tmp_path / "other.safetensors", [])
        assert [level.anchors.tolist() for level in model(image)] == expected
        assert torch.equal(model.state_dict()["model.0.conv.weight"], trained_for.state_dict()["model.0.conv.weight"])


def test_a_new_head_expects_few_objects_and_each_class_alike() -> None:
    levels = yolo(5)(torch.rand(2, 3, 64, 64))
    for level in levels:
        assert level.logits[..., 4:].sigmoid().mean().item() == pytest.approx(0.01, rel=0.2)


def test_recipes_know_its_keys() -> None:
    schema = catalogue("model")["yolo"].schema
    assert schema.model_validate({}).model_dump() == {"size": "n", "anchors": None}
    assert schema.model_validate({"anchors": PUBLISHED_ANCHORS}).model_dump()["anchors"] == PUBLISHED_ANCHORS
    for wrong in (
        {"size": "x"},
        {"anchors": PUBLISHED_ANCHORS[:2]},
        {"anchors": [[[5, 5]] * 2] * 3},
        {"anchors": [[[0, 1]] * 3] * 3},
    ):
        with pytest.raises(ValueError):
            schema.model_validate(wrong)


def one_image() -> tuple[Tensor, Targets]:
    """Three coloured boxes on grey, each of another scale: float (1, 3, 128, 128)."""
    boxes = torch.tensor([[10.0, 14.0, 26.0, 34.0], [70.0, 8.0, 122.0, 60.0], [20.0, 50.0, 110.0, 124.0]])
    image = torch.full((1, 3, 128, 128), 0.4)
    for channel, (left, top, right, bottom) in enumerate(boxes.int().tolist()):
        image[0, channel, top:bottom, left:right] = 1
    return image, Targets(boxes, torch.tensor([2, 0, 1]), torch.zeros(3, dtype=torch.int64))


def test_the_boxes_of_an_image_it_was_trained_on_are_found_again() -> None:
    """With the statistics of the image itself: within so few steps the running ones of the batch norms don't arrive.

    How many steps that takes depends on how a CPU rounds, so it trains until they are found.
    """
    torch.manual_seed(0)
    image, targets = one_image()
    model, loss = yolo(3), YoloLoss(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    best = 0.0
    for step in range(1, 401):
        optimizer.zero_grad()
        loss.combine(loss(model(image), targets))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            (found,) = postprocess(model(image), conf_threshold=0.5, iou_threshold=0.5, max_detections=10)
            if sorted(found.labels.tolist()) == [0, 1, 2]:
                order = found.labels.argsort()[targets.labels]
                best = max(best, box_iou(found.boxes[order], targets.boxes).diagonal().min().item())
            if best > 0.8:
                return
    raise AssertionError(f"not found in {step} steps; the worst of the three boxes had an IoU of {best:.2f} at best")


def test_with_the_trunk_frozen_only_the_layers_behind_it_change() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    image, targets = one_image()
    model, loss = yolo(3), YoloLoss(3)
    train_only(model, [f"model.{index}" for index in range(10, 25)])
    set_train_mode(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss.combine(loss(model(image), targets))["loss"].backward()
        optimizer.step()
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert same == {name for name in before if int(name.split(".")[1]) < 10} | {"model.24.anchors"}
