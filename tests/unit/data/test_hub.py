"""Sets on the Hugging Face Hub, against a server of this machine that answers what
`datasets` and huggingface_hub ask.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.hub_server import COMMIT, Hub, Repository
from tests.processes import write_recipe
from trainer.data.build import Data
from trainer.data.card import Card
from trainer.data.images import encode_png, read_indices
from trainer.recipe.load import load_recipe
from trainer.tasks.checks import TASK_CHECKS

TOKEN = "hf_nobodys"
HOLDERS = {"me/private": TOKEN, "me/secret": "hf_another"}  # whose token opens what is private


def picture(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (8, 12, 3), dtype=np.uint8)


def labels(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 3, (8, 12), dtype=np.uint8)


def parquet(start: int, count: int, **features: Any) -> bytes:
    """Rows as `datasets` writes them: `photo`, `seg` and `painted` encoded, `grid` as lists of lists."""
    from datasets import Features, Value
    from datasets import Image as ImageFeature

    rows = range(start, start + count)
    columns = {
        "photo": [{"bytes": encode_png(picture(i)), "path": f"{i}.png"} for i in rows],
        "seg": [{"bytes": encode_png(labels(i)), "path": None} for i in rows],
        "painted": [{"bytes": encode_png(picture(i)), "path": None} for i in rows],
        "grid": [labels(i).tolist() for i in rows],
        "note": [f"row {i}" for i in rows],
    }
    schema = Features(
        {name: features.get(name, Value("string") if name == "note" else ImageFeature()) for name in columns}
    ).arrow_schema
    file = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), file, row_group_size=4)
    return file.getvalue()


def repositories() -> dict[str, dict[str, bytes]]:
    """The files of each repository."""
    from datasets import ClassLabel, List

    grid = {"grid": List(List(ClassLabel(names=["road", "sky", "tree"])))}
    card = (
        "---\nconfigs:\n- {config_name: small, data_files: small/*.parquet}\n- {config_name: large, data_files: "
        "large/*.parquet}\n---\n"
    )
    return {
        "me/streets": {
            "data/train-00000-of-00002.parquet": parquet(0, 9, **grid),
            "data/train-00001-of-00002.parquet": parquet(9, 9, **grid),
        }
        | {
            "data/validation-00000-of-00001.parquet": parquet(18, 5, **grid),
            "data/test-00000-of-00001.parquet": parquet(23, 3, **grid),
        },
        "me/two": {
            "README.md": card.encode(),
            "small/0.parquet": parquet(0, 12, **grid),
            "large/0.parquet": parquet(0, 40, **grid),
        },
        "me/secret": {},
        "me/private": {"data/train-00000-of-00001.parquet": parquet(0, 30, **grid)},
        "me/table": {"data/train.csv": b"photo,seg\n1,2\n", "data/validation.csv": b"photo,seg\n1,2\n"},
    }


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    held = {name: (token,) for name, token in HOLDERS.items()}
    shown = {
        f"datasets/{name}": Repository({COMMIT: files}, held.get(name, ())) for name, files in repositories().items()
    }
    with Hub(shown).serving() as hub:
        yield hub


# The address is read when huggingface_hub is imported, so the commands run in a process of their own.
CHILD = """
import contextlib, io, json, sys, time
from trainer.commands import main

time.sleep = lambda seconds: None  # it would wait longer and longer before each attempt
results = []
for arguments in json.load(sys.stdin):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main(arguments)
    results.append([code, printed.getvalue()])
json.dump(results, sys.stdout)
"""


def commands(folder: Path, address: str, *lines: str, **environment: str) -> list[tuple[int, str]]:
    """Exit code and output of each command, with `folder` as $TRAINER_DATA."""
    own = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(folder / "home"),
        "TRAINER_DATA": str(folder),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **environment,
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    given = json.dumps([line.split() for line in lines])
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=given,
        env=kept | own,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    return [(code, printed) for code, printed in json.loads(done.stdout)]


STREETS = "prepare hub path=me/streets image=photo mask=seg classes=[road,sky,tree]"
PREPARED = {
    "streets": STREETS,
    "named": "prepare hub path=me/streets image=photo mask=grid validation=test",
    "private": "prepare hub path=me/private image=photo mask=seg classes=[a,b,c] validation=0.5",
    "drawn": "prepare hub path=me/two config=large image=photo mask=seg classes=[a,b,c] ignore_index=255 "
    "validation=0.3",
}
REFUSED = {
    "prepare hub path=me/nothing image=photo mask=seg classes=[a,b]": (
        r"me/nothing can't be read from the Hugging Face Hub: .*doesn't exist on the Hub"
    ),
    "prepare hub path=me/secret image=photo mask=seg classes=[a,b]": r"me/secret can't be read .*or cannot be accessed",
    f"{STREETS} revision=v9": r"me/streets can't be read .*Revision 'v9' doesn't exist",
    f"{STREETS} validation=dev": (
        r"me/streets can't be read .*Bad split: dev\. Available splits: \['train', 'validation', 'test'\]"
    ),
    "prepare hub path=me/two config=medium image=photo mask=seg classes=[a,b]": (
        r"me/two can't be read .*'medium' not found\. Available: \['small', 'large'\]"
    ),
    "prepare hub path=me/streets image=foto mask=seg classes=[a,b]": (
        r"me/streets has no column 'foto'; did you mean 'photo'\?"
    ),
    "prepare hub path=me/streets image=photo mask=seg": (
        r"the features of column seg have no class names; list them, e\.g\. data\.classes="
    ),
    "prepare hub path=me/streets image=photo mask=painted classes=[a,b]": (
        r"train row 0, column painted: this mask can't be decoded \(.*mode RGB\)"
    ),
    "prepare hub path=me/streets image=photo mask=note classes=[a,b]": (
        r"train row 0, column note: neither an encoded image nor a list of lists"
    ),
    "prepare hub path=me/streets image=photo mask=seg classes=[a,b]": (
        r"train row \d, column seg: this mask contains the labels 2; .* pass ignore_index=2"
    ),
    "prepare hub path=me/table image=photo mask=seg classes=[a,b]": r"me/table is in the format csv, not Parquet",
    "prepare hub path=streets image=photo mask=seg": r"path: must be OWNER/NAME of a repository",
}


@pytest.fixture(scope="module")
def prepared(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, str]]]:
    """The folder of the sets, and what each command printed."""
    folder = tmp_path_factory.mktemp("hub")
    lines = [*PREPARED.values(), *REFUSED]
    return folder, dict(zip(lines, commands(folder, server.address, *lines, HF_TOKEN=TOKEN), strict=True))


def card(folder: Path, key: str, outputs: dict[str, tuple[int, str]]) -> tuple[Path, Card]:
    code, printed = outputs[PREPARED[key]]
    assert code == 0, printed
    place = Path(re.search(r"in (\S+) \(", printed)[1])
    return place, Card.load(place)


def rows(place: Path, found: Card, split: str) -> list[dict[str, Any]]:
    return [row for file in found.files(place, split) for row in pq.read_table(file).to_pylist()]


def test_the_rows_of_both_splits_are_kept_as_they_are(prepared: tuple[Path, dict[str, tuple[int, str]]]) -> None:
    place, found = card(prepared[0], "streets", prepared[1])
    assert found.classes == ("road", "sky", "tree")
    for split, indices in (("train", range(18)), ("validation", range(18, 23))):
        stored = rows(place, found, split)
        assert [row["image"]["bytes"] for row in stored] == [encode_png(picture(i)) for i in indices]
        assert [row["mask"]["bytes"] for row in stored] == [encode_png(labels(i)) for i in indices]
    counts = sum(np.bincount(labels(i).ravel(), minlength=3) for i in range(18))
    assert found.statistics == {"revision": COMMIT, "class_pixels": counts.tolist()}


def test_classes_come_from_the_features_and_masks_from_lists(prepared: tuple[Path, dict[str, tuple[int, str]]]) -> None:
    place, found = card(prepared[0], "named", prepared[1])
    assert found.classes == ("road", "sky", "tree")
    stored = rows(place, found, "validation")
    assert len(stored) == 3
    assert all(np.array_equal(read_indices(row["mask"]["bytes"]), labels(i)) for i, row in enumerate(stored, start=23))


def test_one_split_is_divided_by_a_share_and_a_configuration_chosen(
    prepared: tuple[Path, dict[str, tuple[int, str]]],
) -> None:
    place, found = card(prepared[0], "drawn", prepared[1])
    train, validation = (
        {row["image"]["bytes"] for row in rows(place, found, split)} for split in ("train", "validation")
    )
    assert len(train) + len(validation) == len(train | validation) == 40
    assert 5 <= len(validation) <= 20
    assert found.ignore_index == 255


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_be_read_is_one_sentence_and_leaves_nothing(
    prepared: tuple[Path, dict[str, tuple[int, str]]], line: str
) -> None:
    folder, outputs = prepared
    code, printed = outputs[line]
    assert code == 2
    assert re.search(REFUSED[line], printed)
    assert "Traceback" not in printed
    assert len([place for place in folder.iterdir() if place.is_dir() and place.name != "home"]) == len(PREPARED)


def test_training_reads_a_prepared_set_without_a_network(
    prepared: tuple[Path, dict[str, tuple[int, str]]], server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINER_DATA", str(prepared[0]))
    recipe = write_recipe(
        tmp_path,
        """
        task: segmentation
        data: {name: hub, path: me/streets, image: photo, mask: grid, validation: test,
               batch_size: 6, workers: 0, cache: "off"}
        model: {name: unet, width: 4, depth: 2}
        loss: cross_entropy
        optimizer: {name: adamw, lr: 1e-3}
        train: {duration: 1 epoch}
        """,
    )
    before = server.requests
    data = Data(load_recipe(recipe, (), TASK_CHECKS), 0, 1, torch.device("cpu"))
    batches = list(islice(data.train_batches(0), 3))
    assert sorted(i for batch in batches for i in batch["sample_id"].tolist()) == list(range(18))
    for batch in batches:
        for i, image, mask in zip(batch["sample_id"].tolist(), batch["image"], batch["mask"], strict=True):
            assert np.array_equal(image.movedim(0, -1), picture(i)) and np.array_equal(mask[0], labels(i))
    assert server.requests == before


def test_offline_a_prepared_set_is_ready_and_another_one_is_one_sentence(
    prepared: tuple[Path, dict[str, tuple[int, str]]], server: Hub
) -> None:
    lines = [PREPARED["named"], f"{STREETS} train=test"]
    ready, missing = commands(prepared[0], server.address, *lines, HF_HUB_OFFLINE="1")
    assert ready[0] == 0 and "21 rows" in ready[1]
    assert missing[0] == 2 and re.search(
        r"me/streets can't be read from the Hugging Face Hub: Couldn't reach .*HF_HUB_OFFLINE", missing[1]
    )


def test_without_a_network_it_is_one_sentence(tmp_path: Path) -> None:
    ((code, printed),) = commands(tmp_path, "http://127.0.0.1:9", STREETS)  # the discard port, where nobody listens
    assert code == 2 and re.search(
        r"error: me/streets can't be read from the Hugging Face Hub: Couldn't reach 'me/streets'", printed
    )


def test_the_token_opens_what_is_private_and_is_written_nowhere(
    prepared: tuple[Path, dict[str, tuple[int, str]]],
) -> None:
    place, found = card(prepared[0], "private", prepared[1])
    assert sum(split.rows for split in found.splits.values()) == 30
    assert not [file for file in place.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
