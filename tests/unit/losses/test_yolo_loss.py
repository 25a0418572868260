"""The detection loss: its terms, which boxes it assigns to which predictions, and what no batch may break."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_convert, complete_box_iou_loss

from trainer.detection.boxes import Level, Targets, decode
from trainer.losses.yolo import YoloLoss, assign, complete_iou

ANCHORS = torch.tensor(
    [[[10.0, 13], [16, 30], [33, 23]], [[30, 61], [62, 45], [59, 119]], [[116, 90], [156, 198], [373, 326]]]
)
CLASSES = 4
NO_BOXES = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))


def outputs(
    batch: int = 3, classes: int = CLASSES, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> list[Level]:
    """Random logits for images of 64 x 96 pixels."""
    generator = torch.Generator().manual_seed(batch + classes)
    shapes = [(batch, 3, 64 // stride, 96 // stride, 5 + classes) for stride in (8, 16, 32)]
    logits = [
        (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for shape in shapes
    ]
    return [Level(each, anchors, stride) for each, anchors, stride in zip(logits, ANCHORS, (8, 16, 32), strict=True)]


def sample(batch: int = 3) -> Targets:
    """Six boxes: two that share their nearest cells, one in a corner; the last image has none."""
    boxes = [[10, 10, 30, 40], [11, 11, 31, 41], [40, 3, 95, 60], [80, 50, 96, 64], [2, 30, 60, 63], [50, 20, 62, 31]]
    return Targets(
        torch.tensor(boxes, dtype=torch.float32),
        torch.tensor([0, 3, 1, 2, 2, 0]),
        torch.tensor([0, 0, 0, 1, 1, 1]) % batch,
    )


def value(loss: YoloLoss, levels: list[Level], targets: Targets) -> Tensor:
    return loss.combine(loss(levels, targets))["loss"]


def part(targets: Targets, images: range) -> Targets:
    """The boxes of some of the images, numbered from 0 again."""
    here = torch.tensor([int(i) in images for i in targets.image_index])
    return Targets(targets.boxes[here], targets.labels[here], targets.image_index[here] - images.start)


def matches_of(level: Level, box: list[float], max_ratio: float = 4.0) -> set[tuple[int, int, int]]:
    """Anchor, row and column of what is assigned to a single box."""
    targets = Targets(torch.tensor([box]), torch.tensor([0]), torch.tensor([1]))
    found = assign(level, targets, max_ratio)
    assert set(found.image.tolist()) <= {1} and set(found.target.tolist()) <= {0}
    places = list(zip(found.anchor.tolist(), found.row.tolist(), found.column.tolist(), strict=True))
    assert len(set(places)) == len(places)
    return set(places)


def test_complete_iou_is_torchvisions() -> None:
    generator = torch.Generator().manual_seed(0)
    centres, sizes = (
        torch.rand(2, 500, 2, generator=generator, dtype=torch.float64) * 60,
        torch.rand(2, 500, 2, generator=generator, dtype=torch.float64) * 60 + 1,
    )
    predicted, true = torch.cat([centres, sizes], dim=-1).requires_grad_()
    ciou = complete_iou(predicted, true)
    expected = complete_box_iou_loss(*(box_convert(boxes, "cxcywh", "xyxy") for boxes in (predicted, true)))
    torch.testing.assert_close(1 - ciou, expected, rtol=0, atol=1e-6)
    gradients = [torch.autograd.grad(each.sum(), predicted)[0] for each in (1 - ciou, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    assert 0.1 < (ciou > 0).double().mean() < 0.9


def test_equal_boxes_have_a_complete_iou_of_one_and_boxes_without_area_a_finite_gradient() -> None:
    box = torch.tensor(
        [[20.0, 20.0, 7.0, 9.0], [20.0, 20.0, 0.0, 0.0], [20.0, 20.0, 1e-160, 1e-160]],
        dtype=torch.float64,
        requires_grad=True,
    )
    ciou = complete_iou(box, torch.tensor([[20.0, 20.0, 7.0, 9.0]] * 3, dtype=torch.float64))
    assert ciou[0] == 1 and ciou[1:].max() < 0.01
    (gradient,) = torch.autograd.grad(ciou.sum(), box)
    assert gradient.isfinite().all()


def test_a_box_is_assigned_by_hand() -> None:
    """A box of 20 x 30 pixels at column 2.75, row 1.25 of the cells of 8 pixels: its cell, the one to the right,
    the one above.
    """
    level = outputs()[0]
    assert level.logits.shape[2:4] == (8, 12)
    cells = {(1, 2), (1, 3), (0, 2)}
    box = [22.0 - 10, 10.0 - 15, 22.0 + 10, 10.0 + 15]
    assert matches_of(level, box) == {(anchor, *cell) for anchor in range(3) for cell in cells}
    # Ratios of the sides to the anchors': (2, 2.31), (1.25, 1), (1.65, 1.30).
    assert matches_of(level, box, max_ratio=2.2) == {(anchor, *cell) for anchor in (1, 2) for cell in cells}
    assert matches_of(level, box, max_ratio=1.5) == {(1, *cell) for cell in cells}
    assert matches_of(level, box, max_ratio=1.2) == set()


def test_at_the_border_of_the_image_only_cells_that_exist_are_assigned() -> None:
    level = outputs()[0]
    corners = {
        (0.0, 0.0): {(0, 0)},
        (96.0, 64.0): {(7, 11)},
        (95.0, 63.0): {(7, 11)},
        (2.0, 63.0): {(7, 0)},
        (90.0, 1.0): {(0, 11), (0, 10)},
    }
    for (x, y), cells in corners.items():
        assert matches_of(level, [x - 8, y - 8, x + 8, y + 8]) == {
            (anchor, *cell) for anchor in range(3) for cell in cells
        }


def test_a_centre_in_the_middle_of_its_cell_has_no_nearer_neighbour() -> None:
    assert matches_of(outputs()[0], [20.0 - 8, 20.0 - 8, 20.0 + 8, 20.0 + 8]) == {(anchor, 2, 2) for anchor in range(3)}


def test_every_assigned_prediction_can_reach_the_box() -> None:
    """The logits that decode to a box exist for each of its matches: the decoding and the assignment fit together."""
    generator = torch.Generator().manual_seed(0)
    centres, sizes = (
        torch.rand(300, 2, generator=generator, dtype=torch.float64) * torch.tensor([96.0, 64.0]),
        torch.rand(300, 2, generator=generator, dtype=torch.float64) * 200,
    )
    true = torch.cat([centres, sizes], dim=1)
    targets = Targets(
        box_convert(true, "cxcywh", "xyxy"), torch.zeros(300, dtype=torch.int64), torch.zeros(300, dtype=torch.int64)
    )
    for level in outputs():
        found = assign(level, targets, max_ratio=4.0)
        assert len(found.target) > 100
        cells, anchors = torch.stack([found.column, found.row], dim=1), level.anchors[found.anchor]
        xy = ((centres[found.target] / level.stride - cells + 0.5) / 2).logit()
        wh = ((sizes[found.target] / anchors).sqrt() / 2).logit()
        decoded = decode(torch.cat([xy, wh], dim=1), cells, anchors, level.stride)
        torch.testing.assert_close(decoded, true[found.target], rtol=1e-9, atol=1e-9)


def test_each_term_is_its_formula() -> None:
    """One box that one scale alone takes, everything else summed by hand."""
    levels, targets = (
        outputs(batch=1),
        Targets(torch.tensor([[12.0, 18.0, 22.0, 28.0]]), torch.tensor([2]), torch.tensor([0])),
    )
    epsilon, obj_pw, cls_pw, balance = 0.2, 1.7, 2.5, (4.0, 1.0, 0.4)
    loss = YoloLoss(CLASSES, max_ratio=1.5, label_smoothing=epsilon, obj_pw=obj_pw, cls_pw=cls_pw, scale_gains=False)
    terms = loss.combine(loss(levels, targets))
    places = [(0, 2, 2), (0, 3, 2)]  # centre at column 2.125, row 2.875, and the left neighbour below
    places += [(0, 2, 1)]
    box = classes = 0.0
    expected = {place: 0.0 for place in places}
    for anchor, row, column in places:
        logits = levels[0].logits[0, anchor, row, column].detach()
        predicted = decode(logits, torch.tensor([column, row]), ANCHORS[0, anchor], 8)[None]
        ciou = complete_iou(predicted, torch.tensor([[17.0, 23.0, 10.0, 10.0]], dtype=torch.float64))
        box += (1 - ciou.item()) / len(places)
        expected[anchor, row, column] = max(ciou.item(), 0.0)
        for label, p in enumerate(logits[5:].sigmoid().tolist()):
            y = 1 - epsilon / 2 if label == 2 else epsilon / 2
            classes -= (cls_pw * y * math.log(p) + (1 - y) * math.log(1 - p)) / len(places) / CLASSES
    objectness = 0.0
    for index, level in enumerate(levels):
        p = level.logits[0, ..., 4].sigmoid().detach()
        for anchor, row, column in [tuple(place) for place in (p > 0).nonzero().tolist()]:
            y, q = expected.get((anchor, row, column), 0.0) if index == 0 else 0.0, p[anchor, row, column].item()
            objectness -= balance[index] * (obj_pw * y * math.log(q) + (1 - y) * math.log(1 - q)) / p.numel()
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {
            "loss": 0.05 * box + objectness + 0.5 * classes,
            "box_loss": box,
            "objectness_loss": objectness,
            "class_loss": classes,
        },
        rel=1e-9,
    )


def slow_loss(logits: list[Tensor], targets: Targets, constants: dict[Any, float]) -> Tensor:
    """The loss of images of 64 x 96 pixels, box by box and cell by cell.

    What the backward pass takes for constant, alpha of the complete IoU and the target of the objectness, is in
    `constants` from the first call on.
    """
    terms = {"box": torch.zeros(()), "objectness": torch.zeros(()), "class": torch.zeros(())}
    for level, (values, anchors, stride, balance) in enumerate(
        zip(logits, ANCHORS.double(), (8, 16, 32), (4.0, 1.0, 0.4), strict=True)
    ):
        pairs: list[tuple[Tensor, Tensor]] = []
        goals: dict[tuple[int, ...], float] = {}
        for number, ((left, top, right, bottom), label, image) in enumerate(
            zip(*(field.tolist() for field in targets), strict=True)
        ):
            x, y, w, h = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
            for anchor, row, column in product(range(3), range(64 // stride), range(96 // stride)):
                aw, ah = anchors[anchor].tolist()
                dx, dy = x / stride - column - 0.5, y / stride - row - 0.5  # from the middle of the cell
                inside = [-0.5 <= d < 0.5 for d in (dx, dy)]
                near = all(inside) or (any(inside) and max(abs(dx), abs(dy)) < 1)
                if not near or max(w / aw, aw / w, h / ah, ah / h) >= 4:
                    continue
                found = values[image, anchor, row, column]
                px, py = ((2 * found[i].sigmoid() - 0.5 + cell) * stride for i, cell in ((0, column), (1, row)))
                pw, ph = ((2 * found[2 + i].sigmoid()) ** 2 * side for i, side in enumerate((aw, ah)))
                sides = tensors(px, pw, x, w), tensors(py, ph, y, h)
                shared = [
                    (torch.minimum(p + ps / 2, t + ts / 2) - torch.maximum(p - ps / 2, t - ts / 2)).clamp(min=0)
                    for p, ps, t, ts in sides
                ]
                whole = [
                    torch.maximum(p + ps / 2, t + ts / 2) - torch.minimum(p - ps / 2, t - ts / 2)
                    for p, ps, t, ts in sides
                ]
                iou = shared[0] * shared[1] / (pw * ph + w * h - shared[0] * shared[1])
                aspect = 4 / math.pi**2 * (math.atan(w / h) - torch.atan(pw / ph)) ** 2
                alpha = constants.setdefault(
                    ("alpha", level, number, anchor, row, column), (aspect / (1 - iou + aspect)).item()
                )
                ciou = iou - ((px - x) ** 2 + (py - y) ** 2) / (whole[0] ** 2 + whole[1] ** 2) - alpha * aspect
                place = (image, anchor, row, column)
                goals[place] = max(goals.get(place, 0.0), ciou.item())
                wanted = torch.full((CLASSES,), 0.05, dtype=torch.float64)
                wanted[label] = 0.95
                p = found[5:].sigmoid()
                pairs.append((1 - ciou, -(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean()))
        goal = torch.zeros(values.shape[:4], dtype=torch.float64)
        for place in product(*map(range, goal.shape)):
            goal[place] = constants.setdefault(("goal", level, *place), goals.get(place, 0.0))
        p = values[..., 4].sigmoid()
        terms["objectness"] = terms["objectness"] - balance * (goal * p.log() + (1 - goal) * (1 - p).log()).mean()
        for name, each in zip(("box", "class"), zip(*pairs, strict=True), strict=True):
            terms[name] = terms[name] + torch.stack(each).mean()
    return 0.05 * terms["box"] + 64 * 96 / 640**2 * terms["objectness"] + 0.5 * CLASSES / 80 * terms["class"]


def tensors(*values: Any) -> list[Tensor]:
    return [torch.as_tensor(each, dtype=torch.float64) for each in values]


def test_value_and_gradient_are_those_of_a_slow_reference_whose_gradient_is_that_of_finite_differences() -> None:
    levels, targets = outputs(batch=2), sample(batch=2)
    logits = [level.logits for level in levels]
    constants: dict[Any, float] = {}
    expected = slow_loss(logits, targets, constants)
    assert torch.autograd.gradcheck(lambda *values: slow_loss(list(values), targets, constants), logits, fast_mode=True)
    found = value(YoloLoss(CLASSES, label_smoothing=0.1), levels, targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    for ours, theirs in zip(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)
    goals = [goal for (name, *_), goal in constants.items() if name == "goal" and goal]
    num_matches = sum(name == "alpha" for name, *_ in constants)
    assert 10 < len(goals) < num_matches - 10, (
        "some predictions answer for two boxes, or for one that they don't overlap"
    )


def test_gains_are_for_80_classes_640_pixels_and_three_scales() -> None:
    """Reported terms are means, whatever the gains."""
    levels, targets = outputs(), sample()
    for used, classes in ((levels, CLASSES), (levels[:2], CLASSES), (outputs(classes=7), 7)):
        balance = [4.0, 1.0, 0.4][: len(used)]
        scaled, plain = (YoloLoss(classes, balance=balance, scale_gains=scale) for scale in (True, False))
        terms = scaled.combine(scaled(used, targets))
        assert {name: term for name, term in terms.items() if name != "loss"} == {
            name: term for name, term in plain.combine(plain(used, targets)).items() if name != "loss"
        }
        gains = {"box_loss": 0.05, "objectness_loss": 64 * 96 / 640**2, "class_loss": 0.5 * classes / 80}
        assert terms["loss"].item() == pytest.approx(
            sum(3 / len(used) * gain * terms[name].item() for name, gain in gains.items()), rel=1e-12
        )


def test_the_objectness_target_is_made_without_what_cuda_has_no_deterministic_version_of() -> None:
    class Operations(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: set[str] = set()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.add(function.name())
            return function(*args, **(kwargs or {}))

    loss, levels = YoloLoss(CLASSES), outputs()
    with Operations() as operations:
        torch.autograd.grad(value(loss, levels, sample()), [level.logits for level in levels])
    assert "aten::binary_cross_entropy_with_logits" in operations.names
    assert not {
        name
        for name in operations.names
        if name.startswith(("aten::scatter_reduce", "aten::index_reduce", "aten::put"))
    }


def test_gradient_of_objectness_and_classes_is_that_of_finite_differences() -> None:
    """In a random direction in which no box moves: the target of the objectness is a constant in the backward pass."""
    loss, levels, targets = YoloLoss(CLASSES, label_smoothing=0.1, obj_pw=1.5, cls_pw=2.0), outputs(), sample()
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(level.logits.shape, generator=generator, dtype=torch.float64) for level in levels]
    for direction in directions:
        direction[..., :4] = 0
    moved = [
        value(
            loss,
            [
                level._replace(logits=level.logits + step * direction)
                for level, direction in zip(levels, directions, strict=True)
            ],
            targets,
        ).item()
        for step in (1e-5, -1e-5)
    ]
    gradients = torch.autograd.grad(value(loss, levels, targets), [level.logits for level in levels])
    slope = sum((gradient * direction).sum().item() for gradient, direction in zip(gradients, directions, strict=True))
    assert slope == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-7)


def test_the_sums_of_two_parts_have_value_and_gradient_of_the_whole() -> None:
    """As many processes do: each differentiates its own summands of the totals."""
    loss, levels, targets = YoloLoss(CLASSES), outputs(), sample()
    whole = value(loss, levels, targets)
    whole_gradients = torch.autograd.grad(whole, [level.logits for level in levels])
    parts = [range(0, 1), range(1, 3)]
    local = [
        [level._replace(logits=level.logits[images.start : images.stop].detach().requires_grad_()) for level in levels]
        for images in parts
    ]
    sums = [loss(mine, part(targets, images)) for mine, images in zip(local, parts, strict=True)]
    for images, mine, own, other in zip(parts, local, sums, reversed(sums), strict=True):
        combined = loss.combine({name: own[name] + other[name].detach() for name in own})["loss"]
        torch.testing.assert_close(combined, whole, rtol=1e-12, atol=0)
        for gradient, expected in zip(
            torch.autograd.grad(combined, [level.logits for level in mine]), whole_gradients, strict=True
        ):
            torch.testing.assert_close(gradient, expected[images.start : images.stop], rtol=1e-9, atol=1e-15)


def test_the_order_of_the_boxes_does_not_matter() -> None:
    loss, levels, targets = YoloLoss(CLASSES), outputs(), sample()
    turned = Targets(*(field.flip(0) for field in targets))
    torch.testing.assert_close(value(loss, levels, turned), value(loss, levels, targets), rtol=1e-12, atol=0)


def test_the_same_batch_has_the_same_gradient_bit_for_bit() -> None:
    loss, levels = YoloLoss(CLASSES), outputs(dtype=torch.float32)
    first, second = (
        torch.autograd.grad(value(loss, levels, sample()), [level.logits for level in levels]) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "targets",
    [NO_BOXES, Targets(torch.tensor([[0.0, 0.0, 64.0, 1.0]]), torch.tensor([0]), torch.tensor([0]))],
    ids=["empty", "no anchor"],
)
def test_without_boxes_only_the_objectness_counts_and_every_gradient_is_finite(targets: Targets) -> None:
    loss, levels = YoloLoss(CLASSES), outputs()
    terms = loss.combine(loss(levels, targets))
    assert terms["box_loss"] == terms["class_loss"] == 0 and terms["objectness_loss"] > 0
    for gradient in torch.autograd.grad(terms["loss"], [level.logits for level in levels]):
        assert gradient[..., 4].all() and not gradient[..., :4].any() and not gradient[..., 5:].any()


def test_no_image_at_all_gives_sums_of_zero() -> None:
    loss = YoloLoss(CLASSES)
    sums = loss(outputs(batch=0), NO_BOXES)
    assert not any(total.any() for total in sums.values())
    assert loss.combine(sums)["loss"] == 0


def test_a_single_class_has_no_class_term() -> None:
    loss = YoloLoss(1)
    levels, targets = outputs(classes=1), sample()._replace(labels=torch.zeros(6, dtype=torch.int64))
    terms = loss.combine(loss(levels, targets))
    assert terms.keys() == {"loss", "box_loss", "objectness_loss"}
    for gradient in torch.autograd.grad(terms["loss"], [level.logits for level in levels]):
        assert gradient[..., :5].any() and not gradient[..., 5:].any()


def test_the_target_of_objectness_is_the_complete_iou_and_nothing_else_is_trained_by_it() -> None:
    loss, levels = YoloLoss(CLASSES, box_gain=0.0, cls_gain=0.0), outputs()
    for gradient in torch.autograd.grad(value(loss, levels, sample()), [level.logits for level in levels]):
        assert gradient[..., 4].all() and not gradient[..., :4].any() and not gradient[..., 5:].any()


def test_the_target_of_a_prediction_assigned_to_two_boxes_is_the_larger_complete_iou() -> None:
    loss, levels, targets = YoloLoss(CLASSES), outputs(), sample()
    twice = Targets(*(torch.cat([field, field]) for field in targets))
    once, again = (loss.combine(loss(levels, each)) for each in (targets, twice))
    assert {name: term.item() for name, term in again.items()} == pytest.approx(
        {name: term.item() for name, term in once.items()}, rel=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_of_any_precision_keep_loss_and_gradient_finite(dtype: torch.dtype) -> None:
    loss, levels = YoloLoss(CLASSES), outputs(dtype=dtype, scale=1e4)
    sums = loss(levels, sample())
    assert {total.dtype for total in sums.values()} == {torch.float64}
    result = loss.combine(sums)["loss"]
    assert result.isfinite()
    for gradient in torch.autograd.grad(result, [level.logits for level in levels]):
        assert gradient.isfinite().all()


def test_half_precision_costs_no_more_than_the_rounding_of_the_logits() -> None:
    loss, levels = YoloLoss(CLASSES), outputs(dtype=torch.float16)
    exact = [level._replace(logits=level.logits.double()) for level in levels]
    torch.testing.assert_close(value(loss, levels, sample()), value(loss, exact, sample()), rtol=1e-12, atol=0)
