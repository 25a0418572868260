"""Promises about places: what a network finds in its input lies at the same place in the image, of any size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.detection.boxes import Detections
from trainer.inference import geometry
from trainer.inference.geometry import Frame, Preparation

sides = st.integers(1, 90)
kinds = st.sampled_from(["stretch", "letterbox", "own size"])


def preparation(kind: str) -> Preparation:
    return Preparation(None, divisor=16) if kind == "own size" else Preparation((48, 64), kind == "letterbox")


def to_input(x: float, y: float, height: int, width: int, kind: str) -> tuple[float, float]:
    """Where a point of the image goes, by a formula of its own."""
    if kind == "own size":
        return x, y
    if kind == "stretch":
        return x * 64 / width, y * 48 / height
    scale = min(48 / height, 64 / width)
    inner = [max(1, round(scale * side)) for side in (width, height)]
    return (64 - inner[0]) // 2 + x * inner[0] / width, (48 - inner[1]) // 2 + y * inner[1] / height


@settings(max_examples=60, deadline=None)
@given(sides, sides, kinds, st.tuples(*[st.floats(0, 1)] * 4))
def test_a_box_found_in_the_input_is_the_box_in_the_image(
    height: int, width: int, kind: str, shares: tuple[float, float, float, float]
) -> None:
    prepared, frame = preparation(kind)(torch.zeros(3, height, width, dtype=torch.uint8))
    (left, right), (top, bottom) = sorted(shares[:2]), sorted(shares[2:])
    box = [left * width, top * height, right * width, bottom * height]
    seen = [*to_input(*box[:2], height, width, kind), *to_input(*box[2:], height, width, kind)]
    assert seen[2] <= prepared.shape[2] and seen[3] <= prepared.shape[1]
    one = torch.ones(1)
    back = frame.detections_back(Detections(torch.tensor([seen]), one, one.long())).boxes
    torch.testing.assert_close(back, torch.tensor([box]), atol=1e-3, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(sides, sides, kinds)
def test_a_mask_fills_the_image_where_it_fills_its_part_of_the_input(height: int, width: int, kind: str) -> None:
    prepared, frame = preparation(kind)(torch.full((3, height, width), 255, dtype=torch.uint8))
    masks = (prepared == 255).all(0)[None]  # without the grey of the letterbox
    nothing = torch.zeros(1, 4), torch.ones(1), torch.zeros(1, dtype=torch.int64)
    back = frame.detections_back(Detections(*nothing, masks)).masks
    assert back is not None and back.dtype == torch.bool
    assert back.shape == (1, height, width) and back.all()


@settings(max_examples=40, deadline=None)
@given(sides, sides, sides, sides, st.sampled_from([1, 500, 2**22]))
def test_maps_are_resized_bilinearly_whatever_the_strips(h: int, w: int, height: int, width: int, values: int) -> None:
    maps, frame = torch.randn(1, 3, h, w), Frame((height, width), (0, 0, w, h))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "STRIP_VALUES", values)
        resized = frame.map_back(maps)
    expected = F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resized, expected, atol=1e-4, rtol=1e-4)


def test_padding_at_the_own_size_is_cut_off() -> None:
    image = torch.arange(3 * 5 * 7, dtype=torch.uint8).view(3, 5, 7)
    prepared, frame = Preparation(None, divisor=4)(image)
    assert prepared.shape == (3, 8, 8)
    assert torch.equal(frame.map_back(prepared[None].float())[0], image.float())


def test_no_detections_stay_none_at_the_size_of_the_image() -> None:
    empty = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 8, 8) > 0)
    masks = Frame((5, 9), (0, 0, 8, 8)).detections_back(empty).masks
    assert masks is not None and masks.shape == (0, 5, 9)
