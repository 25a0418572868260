"""The model card of a published model: what it does, how well, how it was trained and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.components import HUB
from trainer.data.card import Card
from trainer.data.prepare import data_dir
from trainer.errors import UserError
from trainer.inference.model import Model
from trainer.runs.checkpoint import read_counters
from trainer.runs.environment import version
from trainer.runs.folder import DATA, RunFolder

LIBRARY = "recipe-trainer"
NO_LICENSE = (
    "None is stated yet: the data set doesn't name one. Choose a license that its terms allow, and add it at the top "
    "of this file, e.g. `license: apache-2.0`."
)
CAPTIONS = {
    "validation": "Validation samples",
    "confusion": "Confusion matrix",
    "precision_recall": "Precision and recall",
    "curves": "Training and validation curves",
}


def model_card(
    model: Model,
    repository: str,
    run: RunFolder,
    metrics: Mapping[str, float],
    weights: str,
    pictures: Sequence[str],
    exported: Sequence[str],
) -> str:
    """Markdown with the metadata that the Hub reads.

    Args:
        model: what is published.
        repository: `OWNER/NAME`.
        run: its run.
        metrics: of its checkpoint on the validation set; empty if it wasn't evaluated.
        weights: raw, or their average.
        pictures: paths in the published folder.
        exported: files for other runtimes, in the published folder.
    """
    recipe, trained = model.recipe, model.trained
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    data = _data_set(model, run)
    size = f"{trained.size[0]} x {trained.size[1]} pixels" if trained.size else "any"
    parts = [
        f"---\n{_metadata(model, repository, metrics)}\n---\n",
        f"# {repository.partition('/')[2]}\n",
        f"A {recipe.model.name} for {recipe.task.name.replace('_', ' ')}, trained on {data['name']} for {trained.step} "
        f"steps with {LIBRARY} {version(LIBRARY) or ''}.\n",
        "## Use\n",
        f'```python\nimport trainer\n\nmodel = trainer.load("{HUB}{repository}")\nresult = model("photo.jpg")\n'
        "result.plot()\n```\n",
        f"On the command line: `trainer predict {HUB}{repository} photo.jpg --out results`. To fine-tune it, set "
        f"`model.weights: {HUB}{repository}` in a recipe with the same model; for other classes, also "
        "`model.reset_layers`.\n",
        "`model.safetensors` contains the weights, and `manifest.json` the SHA-256 of every file, which loading "
        "compares." + "".join(f" `{each}` is the same model for other runtimes." for each in exported) + "\n",
        "## Results\n",
        *_results(model, metrics),
        *(f"![{_caption(picture)}]({picture})\n" for picture in pictures),
        "## Model\n",
        _table(
            {
                "Model": recipe.model.name,
                "Parameters": f"{parameters:,}",
                "Weights": f"{weights}, after {trained.step} optimizer steps",
                "Input": f"RGB, resized to {size}" if trained.size else "RGB, any size",
                "Loss": recipe.loss.name,
                "Classes": _classes(model.classes),
            }
        ),
        "## Data\n",
        _table(data),
        "## Training\n",
        f"```sh\n{_command(run)}\n```\n",
        "`recipe.yaml` has every setting, defaults included.\n",
        _table(_environment(run)),
        "## License\n",
        NO_LICENSE + "\n",
    ]
    return "\n".join(parts)


def _metadata(model: Model, repository: str, metrics: Mapping[str, float]) -> str:
    """YAML as the Hub defines it."""
    from huggingface_hub import EvalResult, ModelCardData

    recipe, tag = model.recipe, model.task.pipeline_tag
    results = [
        EvalResult(tag, recipe.data.name, recipe.data.name, name, round(metrics[name], 6), dataset_split="validation")
        for name in model.task.metric_names
        if tag and name in metrics
    ]
    # Its names can hold anything but these characters.
    tags = dict.fromkeys([LIBRARY, recipe.task.name, recipe.model.name, recipe.data.name])
    path = getattr(recipe.data, "path", None) if recipe.data.name == "hub" else None
    card = ModelCardData(
        library_name=LIBRARY,
        tags=[re.sub(r"[^\w.-]", "-", each) for each in tags],
        pipeline_tag=tag or None,
        datasets=[path] if path else None,
        model_name=repository.partition("/")[2],
        eval_results=results or None,
    )
    return str(card.to_yaml())


def _results(model: Model, metrics: Mapping[str, float]) -> list[str]:
    if not metrics:
        return [f"This checkpoint, of step {model.trained.step}, wasn't evaluated while it was trained.\n"]
    lines = [f"On the validation split of {model.recipe.data.name}; fractions are between 0 and 1.\n"]
    lines.append(
        _rows(["Metric", "Value"], [[name, f"{value:.4f}"] for name, value in metrics.items() if "/" not in name])
    )
    names = list(dict.fromkeys(name.partition("/")[0] for name in metrics if "/" in name))
    classes = list(dict.fromkeys(name.partition("/")[2] for name in metrics if "/" in name))
    if names:
        rows = [
            [each, *(f"{metrics[key]:.4f}" if (key := f"{name}/{each}") in metrics else "" for name in names)]
            for each in classes
        ]
        lines.append(_rows(["Class", *names], rows))
    return lines


def _data_set(model: Model, run: RunFolder) -> dict[str, str]:
    """What is known of the data set; most of it is on its card, where it is prepared."""
    file = run.path / DATA
    name = json.loads(file.read_text(encoding="utf-8"))["name"] if file.exists() else model.recipe.data.name
    identity = read_counters(model.trained.checkpoint).get("data")
    facts = {"name": name, **({"SHA-256 of its content": identity} if identity else {})}
    with suppress(UserError):
        card = Card.load(data_dir() / name)
        facts |= {f"{split} samples": f"{each.rows:,}" for split, each in card.splits.items()}
        facts |= {f"SHA-256 of {archive}": checksum for archive, checksum in card.archives.items()}
        facts |= {"version": card.version} if card.version else {}
        facts |= {"notes": " ".join(card.notes)} if card.notes else {}
    return facts | {"license": "not stated by the data set; see its source"}


def _command(run: RunFolder) -> str:
    """The command that trains this model again."""
    world_size = _read(run.path / "environment.json").get("world_size", 1)
    return f"accelerate launch --num_processes {world_size} trainer/run.py recipe.yaml"


def _environment(run: RunFolder) -> dict[str, str]:
    """Versions, commit and hardware of the training; nothing that names the machine or its user."""
    environment, summary = _read(run.path / "environment.json"), run.read_summary()
    git = environment.get("git") or {}
    facts = {
        "Python": environment.get("python"),
        **dict(sorted((environment.get("packages") or {}).items())),
        f"commit of {LIBRARY}": f"{git['commit']}{' with local changes' if git.get('dirty') else ''}"
        if "commit" in git
        else None,
        "hardware": ", ".join(environment.get("gpus") or []) or environment.get("cpu"),
        "processes": environment.get("world_size"),
        "precision": environment.get("precision"),
        "time": f"{summary['seconds'] / 60:.1f} minutes" if "seconds" in summary else None,
    }
    return {name: str(value) for name, value in facts.items() if value}


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _classes(classes: Sequence[str], shown: int = 20) -> str:
    return ", ".join(classes[:shown]) + (f" and {len(classes) - shown} more" if len(classes) > shown else "")


def _caption(picture: str) -> str:
    name = Path(picture).stem.partition("_step_")[0]
    return CAPTIONS.get(name, name)


def _table(facts: Mapping[str, str]) -> str:
    return _rows(["", ""], [[name, value] for name, value in facts.items()])


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell.replace("|", r"\|").replace("\n", " ") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
