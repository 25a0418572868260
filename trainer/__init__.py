"""Recipe-driven, exact, interruptible training for computer vision.

    import trainer

    run = trainer.train("recipes/quickstart.yaml", name="first", **{"train.duration": "2 epochs"})
    run.metrics
    model = trainer.load("runs/first")
    model("photo.jpg").plot()

What these functions need is imported when they are called: `import trainer` itself takes milliseconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from trainer.api import Run
    from trainer.inference.model import Model

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "load", "train"]


def load(run: str | Path, checkpoint: str = "best", device: str | torch.device | None = None) -> Model:
    """Loads a trained model, see `trainer.inference.model.load`."""
    from trainer.inference import model

    return model.load(run, checkpoint, device)


def train(recipe: str | Path, /, *, resume: str = "auto", **overrides: Any) -> Run:
    """Trains a recipe in this process, see `trainer.api.train`."""
    from trainer import api

    return api.train(recipe, overrides, resume)


def __getattr__(name: str) -> Any:
    if name == "Run":
        from trainer.api import Run

        return Run
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")
