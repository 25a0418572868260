"""Whatever a recipe may list under `data.augment` moves an image and its mask together, and never mixes labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from trainer.components import Component, catalogue
from trainer.recipe.recipe import build

AUGMENTATIONS = {
    name: component for name, component in catalogue("augmentation").items() if name != "mosaic"
}  # which takes several samples: see test_objects.py
LABELS = [0, 30, 60, 90, 120, 150, 180]  # far apart, so that a mixture of two is none of them
IGNORE = 255
BLOCK = 8  # pixels of a side of the squares that have one label


def interval(low: float, high: float) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(low, high), min_size=2, max_size=2).map(sorted)


# What the keys of augmentations may be set to. Jitter is weak enough that no two of the colours below become one.
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "size": st.lists(st.integers(16, 64), min_size=2, max_size=2),
    "scale": interval(0.2, 1.0),
    "ratio": interval(0.5, 2.0),
    "p": st.floats(0, 1),
    **dict.fromkeys(("brightness", "contrast", "saturation"), st.floats(0, 0.3)),
    "hue": st.floats(0, 0.1),
}


def sample(height: int, width: int, seed: int) -> dict[str, Tensor]:
    """A mask of random squares, and an image that shows each label in its own colour, a corner of the RGB cube."""
    random = np.random.default_rng(seed)
    squares = random.integers(0, len(LABELS), (-(-height // BLOCK), -(-width // BLOCK)))
    index = torch.from_numpy(np.kron(squares, np.ones((BLOCK, BLOCK), np.int64))[:height, :width])
    image = torch.stack([(index >> channel & 1) * 255 for channel in range(3)]).to(torch.uint8)
    return {
        "image": tv_tensors.Image(image),
        "mask": tv_tensors.Mask(torch.tensor(LABELS, dtype=torch.uint8)[index][None]),
    }


def check(transform: Callable[[Any], Any], before: dict[str, Tensor], ignore_index: int | None) -> int:
    """Asserts that mask and image belong together afterwards; returns how many pixels it could compare.

    Those are the ones of a colour that somewhere fills a square of 3 x 3: only these are no mixtures, since the colours
    of the labels are corners. If the mask moved with the image, each colour still has one label, and each label one
    colour.
    """
    after = transform(before)
    image, mask = after["image"].as_subclass(Tensor).long(), after["mask"].as_subclass(Tensor)[0]
    assert after["image"].shape[1:] == mask.shape
    assert set(mask.unique().tolist()) <= {*LABELS, ignore_index}, "labels were mixed"
    color = image[0] << 16 | image[1] << 8 | image[2]
    around = torch.stack(
        [color[1 + y : color.shape[0] - 1 + y, 1 + x : color.shape[1] - 1 + x] for y in (-1, 0, 1) for x in (-1, 0, 1)]
    )
    telling = torch.isin(color, around[4][(around == around[4]).all(0)]) & (mask != IGNORE)
    pairs = set(zip(color[telling].tolist(), mask[telling].tolist(), strict=True))
    assert len(pairs) == len({color for color, _ in pairs}) == len({label for _, label in pairs}), (
        "the mask did not move with its image"
    )
    return int(telling.sum())


def chosen(data: st.DataObject, component: Component) -> Any:
    """The augmentation with settings that a recipe may have."""
    lacking = component.schema.model_fields.keys() - VALUES.keys()
    assert not lacking, f"add to VALUES the values of {lacking} of {component.name}"
    given = {key: data.draw(VALUES[key], label=key) for key in component.schema.model_fields}
    return component.schema(**given)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    data=st.data(),
    height=st.integers(24, 64),
    width=st.integers(24, 64),
    seed=st.integers(0, 2**16),
    ignore_index=st.sampled_from([IGNORE, None]),
)
def test_image_and_mask_stay_aligned_and_labels_are_never_mixed(
    name: str, data: st.DataObject, height: int, width: int, seed: int, ignore_index: int | None
) -> None:
    transform = build(
        AUGMENTATIONS[name],
        chosen(data, AUGMENTATIONS[name]),
        ignore_index=ignore_index,
        resize=None,
        has_objects=False,
    )
    torch.manual_seed(seed)
    check(transform, sample(height, width, seed), ignore_index)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_they_stay_aligned_under_all_augmentations_together(data: st.DataObject, seed: int) -> None:
    transforms = [
        build(component, chosen(data, component), ignore_index=IGNORE, resize=None, has_objects=False)
        for component in AUGMENTATIONS.values()
    ]
    torch.manual_seed(seed)
    check(v2.Compose(transforms), sample(48, 64, seed), IGNORE)


def test_most_pixels_can_tell() -> None:
    assert check(v2.Identity(), sample(64, 64, 0), None) > 2000
    resized = build(
        AUGMENTATIONS["random_resized_crop"], AUGMENTATIONS["random_resized_crop"].schema(size=[96, 96]), resize=None
    )
    assert check(resized, sample(64, 64, 0), None) > 2000


class ImageOnly(v2.Transform):
    """Mirrors the image, but not the mask."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return inpt if isinstance(inpt, tv_tensors.Mask) else functional.horizontal_flip(inpt)


class Smooth(v2.Transform):
    """Interpolates the mask like an image."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return tv_tensors.wrap(functional.resize(inpt.as_subclass(Tensor), [50, 50]), like=inpt)


@pytest.mark.parametrize(("wrong", "why"), [(ImageOnly(), "did not move"), (Smooth(), "labels were mixed")])
def test_an_augmentation_that_does_not_do_so_would_be_found(wrong: v2.Transform, why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        check(wrong, sample(40, 40, 0), None)


def test_a_mask_is_shifted_by_not_even_one_pixel() -> None:
    with pytest.raises(AssertionError, match="did not move"):
        check(lambda both: {"image": both["image"].roll(1, -1), "mask": both["mask"]}, sample(40, 40, 0), None)


def test_padding_is_ignored_or_where_no_label_is_repeats_the_edges() -> None:
    component = AUGMENTATIONS["random_crop"]
    white = {
        "image": tv_tensors.Image(torch.full((3, 4, 4), 255, dtype=torch.uint8)),
        "mask": tv_tensors.Mask(torch.full((1, 4, 4), 7, dtype=torch.uint8)),
    }
    ignored, repeated = (
        build(component, component.schema(size=[4, 20]), ignore_index=index, resize=None, has_objects=False)(white)
        for index in (IGNORE, None)
    )
    assert torch.equal(ignored["mask"][0] == 7, ignored["image"][0] == 255) and set(
        ignored["mask"].unique().tolist()
    ) == {7, IGNORE}
    assert (repeated["mask"] == 7).all() and (repeated["image"] == 255).all()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("random_resized_crop", {"size": [8, 8], "scale": [1.0, 0.8]}),
        ("random_resized_crop", {"size": [8, 8], "scale": [0.5, 1.5]}),
        ("random_resized_crop", {"size": [8, 8], "ratio": [1.3, 0.7]}),
        ("random_crop", {"size": [8, 0]}),
        ("horizontal_flip", {"p": 1.5}),
        ("color_jitter", {"hue": 0.6}),
    ],
)
def test_impossible_values_are_mistakes_of_the_recipe(name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AUGMENTATIONS[name].schema(**wrong)


def test_a_crop_has_the_size_of_data_resize_by_default() -> None:
    component, image = AUGMENTATIONS["random_resized_crop"], tv_tensors.Image(torch.zeros(3, 40, 60, dtype=torch.uint8))
    assert build(component, component.schema(), resize=[20, 30])(image).shape == (3, 20, 30)
    assert build(component, component.schema(size=[8, 9]), resize=[20, 30])(image).shape == (3, 8, 9)
    with pytest.raises(ValueError, match=r"data\.resize"):
        build(component, component.schema(), resize=None)


@pytest.mark.parametrize("size", [(24, 72), (72, 24)])
def test_a_mosaic_shows_four_samples_and_nothing_else_around_a_point_anywhere(size: tuple[int, int]) -> None:
    """Also where it is wide or tall: the four are plain, so the point is where one value ends and the next begins."""
    mosaic = catalogue("augmentation")["mosaic"].build({"size": list(size), "scale": [1.0, 1.0]}, resize=None)
    values = [50, 100, 150, 200]
    parts = [{"image": tv_tensors.Image(torch.full((3, *size), value, dtype=torch.uint8))} for value in values]
    points = []
    for seed in range(60):
        torch.manual_seed(seed)
        shown = mosaic(parts)["image"].as_subclass(Tensor)[0]
        assert shown.shape == size and set(shown.unique().tolist()) <= set(values)
        top, left = int((shown[:, 0] == shown[0, 0]).sum()), int((shown[0] == shown[0, 0]).sum())
        if top < size[0] and left < size[1]:  # the point is inside
            assert [int(shown[row, column]) for row in (0, -1) for column in (0, -1)] == values
            points.append((top / size[0], left / size[1]))
    assert len(points) > 40
    assert all(min(places) < 0.2 and max(places) > 0.8 for places in zip(*points, strict=True))
