"""Trained models as files: they compute what the network does, or they aren't there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.processes import write_recipe
from trainer.commands import main
from trainer.data.prepare import data_dir, ensure_prepared
from trainer.detection.boxes import postprocess
from trainer.inference import export
from trainer.inference.graphs import Tensors, graph_of
from trainer.inference.model import load
from trainer.losses.yolo import YoloLoss
from trainer.metrics.best import Best
from trainer.models.yolo import Yolo
from trainer.recipe.load import load_recipe
from trainer.runs.folder import RunFolder
from trainer.runs.state import Checkpoint, snapshot
from trainer.runs.train_state import TrainState
from trainer.tasks.build import build_task
from trainer.tasks.detection import Detection

SIZE = (24, 24)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a model of the tiny set, with the weights that training begins with."""
    monkeypatch.chdir(tmp_path)
    run = RunFolder(tmp_path / "trained")
    run.create()
    recipe = load_recipe(write_recipe(run.path, name="recipe"))
    torch.manual_seed(0)
    task = build_task(recipe, recipe.source.info)
    counters: Any = TrainState(Best("miou")).counters() | {"unreadable": [], "fingerprint": 0, "means": {}}
    counters |= {"scaler": None, "world_size": 1, "threads": 1}
    run.checkpoints.save(Checkpoint(snapshot(task.model), {}, counters), keep=2, best=False)
    run.write_data({"name": "tiny", **asdict(recipe.source.info), "size": SIZE})
    return run.path


def prepare(trained: Path) -> None:
    """Prepares the set that the model was trained on."""
    ensure_prepared(load_recipe(trained / "recipe.yaml").source, data_dir(), None, lambda _: None)


def test_an_onnx_file_computes_what_the_model_does_for_images_of_any_size(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    prepare(trained)
    assert main(["export", str(trained), "--format", "onnx", "--dynamic"]) == 0
    printed = capsys.readouterr().out
    assert "compared on 13 validation samples: largest difference of the raw outputs" in printed
    assert "by the file" in printed and "uint8 RGB (B, 3, H, W) to logits, classes" in printed
    session = onnxruntime.InferenceSession(tmp_path / "trained.onnx")
    image = np.random.default_rng(0).integers(0, 256, (3, 31, 46), dtype=np.uint8)
    logits, classes = session.run(["logits", "classes"], {"image": image[None]})
    model = load(trained, device="cpu")
    expected = model.task.infer(model.forward, {"image": torch.from_numpy(image[None])})
    assert np.allclose(logits, expected.numpy(), atol=1e-4) and np.array_equal(classes, logits.argmax(1))
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ["background", "square"]
    assert metadata["task"] == "segmentation" and metadata["size"] == "null"


def test_a_torch_file_needs_torch_alone_and_holds_its_metadata(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(trained), "--format", "torch", "--precision", "fp16", "--out", "half.pt2"]) == 0
    assert "compared on random images, as the run's set isn't prepared here" in capsys.readouterr().out
    files = {export.METADATA: ""}
    program = torch.export.load(tmp_path / "half.pt2", extra_files=files)
    outputs = program.module()(torch.zeros(3, 3, *SIZE, dtype=torch.uint8))
    assert outputs["logits"].dtype == torch.float32 and outputs["classes"].shape == (3, *SIZE)
    metadata = json.loads(files[export.METADATA])
    assert metadata["precision"] == "fp16" and metadata["size"] == [*SIZE] and metadata["outputs"] == [*outputs]


def test_a_file_that_differs_from_its_network_is_not_kept(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = export.open_file

    def damaged(file: Path, form: export.Format) -> Callable[[Tensor], Tensors]:
        run = opened(file, form)
        return lambda image: {name: each + 0.5 * (name == "logits") for name, each in run(image).items()}

    monkeypatch.setattr(export, "open_file", damaged)
    (tmp_path / "old.pt2").write_text("another file")
    assert main(["export", str(trained), "--format", "torch", "--out", "old.pt2"]) == 3
    message = capsys.readouterr().err
    assert "more than the 0.001 tolerated for fp32; old.pt2 was not written" in message
    assert (tmp_path / "old.pt2").read_text() == "another file"
    assert not [*tmp_path.glob(".*tmp*")]


def test_kept_boxes_are_those_of_the_detector_image_by_image() -> None:
    torch.manual_seed(0)
    model = Yolo(3, 0.33, 0.25, None).eval()
    task = Detection(model, YoloLoss(3), ("a", "b", "c"), conf_threshold=0.0005, iou_threshold=0.3, max_detections=20)
    for conv in model.model[-1].m:  # more and different scores
        conv.weight.data *= 20
        conv.bias.data += 3
    image = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        found = graph_of(task)(image)
        expected = postprocess(model(image / 255), 0.0005, 0.3, 20)
    for index, each in enumerate(expected):
        mine = found["image_index"] == index
        assert len(each.labels) > 5 and torch.equal(found["labels"][mine], each.labels)
        assert torch.allclose(found["boxes"][mine], each.boxes) and torch.allclose(found["scores"][mine], each.scores)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "model.pt"], "--out model.pt: a file of --format torch ends in .pt2"),
        (["--out", "missing/model.pt2"], "--out missing/model.pt2: .*missing is not a folder that can be written to"),
        (["--samples", "0"], "--samples 0: must be at least 1"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(
    trained: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(trained), "--format", "torch", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert re.search(message, printed)


def test_onnx_without_its_packages_names_the_extra(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert main(["export", str(trained), "--format", "onnx"]) == 2
    assert "pip install 'recipe-trainer[export]'" in capsys.readouterr().err


def test_images_of_differing_sizes_need_dynamic(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = json.loads((trained / "data.json").read_text())
    (trained / "data.json").write_text(json.dumps(about | {"size": None}))
    assert main(["export", str(trained), "--format", "torch"]) == 2
    assert "differ in size: add --dynamic" in capsys.readouterr().err
