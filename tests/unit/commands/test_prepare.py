"""`trainer prepare`: what it takes, prints and refuses."""

from __future__ import annotations

import argparse
import dataclasses
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data.test_cifar_batches import official
from trainer.commands import main
from trainer.commands import prepare as command
from trainer.data.card import Card
from trainer.data.prepare import data_dir
from trainer.data.sets import cifar10
from trainer.errors import UserError


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.parse(parser, words)


def call(*words: str) -> int:
    return command.run(parsed(*words))


def test_the_command_prepares_reports_and_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path))
    assert call("shapes") == 0
    out = capsys.readouterr().out
    for expected in ("1651 rows", "1500 train", "151 validation", "circle", str(tmp_path / "shapes")):
        assert expected in out
    path = tmp_path / "shapes" / "train" / "00000.parquet"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train/00000\.parquet has changed"):
        call("shapes", "--verify")


def test_the_command_names_the_nearest_data_set() -> None:
    with pytest.raises(UserError, match="unknown data set 'flowers'; did you mean 'flowers17'"):
        call("flowers")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["cifar10", "categry=ship"], "command line: categry: unknown key; did you mean 'category'?"),
        (["cifar10", "category=shipp"], r"command line: category: must be 'airplane', .* or 'truck' \(got 'shipp'\)"),
        (
            ["cifar10", "num_colours=1", "category=3"],
            r"(?s)command line: category: .*command line: num_colours: must be greater than or equal to 2",
        ),
        (["cifar10", "ship"], r"command line: an override must be key\.path=value"),
        (["shapes", "batch_size=3"], "command line: batch_size: unknown key; there are none"),
        (["hub", "image=a", "mask=b"], "command line: path: this key is required"),
        (["cifar10_horses", "num_colours=16"], "cifar10_horses: the course has 24 colour centres, not 16"),
        (
            ["shapes", "--name", "mine"],
            "--name is an option of `trainer prepare folder` or `trainer prepare yolo` or `trainer prepare coco`, not "
            "of shapes",
        ),
        (["folder", "set=mine"], "trainer prepare folder --name NAME --images DIR"),
    ],
)
def test_the_command_takes_the_keys_of_the_data_set_and_refuses_others(words: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        call(*words)


def test_the_command_prepares_what_its_keys_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    (tmp_path / "archives").mkdir()
    with tarfile.open(tmp_path / "archives/cifar-10-python.tar.gz", "w:gz") as archive:
        for name in names:
            batch = official(pixels, [8, 8])  # ships
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(batch)
            archive.addfile(info, io.BytesIO(batch))
    monkeypatch.setattr(cifar10, "OFFICIAL", dataclasses.replace(cifar10.OFFICIAL, sha256=None))
    assert call("cifar10", "category=ship", "num_colours=3", "--archives", str(tmp_path / "archives")) == 0
    card = Card.load(data_dir() / "cifar10_ship_kmeans3")
    assert card.command == "cifar10 category=ship num_colours=3" and len(card.statistics["colour_centres"]) == 3
    assert sum(card.statistics["class_pixels"]) == 10 * 32 * 32
    assert "colour 2 " in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ("cifar10", "category=ship", "num_colours=3", "--verify", "--archives", "there"),
        ("--archives", "there", "--verify", "cifar10", "category=ship", "num_colours=3"),
        ("--archives=there", "cifar10", "category=ship", "--verify", "num_colours=3"),
        ("--verify", "cifar10", "--archives", "there", "category=ship", "num_colours=3"),
    ],
    ids=" ".join,
)
def test_options_and_keys_may_be_in_any_order_before_and_after_the_name(words: tuple[str, ...]) -> None:
    args = parsed(*words)
    assert (args.dataset, args.archives, args.verify) == ("cifar10", Path("there"), True)
    assert args.settings == ["category=ship", "num_colours=3"]


def test_a_folder_that_is_called_like_a_data_set_is_not_taken_for_one() -> None:
    args = parsed("--images", "yolo", "--ignore", "3", "folder", "--masks", "coco", "--name=mine", "--classes", "hub")
    assert args.dataset == "folder" and args.name == "mine" and args.ignore == 3
    assert [args.images, args.masks, args.classes] == [Path("yolo"), Path("coco"), Path("hub")]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--masks", "m", "yolo", "--name", "x"], "--masks is an option of `trainer prepare folder`, not of yolo"),
        (["coco", "--labels=l"], "--labels is an option of `trainer prepare yolo`, not of coco"),
        (
            ["shapes", "--archive", "x", "--images", "i"],
            "--images is an option of `trainer prepare folder` or `trainer",
        ),
        (["folder", "--imges", "x"], "`trainer prepare folder` has no option --imges; did you mean '--images'?"),
        (["shapes", "--verfy"], "`trainer prepare shapes` has no option --verfy; did you mean '--verify'?"),
        (["--archives", "x", "flower17"], "unknown data set 'flower17'; did you mean 'flowers17'?"),
        (["yolo", "--name", "x"], "missing --images, --labels, --classes; usage: trainer prepare yolo --name NAME "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_that_a_data_set_does_not_have_is_a_mistake(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", *words]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["folder", "--ignore", "road"], ["yolo", "--invalid", "keep"]], ids=" ".join)
def test_a_command_line_that_argparse_refuses_is_a_mistake_with_the_usage(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prepare", *words])
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(
        " ".join(["usage: trainer prepare", *words[:1]])
    )


@pytest.mark.parametrize(
    ("kind", "own", "foreign"),
    [
        ("folder", ["--masks", "--ignore", "--validation-masks", "data: {name: folder"], ["--labels", "--annotations"]),
        ("yolo", ["--labels", "--invalid", "--test-labels", "data: {name: yolo"], ["--masks", "--annotations"]),
        ("coco", ["--annotations", "--invalid", "--test-images", "data: {name: coco"], ["--masks", "--labels"]),
        ("cifar10", ["--archives", "key=value", "category, num_colours"], ["--name", "--images"]),
    ],
)
def test_help_lists_the_options_of_one_data_set_alone_with_an_example(
    kind: str, own: list[str], foreign: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prepare", kind, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and f"trainer prepare {kind} " in printed
    assert all(each in printed for each in own) and not any(each in printed for each in foreign)


def test_help_does_not_wait_for_torch() -> None:
    script = "import sys\nfrom trainer.commands import main\ntry:\n    main(['prepare', 'folder', '--help'])\n"
    script += "finally:\n    print(sorted({'torch', 'datasets', 'pyarrow'} & {*sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[3], check=True
    )
    assert "--masks DIR" in done.stdout and done.stdout.endswith("\n[]\n")


def test_the_package_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "prepare", "shape"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 2 and "unknown data set 'shape'; did you mean 'shapes'?" in done.stderr
