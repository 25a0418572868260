"""`trainer evaluate` measures what training measured, on any number of processes, and writes what it measured."""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.processes import RECIPE, TINY, lines, run_processes, train, write_recipe
from tests.scenes import RECIPES
from tests.scenes import VALIDATION as SCENES
from tests.tiny import TRAIN, VALIDATION
from trainer.commands import main

SETS = """
from dataclasses import replace
from trainer.components import catalogue, dataset
from trainer.data.source import DataInfo

def make():
    return catalogue("dataset")["tiny"].factory()

@dataset(fields=("image", "mask"))
def twin():
    return replace(make(), name="twin")

@dataset(fields=("image", "mask"))
def renamed():
    return replace(make(), name="renamed", info=DataInfo(("background", "disc"), 255))

@dataset(fields=("image", "mask"))
def swapped():
    return replace(make(), name="swapped", info=DataInfo(("square", "background"), 255))
"""
"""Other sets of the images of `tiny`."""


def call(folder: Path, arguments: list[str]) -> None:
    """In a forked process: the command; keeps what it prints, and its exit code."""
    rank = os.environ.get("RANK", "0")
    with (
        (folder / f"{rank}.out").open("w") as out,
        (folder / f"{rank}.err").open("w") as err,
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        code = main(["evaluate", *arguments])
    (folder / f"{rank}.code").write_text(str(code))


class Command:
    """The command in forked processes, which print to a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str | Path, world_size: int = 1) -> tuple[int, str, str]:
        """The exit code of rank 0, and what all ranks print to stdout and to stderr."""
        run_processes(world_size, call, self.folder, [str(argument) for argument in arguments])
        printed = ["".join(file.read_text() for file in self.folder.glob(f"*.{kind}")) for kind in ("out", "err")]
        return int((self.folder / "0.code").read_text()), printed[0], printed[1]

    def metrics(self, *arguments: str | Path, world_size: int = 1) -> dict[str, Any]:
        """What `--out` holds."""
        file = self.folder / "metrics.json"
        code, _, err = self(*arguments, "--out", file, world_size=world_size)
        assert code == 0, err
        read: dict[str, Any] = json.loads(file.read_text())
        return read


@pytest.fixture
def evaluate(tmp_path: Path) -> Command:
    (tmp_path / "printed").mkdir()
    return Command(tmp_path / "printed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and with `runs/run`: two checkpoints, with averaged weights."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "sets.py").write_text(SETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAINER_DATA", str(folder / "data"))
        patch.setenv("TRAINER_RUNS", str(folder / "runs"))
        recipe = write_recipe(folder, RECIPE.replace(str(TINY), "tests.tiny, sets.py"))
        brief = ("train.duration=10 steps", "evaluate.every=5 steps", "train.ema=0.9", "evaluate.best=loss")
        run_processes(1, train, recipe, brief)
    return folder


@pytest.fixture
def run(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That run, for each test."""
    monkeypatch.setenv("TRAINER_DATA", str(trained / "data"))
    monkeypatch.setenv("TRAINER_RUNS", str(trained / "runs"))
    return trained / "runs" / "run"


@pytest.mark.parametrize("world_size", [1, 2])
def test_metrics_are_those_of_the_validation_line_of_the_checkpoint(
    run: Path, evaluate: Command, world_size: int
) -> None:
    for line, checkpoint in zip(lines(run, "validation"), ("step_00000005", "last"), strict=True):
        read = evaluate.metrics("run", "--checkpoint", checkpoint, world_size=world_size)
        expected = {name: value for name, value in line.items() if name not in ("step", "epoch", "split")}
        assert (read["step"], read["samples"], read["split"]) == (line["step"], VALIDATION, "validation")
        assert read["metrics"].pop("confusion") == expected.pop("confusion")
        assert read["metrics"] == pytest.approx(expected, rel=1e-12)


def test_rank_0_alone_prints_a_table_with_the_digits_of_the_log(run: Path, evaluate: Command) -> None:
    (*_, line) = lines(run, "validation")
    code, out, err = evaluate("run", "--checkpoint", "last", world_size=2)
    assert code == 0 and not err
    head, *rows = out.splitlines()
    assert head == f"run, step 10: validation split of tiny, {VALIDATION} samples"
    assert [row.split() for row in rows[:2]] == [[name, f"{line[name]:.4f}"] for name in ("loss", "miou")]
    assert rows[-3].split() == ["class", "iou", "class_accuracy"]
    assert rows[-1].split() == ["square", f"{line['iou/square']:.4f}", f"{line['class_accuracy/square']:.4f}"]
    assert len({len(row) for row in rows[-3:]}) == 1


def test_another_split_and_another_set_of_the_same_classes_are_evaluated_without_augmentation(
    run: Path, evaluate: Command
) -> None:
    own = evaluate.metrics("run")
    training = evaluate.metrics("run", "--split", "train")
    twin = evaluate.metrics("run", "data=twin", "evaluate.batch_size=3")
    assert (training["samples"], training["split"]) == (TRAIN, "train")
    (confusion,) = [np.array(list(training["metrics"]["confusion"].values()))]
    assert confusion.sum() == TRAIN * 24 * 23  # whole images, though training crops them; one column is ignored
    assert twin["data"]["name"] == "twin" and twin["metrics"]["confusion"] == own["metrics"]["confusion"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no run 'nothing' in"),
        (["run", "--checkpoint", "step_7"], "has no checkpoint 'step_7'; it has best, last, or step_00000005"),
        (["run", "--split", "test"], "tiny has no test split, only train and validation"),
        (["run", "model.width=8"], "model.width can't change: an evaluation keeps the network and the task"),
        (["run", "data.augment=[]"], "data.augment: an evaluation never augments; leave it out"),
        (["run", "data=renamed"], "renamed has other classes than run was trained on: it lacks 'square' and it adds"),
        (["run", "data=swapped"], "their order differs, class 0 is 'square' instead of 'background'"),
        (["run", "data.batch=3"], "data.batch: unknown key; did you mean 'batch_size'?"),
        (["run", "--out", "no/m.json"], "--out no/m.json: there is no folder no; create it first"),
        (["run", "--predictions", "p.json"], "p.json: task segmentation writes PNG files; name a folder"),
        (["run", "--predictions", "/"], "--predictions /: exists already; remove it or name another folder"),
    ],
)
def test_a_mistake_is_one_sentence(run: Path, evaluate: Command, arguments: list[str], message: str) -> None:
    code, out, err = evaluate(*arguments)
    assert code == 2 and not out
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_index_pngs_hold_what_was_measured(run: Path, evaluate: Command, tmp_path: Path, world_size: int) -> None:
    folder = tmp_path / "predicted"
    read = evaluate.metrics("run", "--predictions", folder, world_size=world_size)
    counts = np.zeros(2)
    for number in range(VALIDATION):
        predicted = np.asarray(Image.open(folder / f"{number:08d}.png"))
        assert predicted.shape == (24, 24)
        counts += np.bincount(predicted[:, 1:].ravel(), minlength=2)  # the first column is ignored
    assert counts.tolist() == np.sum(list(read["metrics"]["confusion"].values()), axis=0).tolist()
    assert len(list(folder.iterdir())) == VALIDATION and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("task", ["detection", "mask_rcnn"])
@pytest.mark.slow
def test_pycocotools_alone_computes_the_same_from_the_written_files(
    tmp_path: Path, evaluate: Command, task: str
) -> None:
    brief = ("train.duration=10 steps", "evaluate.every=100%", "checkpoint.every=100%", "evaluate.pictures=0")
    run_processes(1, train, write_recipe(tmp_path, RECIPES[task]), brief)
    (line,) = lines(tmp_path / "runs" / "run", "validation")
    file = tmp_path / "results.json"
    read = evaluate.metrics("run", "--predictions", file, world_size=2)["metrics"]
    names = [name for name in line if "map" in name]
    assert [read[name] for name in names] == pytest.approx([line[name] for name in names], abs=1e-6)
    for prefix, kind in {"": "bbox", "box_": "bbox", "mask_": "segm"}.items():
        if f"{prefix}map" not in read:
            continue
        with redirect_stdout(io.StringIO()):
            annotations = COCO(str(file.with_suffix(".annotations.json")))
            evaluation = COCOeval(annotations, annotations.loadRes(str(file)), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        assert len(annotations.imgs) == SCENES
        expected = [read[f"{prefix}{name}"] for name in ("map", "map_50", "map_75")]
        assert evaluation.stats[:3].tolist() == pytest.approx(expected, abs=1e-6)
