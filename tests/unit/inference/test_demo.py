"""What the page of `trainer demo` shows, without the page; and the mistakes that its command line can have."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.processes import run_processes, train, write_recipe
from trainer.commands import main
from trainer.errors import UserError
from trainer.inference import demo
from trainer.inference.inputs import read_image
from trainer.inference.model import Model, load
from trainer.inference.results import ClassMap, ImageClass, Objects, Picture, Result
from trainer.tasks.drawing import class_colors

IMAGE = torch.full((3, 40, 60), 90, dtype=torch.uint8)


class Fixed:
    """A model that gives one result."""

    def __init__(self, result: Result | Exception) -> None:
        self.result = result

    def predict(self, images: list[torch.Tensor], threshold: float) -> list[Result]:
        assert (images[0].shape, threshold) == ((3, 40, 60), 0.4)
        if isinstance(self.result, Exception):
            raise self.result
        return [self.result]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (60, 40), "tomato").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def outcome(result: Result | Exception, file: Path) -> tuple[list[Image.Image], str]:
    model: Any = Fixed(result)
    return demo.outcome(model, file, 0.4)


def test_a_segmentation_shows_the_share_of_each_class_that_occurs_the_largest_first_in_its_colour(photo: Path) -> None:
    mask = torch.zeros(40, 60, dtype=torch.int64)
    mask[:30] = 2
    (picture,), text = outcome(ClassMap(IMAGE, ("sky", "sea", "<land>"), mask), photo)
    assert picture.size == (60, 40)
    land, sky = text.index("&lt;land&gt;</td><td>75.0%"), text.index("sky</td><td>25.0%")
    assert land < sky and "sea" not in text
    assert text.index(f"rgb{tuple(class_colors(3)[2])}") < land < text.index(f"rgb{tuple(class_colors(3)[0])}")


def test_objects_are_listed_with_class_score_and_box(photo: Path) -> None:
    boxes = torch.tensor([[1.2, 2.0, 30.0, 39.6], [0.0, 0.0, 5.0, 5.0]])
    result = Objects(IMAGE, ("cat", "dog"), boxes, torch.tensor([0.91, 0.456]), torch.tensor([1, 0]))
    _, text = outcome(result, photo)
    assert "dog</td><td>0.91</td><td>1, 2, 30, 40</td>" in text and "cat</td><td>0.46</td><td>0, 0, 5, 5</td>" in text
    none = Objects(IMAGE, ("cat",), torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert "lower the threshold" in outcome(none, photo)[1]


def test_a_coloured_picture_stands_beside_its_grey_input(photo: Path) -> None:
    (grey, coloured), text = outcome(Picture(IMAGE, (), IMAGE), photo)
    assert (grey.mode, coloured.mode, text) == ("L", "RGB", "")
    assert demo.captions(Picture) == ("Grey input", "Result") and demo.captions(Objects) == ("Result",)


def test_the_class_of_an_image_is_named(photo: Path) -> None:
    assert outcome(ImageClass(IMAGE, ("cat", "dog"), 1), photo)[1] == "Class: <b>dog</b>"


def test_an_unreadable_image_or_one_that_the_network_cannot_take_is_a_message(photo: Path) -> None:
    result = ImageClass(IMAGE, ("cat",), 0)
    broken = photo.with_name("broken.png")
    broken.write_bytes(photo.read_bytes()[:60])
    assert outcome(result, broken)[0] == [] and "can't be read" in outcome(result, broken)[1]
    pictures, text = outcome(RuntimeError("<size> 1x1"), photo)
    assert (pictures, text) == ([], "<b>The model can't process this image:</b> RuntimeError: &lt;size&gt; 1x1")


def test_large_pictures_are_reduced(tmp_path: Path) -> None:
    Image.new("L", (4000, 10)).save(tmp_path / "wide.png")
    wide = torch.zeros(3, 10, 4000, dtype=torch.uint8)
    model: Any = SimpleNamespace(predict=lambda images, threshold: [Picture(wide, (), wide)])
    assert [picture.size for picture in demo.outcome(model, tmp_path / "wide.png", 0)[0]] == [(1600, 4)] * 2


@pytest.fixture
def model(tmp_path: Path) -> Model:
    run_processes(1, train, write_recipe(tmp_path), ("train.duration=1 steps",))
    return load("run")


def test_the_page_begins_with_the_run_and_its_figures_and_has_images_of_the_validation_set(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = demo.heading(model)
    assert (
        "<h1>run</h1><p>Segmentation by unet, trained on tiny, checkpoint of step 1</p><p>Validation: miou 0." in text
    )
    assert list(demo.figures(model))[:2] == ["miou", "loss"]
    (tmp_path / "examples").mkdir()
    files = demo.write_examples(model, tmp_path / "examples")
    assert len({file.read_bytes() for file in files}) == demo.EXAMPLES
    assert {read_image(file).shape for file in files} == {(3, 24, 24)}
    (pictures, shares) = demo.outcome(model, files[0], 0)
    assert len(pictures) == 1 and "%" in shares

    monkeypatch.setenv("TRAINER_DATA", str(tmp_path / "elsewhere"))  # not prepared on this machine
    assert demo.write_examples(model, tmp_path / "examples") == []

    for command, message in {
        ("demo", "rum"): "error: no run 'rum' in ",
        ("demo", "run", "--checkpoint", "step_9"): "has no checkpoint 'step_9'; it has best, last, or step_00000001",
        ("demo", "run", "--port", "99999"): "error: --port 99999: a port is a number from 1 to 65535",
    }.items():
        assert main([*command]) == 2
        assert message in capsys.readouterr().err

    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "run"]) == 2
    assert capsys.readouterr().err.count("pip install 'recipe-trainer[demo]'") == 1


def test_a_port_in_use_is_named_and_without_one_the_first_free_port_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with demo.listen(None) as first:
        host, taken = first.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(UserError, match=rf"^--port {taken}: address already in use; leave out --port"):
            demo.listen(taken)
        monkeypatch.setattr(demo, "FIRST_PORT", taken)
        with demo.listen(None) as second:
            assert second.getsockname()[1] > taken
        monkeypatch.setattr(demo, "PORTS", 1)
        with pytest.raises(UserError, match="no port from"):
            demo.listen(None)


def test_settings_of_other_pages_do_not_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"GRADIO_SHARE": "True", "GRADIO_ANALYTICS_ENABLED": "True", "PATH": "/bin"}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(demo, "import_module", lambda name: name)
    assert demo.import_gradio(tmp_path) == "gradio"
    assert environment["GRADIO_ANALYTICS_ENABLED"] == "False" and "GRADIO_SHARE" not in environment
    assert environment["GRADIO_TEMP_DIR"] == str(tmp_path)
