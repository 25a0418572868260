"""All runs, compared and removed: `trainer runs`."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.commands import main
from trainer.commands.runs import size_text, span_text
from trainer.reporting import table as tables
from trainer.runs.lock import lock_run
from trainer.runs.removal import remove_run

RECIPE = (
    "name: {name}\ntask:\n  name: segmentation\n  mean:\n  - 0.5\nevaluate:\n  best: miou\ntrain:\n  seed: {seed}\n"
)


def make_run(
    runs: Path, name: str, status: str | None = "finished", age: int = 0, miou: float = 0.5, seed: int = 0
) -> Path:
    """A run folder; something was last written in it `age` seconds after 2001."""
    folder = runs / name
    (folder / "checkpoints" / "step_00000030").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000030" / "model.safetensors").write_bytes(bytes(5000))
    (folder / "checkpoints" / "best").mkdir()
    os.link(folder / "checkpoints/step_00000030/model.safetensors", folder / "checkpoints/best/model.safetensors")
    (folder / "recipe.yaml").write_text(RECIPE.format(name=name, seed=seed), encoding="utf-8")
    if status:
        best = {
            "miou": {"value": miou, "step": 20},
            "loss": {"value": 0.1, "step": 30},
            "iou/a": {"value": 0.1, "step": 3},
        }
        summary = {
            "status": status,
            "best": best,
            "seconds": 75.0,
            "step": 30,
            "total_steps": 100,
            "error": "disk full",
        }
        (folder / "summary.json").write_text(json.dumps(summary | {"samples_per_second": 12.5}), encoding="utf-8")
    for file in folder.rglob("*"):
        os.utime(file, (10**9 + age, 10**9 + age))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main(["runs", "--json", *arguments]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_all_runs_are_listed_newest_first_with_their_status(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for age, (name, status) in enumerate(
        [("a", "finished"), ("b", "failed"), ("c", "stopped"), ("d", "running"), ("e", "running"), ("f", None)]
    ):
        make_run(runs, name, status, age)
    lock = lock_run(runs / "e")
    try:
        found = listed(capsys)
    finally:
        lock.release()
    assert [(each["name"], each["status"]) for each in found] == [
        ("f", "interrupted"),
        ("e", "running"),
        ("d", "interrupted"),
        ("c", "stopped"),
        ("b", "failed"),
        ("a", "finished"),
    ]
    assert found[-1]["task"] == "segmentation"
    assert found[-1]["best"] == {"metric": "miou", "value": 0.5, "step": 20}
    assert (found[-1]["step"], found[-1]["total_steps"], found[-1]["seconds"]) == (30, 100, 75.0)
    assert found[-1]["modified"] == 10**9
    assert main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "status", "task", "best", "step", "duration", "size", "age"]
    assert lines[-1].startswith("a     finished     segmentation  miou 0.5000  30/100  1 min")
    assert "disk full; fix this and rerun to resume from step 30" in lines[-2]
    assert "\x1b" not in "".join(lines)


def test_a_file_counts_once_however_many_hard_links_it_has(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(runs, "a")
    rest = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    assert listed(capsys)[0]["bytes"] == 5000 + rest


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("summary.json", b"{", "summary.json is damaged"),
        ("summary.json", b"[]", "summary.json is damaged"),
        ("summary.json", b'{"best": {"miou": {"value": "x", "step": 1}}}', "best.miou.value"),
        ("summary.json", b"\xff\xfe", "summary.json is damaged"),
        ("summary.json", b"[" * 100_000, "summary.json is damaged"),
        ("recipe.yaml", b"task: {\nevaluate: {best: miou}\n", "its section task is not valid YAML"),
        ("recipe.yaml", b"\xff", "decode"),
    ],
)
def test_a_damaged_folder_says_so_in_its_row_and_the_others_are_listed(
    runs: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes, said: str
) -> None:
    make_run(runs, "good")
    (make_run(runs, "bad") / file).write_bytes(content)
    found = {each["name"]: each for each in listed(capsys)}
    assert found["good"]["status"] == "finished"
    assert found["bad"]["status"] == "damaged" and said in found["bad"]["note"]
    assert main(["runs"]) == 0 and main(["status", "bad"]) in (0, 3)


def test_half_made_runs_are_listed_and_what_is_no_run_is_not(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "only_checkpoints" / "checkpoints").mkdir(parents=True)
    (runs / "only_recipe").mkdir()
    (runs / "only_recipe" / "recipe.yaml").write_text("task: segmentation\n", encoding="utf-8")
    (runs / "dangling").mkdir()
    (runs / "dangling" / "checkpoints").symlink_to("nowhere")
    (runs / "notes").mkdir()
    (runs / ".hidden" / "checkpoints").mkdir(parents=True)
    (runs / "file.txt").touch()
    found = {each["name"]: (each["status"], each["task"]) for each in listed(capsys)}
    assert found == {
        "only_checkpoints": ("interrupted", None),
        "only_recipe": ("not started", "segmentation"),
        "dangling": ("not started", None),
    }


def test_runs_are_sorted_by_any_column(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(runs, "a", "stopped", age=2, miou=0.25)
    make_run(runs, "b", "failed", age=1, miou=0.75)
    make_run(runs, "c", None, age=3)
    (runs / "c" / "big").write_bytes(bytes(10_000))
    os.utime(runs / "c" / "big", (10**9, 10**9))
    for key, order in {
        "age": "cab",
        "name": "abc",
        "status": "bca",
        "best": "bac",
        "size": "cab",
        "task": "abc",
    }.items():
        assert "".join(each["name"] for each in listed(capsys, "--sort", key)) == order, key
    with pytest.raises(SystemExit, match="2"):
        main(["runs", "--sort", "colour"])


def test_without_runs_one_sentence_says_where_they_were_looked_for(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == f"no runs in {runs}; $TRAINER_RUNS names another folder\n"
    assert listed(capsys) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 100, 200])
def test_the_table_fits_the_terminal_and_has_colours_there_only(
    runs: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    make_run(runs, "a", "failed")
    make_run(runs, "a-run-with-a-longer-name")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", plain := Terminal())
    assert main(["runs"]) == 0
    lines = plain.getvalue().splitlines()
    assert max(map(len, lines)) <= columns and "\x1b" not in plain.getvalue()
    assert lines[0].startswith("name")
    if columns >= 80:
        assert "status" in lines[0] and "best" in lines[0] and "disk full" in plain.getvalue()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(sys, "stdout", colored := Terminal())
    assert main(["runs"]) == 0
    if columns >= 60:
        assert "\x1b[31mfailed\x1b[0m" in colored.getvalue()
    assert colored.getvalue().replace("\x1b[31m", "").replace("\x1b[32m", "").replace("\x1b[0m", "") == plain.getvalue()


def test_narrow_tables_leave_columns_out_in_order_and_cut_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [["name", "size", "note"], ["run", "12345678", "x" * 50]]
    assert tables.fitted_table(rows, ["size"], None)[1] == f"run   12345678  {'x' * 50}"
    assert tables.fitted_table(rows, ["size"], 50)[1] == f"run   12345678  {'x' * 33}…"
    assert tables.fitted_table(rows, ["size"], 30)[1] == f"run   {'x' * 23}…"


def test_times_and_sizes_are_short() -> None:
    assert [span_text(s) for s in (-1, 0.4, 59, 61, 3600, 12000, 200_000)] == [
        *("0 s", "0 s", "59 s", "1 min", "1 h 0 min", "3 h 20 min", "2 d"),
    ]
    assert [size_text(s) for s in (0, 512, 1000, 2**20, 200 * 2**20, 3 * 2**30)] == [
        *("0 B", "512 B", "1.0 KiB", "1.0 MiB", "200 MiB", "3.0 GiB"),
    ]


def test_compared_runs_have_figures_side_by_side_and_the_keys_that_differ(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(runs, "a", miou=0.25)
    make_run(runs, "b", "stopped", miou=0.75, seed=1)
    assert main(["runs", "--compare", "a", "b"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["a", "b"],
        ["status", "finished", "stopped"],
        ["steps", "30", "30"],
        ["seconds", "75", "75"],
        ["samples/s", "12.5", "12.5"],
        ["best", "miou", "0.2500", "(step", "20)", "0.7500", "(step", "20)"],
        ["best", "loss", "0.1000", "(step", "30)", "0.1000", "(step", "30)"],
        ["(metrics", "of", "single", "classes:", "--json)"],
        [],
        ["recipes", "differ", "in", "a", "b"],
        ["train.seed", "0", "1"],
    ]
    assert main(["runs", "--compare", "a", "a"]) == 0
    assert capsys.readouterr().out.endswith("the recipes are the same\n")
    assert main(["runs", "--compare", "a", "b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipes"] == {"train.seed": [0, 1]}
    assert found["runs"][1]["best"]["iou/a"] == {"value": 0.1, "step": 3}


def test_removed_runs_are_gone_with_their_lock_files_and_nothing_else_is(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c"):
        make_run(runs, name)
        lock_run(runs / name).release()
    (runs / ".b.removed-1").mkdir()  # of a removal that was killed
    assert main(["runs", "--remove", "a", "b", "--yes"]) == 0
    assert capsys.readouterr().out.startswith("removed a (")
    assert sorted(path.name for path in runs.iterdir()) == [".c.lock", "c"]


def test_nothing_is_removed_unless_all_named_runs_exist_and_are_free(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        make_run(runs, name)
    (runs / "linked").symlink_to(runs / "first")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    lock = lock_run(runs / "second")
    try:
        for names, said in {
            ("first", "secnod"): "did you mean 'second'?",
            ("first", "second"): "in use by a process",
            ("first", ".."): "no run '..'",
            ("first", "linked"): "is a link to",
        }.items():
            assert main(["runs", "--yes", "--remove", *names]) == 2
            assert said in capsys.readouterr().err
    finally:
        lock.release()
    assert main(["runs", "--remove", "first"]) == 2
    assert "no terminal to ask on; --yes removes without asking" in capsys.readouterr().err
    assert {"first", "second"} <= {path.name for path in runs.iterdir()}


@pytest.mark.parametrize(
    ("answer", "removed"), [("y\n", True), ("yes\n", True), ("\n", False), ("n\n", False), ("", False)]
)
def test_on_a_terminal_it_asks_and_only_yes_removes(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: str, removed: bool
) -> None:
    make_run(runs, "a")
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert main(["runs", "--remove", "a"]) == 0
    assert (runs / "a").exists() is not removed
    assert ("removed a (" if removed else "nothing was removed") in capsys.readouterr().out


def test_a_removal_that_is_killed_leaves_no_part_of_a_run_in_sight(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(runs, "a")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainer.runs.removal.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_run(runs / "a")
    assert listed(capsys) == [] and len(list(runs.glob(".a.removed-*"))) == 1
    make_run(runs, "a")
    remove_run(runs / "a")
    assert list(runs.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--yes"], "--yes goes with --remove"),
        (["--compare", "a"], "name two or more runs"),
        (["--compare", "a", "bb"], "no run 'bb'"),
        (["--compare", "a", "a", "--sort", "name"], "--sort is for the list"),
        (["--remove", "a", "--json"], "--json goes with"),
    ],
)
def test_a_mistake_is_one_sentence(
    runs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    make_run(runs, "a")
    assert main(["runs", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert (runs / "a").exists()


def test_lists_of_runs_and_of_components_do_not_wait_for_torch(runs: Path) -> None:
    make_run(runs, "a")
    code = (
        "import sys; from trainer.commands import main\n"
        "for words in ('runs', 'runs --compare a a', 'list', 'list models', 'list recipes', 'list train'):\n"
        "    assert main(words.split()) == 0 and 'torch' not in sys.modules, words"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_metrics_are_not_read(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (make_run(runs, "a") / "metrics.jsonl").write_bytes(b"\xff not read")
    assert listed(capsys)[0]["status"] == "finished"
