"""Publishes a trained model: a folder with all that loading it takes and a model card, uploaded to the Hugging Face
Hub in one commit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from trainer.errors import UserError
from trainer.inference.model import Model
from trainer.inference.model_card import LIBRARY, model_card
from trainer.inference.trained import EMA, TrainedModel
from trainer.runs.checkpoint import COUNTERS
from trainer.runs.environment import version
from trainer.runs.folder import DATA, RECIPE, RunFolder, metrics_of
from trainer.runs.published import MODEL, hub_errors, seal

METRICS, CARD, PICTURES = "metrics.json", "README.md", "pictures"


def assemble(model: Model, folder: Path, repository: str, pictures: bool = True) -> None:
    """Writes a published model into a folder, see `trainer.runs.published`.

    Args:
        model: of a run.
        folder: may contain exported files, which become part of it.
        repository: `OWNER/NAME`, for the card.
        pictures: whether it contains those of the run, which show validation samples.

    Raises:
        UserError: a file can't be copied.
    """
    trained = model.trained
    run = RunFolder(trained.recipe.parent)
    lines = [line for line in run.read_metrics() if line["split"] == "validation" and line["step"] == trained.step]
    metrics = metrics_of(lines[-1]) if lines else {}
    exported = [file.name for file in sorted(folder.iterdir())]
    try:
        shutil.copyfile(trained.weights, folder / MODEL)
        shutil.copyfile(trained.recipe, folder / RECIPE)
        shown = _copy_pictures(run, trained.step, folder) if pictures else []
    except OSError as error:
        raise UserError(f"{error.filename}: can't be copied to {folder}: {error.strerror or error}") from error
    _write(folder / DATA, _data(trained, run))
    weights = "average (EMA)" if trained.weights.name == EMA else "raw"
    _write(
        folder / COUNTERS,
        {"step": trained.step, "run": trained.name, "weights": weights, "version": version(LIBRARY)},
    )
    _write(folder / METRICS, {"step": trained.step, "split": "validation", "metrics": metrics})
    card = model_card(model, repository, run, metrics, weights, shown, exported)
    (folder / CARD).write_text(card, encoding="utf-8")
    seal(folder)


def upload(folder: Path, repository: str, private: bool) -> str:
    """Uploads a folder to a repository on the Hub, which is created if necessary; returns its URL.

    Raises:
        UserError: there is no network or no permission, or `private` is set and the repository is public.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    with hub_errors(repository, "published"):
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise UserError(
                f"{repository} exists and is public: --private only applies to a new repository; choose another name, "
                "or make it private in its settings"
            )
        # Not upload_folder, which may split the files into several commits: weights and manifest belong together.
        api.create_commit(
            repository,
            [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files],
            commit_message=f"Publish {json.loads((folder / COUNTERS).read_text(encoding='utf-8'))['run']}",
        )
    return str(url)


def _data(trained: TrainedModel, run: RunFolder) -> dict[str, object]:
    """The content of data.json, also for a run of a version that didn't write it."""
    file = run.path / DATA
    if file.exists():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    info = trained.info
    return {
        "name": run.read_recipe()["data"]["name"],
        "classes": list(info.classes),
        "ignore_index": info.ignore_index,
        "statistics": dict(info.statistics),
        "size": trained.size,
    }


def _copy_pictures(run: RunFolder, step: int, folder: Path) -> list[str]:
    """Copies the pictures of the step and the curves; returns their paths in the folder."""
    files = [file for file in (*reversed(run.pictures_of(step)), run.pictures / "curves.png") if file.exists()]
    if files:
        (folder / PICTURES).mkdir()
    return [str(Path(shutil.copyfile(file, folder / PICTURES / file.name)).relative_to(folder)) for file in files]


def _write(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
