"""A self-contained HTML page about some runs: results beside the reference, curves, pictures, recipes, environments."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from trainer.metrics.best import lower_is_better
from trainer.recipe.recipe import differing
from trainer.reporting.figures import MAX_LABELLED, row_shares
from trainer.runs.folder import Line, RunFolder, metrics_of

MAX_PICTURES = 3  # of each run: the first, one in the middle, the last

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: .6rem 0 }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
th { border-bottom: 1px solid #bbb; font-weight: 600 }
td.number { text-align: right; font-variant-numeric: tabular-nums }
figure { display: inline-block; margin: .4rem 1rem .4rem 0 }
figcaption { color: #666; font-size: .85rem } img { max-width: 100% }
pre { background: #f6f6f6; padding: .8rem; overflow: auto; font-size: .8rem }
.better { color: #0a6b2d } .worse { color: #a33 }
"""


class Run:
    """A run folder, as the report shows it."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.name = folder, folder.path.name
        self.lines = folder.read_metrics()
        self.recipe = folder.read_recipe()
        self.summary = folder.read_summary()
        file = folder.path / "environment.json"
        self.environment: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def series(self, split: str, metric: str) -> tuple[list[float], list[float]]:
        """Epochs and values of a metric."""
        points = [
            (line["epoch"], line[metric])
            for line in self.lines
            if line["split"] == split and metric in metrics_of(line)
        ]
        return [epoch for epoch, _ in points], [value for _, value in points]

    def best_validation(self) -> Line:
        """The validation line with the best value of `evaluate.best`; without a best value the last line,
        without lines an empty one.
        """
        lines = [line for line in self.lines if line["split"] == "validation"]
        best = self.summary.get("best", {}).get(self.recipe["evaluate"]["best"], {}).get("step")
        return next((line for line in lines if line["step"] == best), lines[-1] if lines else {})

    def sheets(self) -> list[Path]:
        """A few of its validation pictures, oldest first, and the last precision-recall curves, if any."""
        files = sorted(self.folder.pictures.glob("validation_step_*.png"))
        chosen = [files[i] for i in sorted({0, len(files) // 2, len(files) - 1})][:MAX_PICTURES] if files else []
        return chosen + sorted(self.folder.pictures.glob("precision_recall_step_*.png"))[-1:]


def report(folders: Sequence[RunFolder]) -> str:
    """The page, as HTML."""
    runs = [Run(folder) for folder in folders]
    title = ", ".join(run.name for run in runs)
    sections = [
        ("Results", _results(runs)),
        ("Curves", _curves(runs)),
        ("Confusion matrices", "".join(_confusion(run) for run in runs)),
        ("Pictures", "".join(_pictures(run) for run in runs)),
        ("Recipes", _recipes(runs)),
        ("Environment", _environments(runs)),
    ]
    body = "".join(f"<h2>{heading}</h2>{content}" for heading, content in sections if content)
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    head = (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{escape(title)}</title><link rel=icon "
        f"href=data:,><style>{STYLE}</style></head>"
    )
    return (
        f"{head}<body><h1>{escape(title)}</h1><p>{len(runs)} run{'s' * (len(runs) > 1)}, reported on "
        f"{made}.</p>{body}</body></html>\n"
    )


def _results(runs: list[Run]) -> str:
    """Status of each run, and the best value of each metric beside the recipe's reference."""
    metrics = list(dict.fromkeys(name for run in runs for name in run.summary.get("best", {}) if "/" not in name))
    heads = ["run", "status", "steps", "seconds", "samples/s", *metrics]
    rows = []
    for run in runs:
        best, reference = run.summary.get("best", {}), run.recipe.get("reference") or {}
        facts = [
            run.summary.get("status", "not started"),
            run.summary.get("step"),
            run.summary.get("seconds"),
            run.summary.get("samples_per_second"),
        ]
        cells = [_cell(run.name), *map(_cell, facts)]
        cells += [
            _result(name, best[name]["value"], best[name]["step"], reference.get(name)) if name in best else _cell(None)
            for name in metrics
        ]
        rows.append(cells)
    return (
        _table(heads, rows)
        + "<p>The best validation value of each metric; hover for its step. In parentheses the recipe's reference.</p>"
    )


def _result(name: str, value: float, step: int, reference: float | None) -> str:
    if reference is None:
        return f'<td class=number title="step {step}">{value:.4f}</td>'
    better = value <= reference if lower_is_better(name) else value >= reference
    verdict = "better" if better else "worse"
    return f'<td class="number {verdict}" title="step {step}">{value:.4f} ({reference:.4f})</td>'


def _curves(runs: list[Run]) -> str:
    """A zoomable plot for each metric, with all runs; the page contains the library once."""
    import plotly.graph_objects as go
    from plotly.colors import qualitative
    from plotly.io import to_html

    names = list(
        dict.fromkeys(
            name
            for run in runs
            for line in run.lines
            for name in metrics_of(line)
            if "/" not in name and name != "learning_rate"
        )
    )
    names.sort(key=lambda name: (name != "loss", not lower_is_better(name)))
    parts: list[str] = []
    for name in names:
        figure = go.Figure(
            layout={
                "template": "plotly_white",
                "height": 380,
                "margin": {"t": 30, "b": 40},
                "xaxis_title": "epoch",
                "yaxis_title": name,
            }
        )
        for index, run in enumerate(runs):
            color = qualitative.D3[index % len(qualitative.D3)]
            for split, dash, width in (("train", "dot", 1), ("validation", "solid", 2)):
                x, y = run.series(split, name)
                if x:
                    figure.add_scatter(
                        x=x,
                        y=y,
                        name=f"{escape(run.name)}, {split}",
                        mode="lines",
                        line={"color": color, "dash": dash, "width": width},
                    )
        parts.append(
            to_html(
                figure, full_html=False, include_plotlyjs=not parts, config={"displaylogo": False, "responsive": True}
            )
        )
    return "".join(parts)


def _confusion(run: Run) -> str:
    """The confusion matrix at the best step, as shares and, on hovering, as counts;
    drawn by the library that the curves have loaded.
    """
    import plotly.graph_objects as go
    from plotly.io import to_html

    line = run.best_validation()
    if "confusion" not in line:
        return ""
    names, counts = list(line["confusion"]), list(line["confusion"].values())
    matrix = go.Heatmap(
        x=names,
        y=names,
        z=row_shares(np.array(counts)),
        customdata=counts,
        texttemplate="%{z:.1%}" if len(names) <= MAX_LABELLED else None,
        hovertemplate="%{y}, predicted as %{x}:<br>%{customdata:,}, %{z:.2%} of %{y}<extra></extra>",
        hoverongaps=False,
        colorscale="Blues",
        zmin=0,
        zmax=1,
        showscale=False,
    )
    side = 200 + min(700, 60 * len(names))
    layout = {"template": "plotly_white", "width": side, "height": side, "margin": {"t": 30}}
    layout |= {"xaxis_title": "prediction", "yaxis": {"title": "ground truth", "autorange": "reversed"}}
    figure = to_html(go.Figure(matrix, layout), full_html=False, include_plotlyjs=False, config={"displaylogo": False})
    return (
        f"<figure>{figure}<figcaption>{escape(run.name)}, step {line['step']}, rows normalised to the true "
        "class</figcaption></figure>"
    )


def _pictures(run: Run) -> str:
    figures = [
        f'<figure><img alt="{escape(file.stem)}" '
        f'src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'
        f"<figcaption>{escape(run.name)}, step {int(file.stem.rpartition('_')[2])}</figcaption></figure>"
        for file in run.sheets()
    ]
    return "".join(figures)


def _recipes(runs: list[Run]) -> str:
    """The keys in which the recipes differ, and each complete recipe."""
    differing_keys = differing([run.recipe for run in runs])
    rows = [[_cell(key), *map(_cell, values)] for key, values in differing_keys.items()]
    differences = _table(["key", *(run.name for run in runs)], rows) if rows else ""
    return differences + "".join(
        _details(run.name, (run.folder.path / "recipe.yaml").read_text(encoding="utf-8")) for run in runs
    )


def _environments(runs: list[Run]) -> str:
    return "".join(_details(run.name, json.dumps(run.environment, indent=2)) for run in runs)


def _details(name: str, text: str) -> str:
    return f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"<td class=number>{value:,.4g}</td>" if abs(value) < 1000 else f"<td class=number>{value:,.0f}</td>"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"<td class=number>{value:,}</td>"
    return f"<td>{'' if value is None else escape(str(value))}</td>"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(name).replace('_', '_<wbr>')}</th>" for name in heads)  # long names may wrap there
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
