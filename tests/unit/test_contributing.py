"""The example of CONTRIBUTING.md works as it is written there."""

from __future__ import annotations

import re
from pathlib import Path

from trainer.recipe.load import load_recipe
from trainer.tasks.checks import TASK_CHECKS

ROOT = Path(__file__).resolve().parents[2]


def test_a_new_model_is_one_file_and_two_lines_of_recipe(tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    module, recipe = (re.search(rf"```{language}\n(.*?)```", text, re.DOTALL) for language in ("python", "yaml"))
    assert module and recipe
    (tmp_path / "tiny_fcn.py").write_text(module[1], encoding="utf-8")
    parent = ROOT / "recipes" / "quickstart.yaml"
    (tmp_path / "mine.yaml").write_text(
        recipe[1].replace("quickstart.yaml", str(parent)) + "plugins: [tiny_fcn.py]\n", encoding="utf-8"
    )
    loaded = load_recipe(tmp_path / "mine.yaml", (), TASK_CHECKS)
    assert (
        sum(parameter.numel() for parameter in loaded.build("model", num_classes=4).parameters())
        == 16 * (27 + 1) + 16 * (144 + 1) + 4 * 17
    )
