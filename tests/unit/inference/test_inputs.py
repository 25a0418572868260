"""Promises about images to predict on: any format and orientation; what can't be read is named."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from trainer.errors import UserError
from trainer.inference.inputs import UnreadableImage, find_images, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
UPRIGHT = torch.from_numpy(PIXELS).permute(2, 0, 1)
# From the upright image to how a camera of that orientation stores it: the inverse of what EXIF defines.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: np.rot90(a, -1),
}


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", STORED)
def test_images_are_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](PIXELS)))
    assert torch.equal(read_image(encoded(stored, exif=exif)), UPRIGHT)
    assert torch.equal(read_image(encoded(ImageOps.exif_transpose(stored))), read_image(np.asarray(stored)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_images_of_all_modes_are_rgb(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    assert torch.equal(read_image(image), torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_white(mode: str) -> None:
    image = Image.new(mode, (4, 3))
    assert (read_image(encoded(image)) == 255).all()


def test_a_palette_may_have_a_transparent_colour() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    read = read_image(encoded(image, transparency=0))
    assert read[:, 0].T.tolist() == [[255, 255, 255], [40, 50, 60]]


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("L", (6, 4), value) for value in (0, 255)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_image(data).shape == (3, 4, 6) and not read_image(data).any()


def test_one_pixel_is_an_image() -> None:
    assert read_image(np.full((1, 1), 7, np.uint8)).tolist() == [[[7]]] * 3


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", encoded(Image.fromarray(PIXELS))[:60], encoded(Image.new("I;16", (2, 2)))],
    ids=["empty", "text", "cut off", "16 bits"],
)
def test_an_unreadable_image_is_a_user_error_without_a_traceback(data: bytes) -> None:
    with pytest.raises(UnreadableImage) as error:
        read_image(data)
    assert str(error.value) and "BytesIO" not in str(error.value)


def write(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS).save(file)


def test_results_are_named_by_the_place_of_an_image_in_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "in/b.JPG", tmp_path / "in/sub/b.png", tmp_path / "in/.hidden.jpg", tmp_path / "in/out/x.jpg")
    (tmp_path / "in/notes.txt").touch()
    names = find_images([tmp_path / "in"], without=tmp_path / "in/out")
    assert {str(name) for name in names.values()} == {"b", "sub/b"}
    assert [*names] == [tmp_path / "in/b.JPG", tmp_path / "in/sub/b.png"]


def test_folders_and_patterns_go_together(tmp_path: Path) -> None:
    write(tmp_path / "a/x.png", tmp_path / "b/x.png", tmp_path / "c/d/x.jpg")
    names = find_images([tmp_path / "a", tmp_path / "b", f"{tmp_path}/c/*/*.jpg"])
    assert [str(name) for name in names.values()] == ["a/x", "b/x", "d/x"]


def test_two_images_with_results_of_one_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.png", tmp_path / "x.jpg")
    with pytest.raises(UserError, match=r"x\.jpg and .*x\.png would both have results named x"):
        find_images([tmp_path])


@pytest.mark.parametrize("given", ["none.jpg", "*.jpg", "."])
def test_an_input_that_names_no_image_is_refused(tmp_path: Path, given: str) -> None:
    with pytest.raises(UserError, match=r"no such file|no images in this folder"):
        find_images([tmp_path / given])
