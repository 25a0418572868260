"""Promises of `trainer predict`: results for every readable image, at its size, each once and never in part."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.processes import RECIPE, run_processes, train, write_recipe
from trainer.commands import main, predict
from trainer.inference.inputs import read_image
from trainer.inference.model import Model, load
from trainer.inference.results import Objects, Result

SIZES = {"a": (31, 45), "b": (70, 33), "sub/a": (20, 20), "sub/c": (1, 1), "sub/d": (57, 24)}  # width, height


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("predict")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAINER_DATA", str(folder / "data"))
        patch.setenv("TRAINER_RUNS", str(folder / "runs"))
        recipe = write_recipe(folder, RECIPE)
        run_processes(1, train, recipe, ("train.duration=2 steps", "data.resize=[24,24]", "data.augment=[]"))
        yield folder / "runs/run"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for index, (name, size) in enumerate(SIZES.items()):
        file = tmp_path / f"photos/{name}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(index)
        Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(file)
    return tmp_path / "photos"


def indices(out: Path) -> dict[str, np.ndarray]:
    return {str(file.relative_to(out).with_suffix("")): np.asarray(Image.open(file)) for file in out.rglob("*.png")}


def times(out: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in out.rglob("*.png")}


def test_each_image_has_results_at_its_size_under_its_own_path(run: Path, photos: Path) -> None:
    out = photos / "out"  # within the inputs
    for _ in range(2):  # overlays are no inputs
        assert main(["predict", str(run), str(photos), "--out", str(out), "--batch-size", "2"]) == 0
        masks = indices(out)
        assert {name: mask.shape[::-1] for name, mask in masks.items()} == SIZES
        assert len([*out.rglob("*.overlay.jpg")]) == len(SIZES)
    model = load(run)
    for name, mask in masks.items():
        assert np.array_equal(mask, model(photos / f"{name}.jpg").mask)


def test_replicas_share_the_images(run: Path, photos: Path, tmp_path: Path) -> None:
    main(["predict", str(run), str(photos), "--out", str(tmp_path / "one")])
    models = [load(run) for _ in range(3)]
    names = {photos / f"{name}.jpg": Path(name) for name in SIZES}
    manifest = {"threshold": 0.3, "overlay": False}
    assert predict.predict_all(models, names, tmp_path / "three", manifest, batch_size=2) == 0
    one, three = indices(tmp_path / "one"), indices(tmp_path / "three")
    assert one.keys() == three.keys() and all(np.array_equal(one[name], three[name]) for name in one)
    assert not [*(tmp_path / "three").rglob("*.jpg")]


def test_unreadable_images_are_named_and_the_others_predicted(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "broken.jpg").write_bytes((photos / "a.jpg").read_bytes()[:100])
    assert main(["predict", str(run), str(photos), "--out", str(tmp_path / "out")]) == predict.FAILED
    printed = capsys.readouterr()
    assert f"skipped {photos / 'broken.jpg'}: " in printed.err
    assert re.search(r"5 images, 1 unreadable, [\d.]+ images/s", printed.out)
    assert indices(tmp_path / "out").keys() == SIZES.keys()


def test_a_repeated_command_does_only_what_is_missing(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(run), str(photos), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    before = times(tmp_path / "out")
    (tmp_path / "out/sub/c.png").unlink()
    assert main(command) == 0
    assert "1 images, 4 done before" in capsys.readouterr().out
    after = times(tmp_path / "out")
    assert [file.name for file in before if before[file] != after[file]] == ["c.png"]


def test_a_full_disk_leaves_no_part_of_a_file_and_can_be_continued(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, out = ["predict", str(run), str(photos), "--out", str(tmp_path / "out")], tmp_path / "out"

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:5])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert main(command) == predict.FAILED
    assert re.search(r"error: .* can't be written: No space left on device; .*rerun", capsys.readouterr().err)
    assert [file.name for file in out.rglob("*") if file.is_file()] == [predict.MANIFEST]
    assert main(command) == 0
    assert indices(out).keys() == SIZES.keys()


def test_results_of_another_model_are_refused(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, manifest = ["predict", str(run), str(photos), "--out", str(tmp_path)], tmp_path / predict.MANIFEST
    assert main(command) == 2
    assert "holds other files than predictions" in capsys.readouterr().err
    out = ["--out", str(tmp_path / "out")]
    assert main([*command[:3], *out]) == 0
    manifest = tmp_path / "out" / predict.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"step": 1, "sha256": "0"}))
    assert main([*command[:3], *out]) == 2
    assert "holds predictions of step 1, not of step 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", "1.5"], "between 0 and 1"),
        (["--threshold", "0.5"], "segmentation has no scores"),
        (["--batch-size", "0"], "at least 1"),
        (["--checkpoint", "step_7"], "has no checkpoint 'step_7'"),
        (["--out", __file__], "is a file"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(
    run: Path, photos: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(run), str(photos), "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_failing_network_ends_the_command(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> list[Result]:
        raise RuntimeError("of the network")

    monkeypatch.setattr(Model, "_predict_batch", fail)
    with pytest.raises(RuntimeError, match="of the network"):
        main(["predict", str(run), str(photos), "--out", str(tmp_path / "out")])


def test_objects_of_all_images_are_one_coco_file(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    image, masks = torch.zeros(3, 20, 30, dtype=torch.uint8), torch.zeros(2, 20, 30, dtype=torch.bool)
    masks[0, 2:6, 3:9] = masks[1, 10:, 20:] = True
    boxes = torch.tensor([[3.0, 2, 9, 6], [20, 10, 30, 20]])
    classes = ("cat", "dog")
    Objects(image, classes, boxes, torch.tensor([0.9, 0.5]), torch.tensor([1, 0]), masks).save(tmp_path / "a/x", False)
    nothing = boxes[:0], torch.zeros(0), torch.zeros(0, dtype=torch.int64), masks[:0]
    Objects(image, classes, *nothing).save(tmp_path / "y", False)
    names = {Path("in/a/x.jpg"): Path("a/x"), Path("in/y.png"): Path("y"), Path("in/z.png"): Path("z")}
    predict._write_coco(tmp_path, names, classes, without=[Path("in/z.png")])
    read = coco.COCO(str(tmp_path / predict.COCO))
    assert [each["file_name"] for each in read.imgs.values()] == ["a/x.jpg", "y.png"]
    assert [read.cats[each["category_id"]]["name"] for each in read.anns.values()] == ["dog", "cat"]
    assert [each["bbox"] for each in read.anns.values()] == [[3, 2, 6, 4], [20, 10, 10, 10]]
    assert np.array_equal(read.annToMask(read.anns[1]), masks[0].numpy())


def test_a_prediction_is_that_of_evaluation_for_an_image_of_the_same_size(run: Path, tmp_path: Path) -> None:
    model = load(run)
    image = torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
    assert torch.equal(read_image(tmp_path / "x.png"), image)
    assert torch.equal(model(tmp_path / "x.png").mask, model.task.predict(model.forward, {"image": image[None]})[0])
