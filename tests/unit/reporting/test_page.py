"""A report is one page that needs no network, and draws what the run folders hold."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from trainer.commands import main
from trainer.recipe.load import load_recipe
from trainer.runs.folder import RunFolder

TEXT = """task: segmentation
data: {name: shapes, batch_size: 32}
model: unet
loss: cross_entropy
optimizer: {name: adamw, lr: 3e-3}
train: {duration: 10 epochs}
evaluate: {best: miou}
reference: {miou: 0.75}
"""


def confusion(name: str, step: int) -> dict[str, dict[str, list[int]]]:
    """Of one run alone; nothing of the second class is there."""
    return {"confusion": {"background": [95 + step, 100 - step], "square": [0, 0]}} if name == "first" else {}


@pytest.fixture
def runs(tmp_path: Path) -> list[RunFolder]:
    """Two runs that differ in their learning rate; the name of one is made to break the page."""
    (tmp_path / "r.yaml").write_text(TEXT, encoding="utf-8")
    found = []
    for name, lr in (("first", 1e-3), ("<b>second&", 2e-3)):
        run = RunFolder(tmp_path / "runs" / name)
        run.create()
        run.write_recipe(load_recipe(tmp_path / "r.yaml", [f"optimizer.lr={lr}"]).resolved())
        for step in range(1, 6):
            run.log({"step": step, "epoch": step / 2, "split": "train", "loss": 1 / step, "learning_rate": lr})
            run.log(
                {
                    "step": step,
                    "epoch": step / 2,
                    "split": "validation",
                    "loss": 1.1 / step,
                    "miou": step / 6,
                    "iou/square": 0.5,
                }
                | confusion(name, step)
            )
        run.write_summary("finished", step=5, seconds=3.25, samples_per_second=10.0)
        run.write_environment({"python": "3.11"})
        Image.new("RGB", (90, 30), "tomato").save(run.pictures / "validation_step_00000005.png")
        found.append(run)
    return found


def page(runs: list[RunFolder], out: Path) -> str:
    assert main(["report", *(str(run.path) for run in runs), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_it_has_the_figures_beside_the_reference_and_the_keys_that_differ(
    runs: list[RunFolder], tmp_path: Path
) -> None:
    text = page(runs, tmp_path / "report.html")
    assert text.count('class="number better" title="step 5">0.8333 (0.7500)') == 2
    assert (
        "<td>optimizer.lr</td><td class=number>0.001</td><td class=number>0.002</td>" in text
        and "<td>optimizer.name</td>" not in text
    )
    assert (
        text.count('5" src="data:image/png;base64,') == 2
        and "&lt;b&gt;second&amp;" in text
        and "<td><b>second" not in text
    )


def test_it_has_the_confusion_matrix_of_the_best_step(runs: list[RunFolder], tmp_path: Path) -> None:
    text = page(runs, tmp_path / "report.html")
    assert text.count('"customdata":[[100,95],[0,0]]') == text.count("rows normalised to the true class") == 1
    runs[0].log({"step": 6, "epoch": 3, "split": "validation", "loss": 1.0, "miou": 0.1} | confusion("first", 6))
    runs[0].write_summary("finished", step=6)
    assert '"customdata":[[100,95],[0,0]]' in page(runs, tmp_path / "report.html")


def test_it_loads_nothing_from_elsewhere(runs: list[RunFolder], tmp_path: Path) -> None:
    text = page(runs, tmp_path / "report.html")
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=[\"']?(https?:)?//", text)


def test_a_run_that_is_not_there_or_a_page_that_cannot_be_written_is_one_message(
    runs: list[RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "nothing", "--out", str(tmp_path / "r.html")]) == 2
    assert main(["report", str(runs[0].path), "--out", str(tmp_path / "no" / "r.html")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_browser_draws_the_plots_without_an_error(runs: list[RunFolder], tmp_path: Path) -> None:
    page(runs, tmp_path / "report.html")
    browser = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=8000",
    ]
    done = subprocess.run(
        [*browser, "--enable-logging=stderr", "--v=0", "--dump-dom", (tmp_path / "report.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    dom = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    assert len(re.findall(r'<svg class="main-svg"', dom)) >= 2  # one plot for the loss, one for miou
    assert len(re.findall(r'<g class="trace scatter', dom)) == 6  # train and validation loss and miou, of two runs
