"""What recipes can say, and a recipe to start from: `trainer list`, `trainer copy`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.commands import main
from trainer.recipe import describe

ROOT = Path(__file__).resolve().parents[3]
PLUGIN = '''
from typing import Annotated
from pydantic import Field
from trainer.components import schedule

@schedule()
def listed_steps(share, /, *, every: Annotated[int, Field(gt=0)] = 32):
    """Halves the learning rate again and again.

    Args:
        share: converts a duration.
        every: steps between two of them.
    """
    return lambda progress: 1.0
'''


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words]) == 0
    return capsys.readouterr().out


def test_without_an_argument_all_kinds_are_listed_with_their_numbers_and_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = said(capsys, "list")
    for kind, plural in describe.PLURALS.items():
        names = [entry.name for entry in describe.entries(kind)]
        assert f"{plural:14}{len(names):3}  {names[0]}" in text
    assert "recipes        20  colorization_best" in text
    assert "sections        9  task, data, model" in text


def test_each_component_is_one_line_with_its_interface(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line.split(maxsplit=3)[:3] for line in said(capsys, "list", "losses").splitlines()]
    assert ["cross_entropy", "dense,", "labels"] in rows
    assert "dense needs image, mask Semantic segmentation of" in " ".join(said(capsys, "list", "tasks").split())
    names = {line.split()[0] for line in said(capsys, "list", "schedules").splitlines()}
    assert names >= {"constant", "cosine", "one_cycle", "plateau", "polynomial"}
    assert said(capsys, "list", "dataset") == said(capsys, "list", "datasets")


def test_a_component_is_its_keys_with_types_limits_defaults_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "list", "one_cycle")
    assert text.startswith("schedule one_cycle\n\n  Half a cosine up from `start`")
    rows = [line.split(maxsplit=1) for line in text.splitlines()]
    assert ["final", "number in [0, 1]  1e-6     factor on `optimizer.lr` at the end."] in rows
    assert "A duration is e.g. 500 steps" in text
    text = said(capsys, "list", "unet")
    assert "model unet, interface dense" in text
    assert "width  integer in (0, 4096]  16" in text
    assert "Keys of every model (`trainer list model`): weights, reset_layers, train_only." in text


def test_a_section_is_the_keys_that_it_always_has(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "list", "data")
    assert "batch_size" in text and "integer in (0, 1048576]" in text and "required" in text
    assert "`trainer list datasets`" in text
    assert "precision" in said(capsys, "list", "train")


def test_a_name_that_several_kinds_have_is_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "list", "yolo")
    assert [line.split(",")[0] for line in text.splitlines() if line.endswith(("boxes", "image, boxes"))] == [
        "model yolo",
        "loss yolo",
        "dataset yolo",
    ]


def test_a_recipe_is_its_header(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert "Cost:    78 s of training" in said(capsys, "list", "quickstart")
    lines = said(capsys, "list", "recipes").splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("quickstart: A small U-Net finds shapes"))
    assert lines[place + 1] == "    Result: best validation mIoU 0.930 (one run)"


def test_recipes_are_found_beside_the_package_and_those_of_the_working_folder_come_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said(capsys, "list", "recipes").startswith(f"in {ROOT / 'recipes'}:\n")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("# Mine alone. And more.\n", encoding="utf-8")
    assert said(capsys, "list", "recipes") == "in recipes:\nmine: Mine alone\n"
    monkeypatch.setattr(describe, "recipe_folders", lambda: [tmp_path / "none"])
    assert main(["list", "recipes"]) == 2
    assert capsys.readouterr().err == (
        f"error: no recipes (*.yaml) in {tmp_path / 'none'}; run this in a folder that has some, e.g. in a checkout of "
        "the repository\n"
    )
    assert "no recipes" in said(capsys, "list")


def test_components_of_a_plugin_are_listed_too(tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_text(PLUGIN, encoding="utf-8")

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "trainer", "list", *words, "--plugin", "plugin.py"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    text = run("listed_steps")
    assert text.startswith("schedule listed_steps\n\n  Halves the learning rate again and again.\n")
    assert "every  integer > 0  32       steps between two of them." in text
    assert "\nlisted_steps  Halves the learning rate again and again\n" in run("schedules")


def test_an_unknown_name_or_plugin_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n", encoding="utf-8")
    for words, message in {
        ("unnet",): "there is no 'unnet'; did you mean 'unet'?",
        ("model.unet",): "there is no 'model.unet'",
        ("xyzzy",): "there is no 'xyzzy'; `trainer list` prints all names",
        ("--plugin", str(tmp_path / "none.py")): "can't be imported: no file",
        ("--plugin", str(tmp_path / "broken.py")): "can't be imported: division by zero",
    }.items():
        assert main(["list", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


# ---------------------------------------------------------------- copy


def test_a_copy_passes_check_and_says_what_to_do_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said(capsys, "copy", "quickstart", "mine.yaml").endswith("edit it, then `trainer check mine.yaml`\n")
    text = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    assert "# A small U-Net finds shapes" in text and "inherit" not in text.split("\n\n", 1)[1]
    assert "\n  # clip_norm: null" in text and "\n# checkpoint:" in text
    assert main(["check", "mine.yaml"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_nothing_is_overwritten_and_nothing_is_left_after_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.yaml").write_text("mine", encoding="utf-8")
    (tmp_path / "wrong.yaml").write_text("task: segmentation\nmodle: unet\n", encoding="utf-8")
    shutil.copy(ROOT / "recipes" / "quickstart.yaml", tmp_path / "copied.yaml")
    before = sorted(path.name for path in tmp_path.iterdir())
    for words, message in {
        ("quickstart", "there.yaml"): "there.yaml exists; name a new file",
        ("quickstart", "nowhere/mine.yaml"): "there is no folder nowhere",
        ("quickstart", "mine"): "a recipe is a .yaml file; call it mine.yaml",
        ("quickstrat", "mine.yaml"): "no recipe 'quickstrat'; did you mean 'quickstart'?",
        ("copid.yaml", "mine.yaml"): "no such recipe; did you mean copied.yaml?",
        ("wrong.yaml", "mine.yaml"): "did you mean 'model'?",
    }.items():
        assert main(["copy", *words]) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "there.yaml").read_text(encoding="utf-8") == "mine"
