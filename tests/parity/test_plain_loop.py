"""The framework computes what a plain loop computes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import plain_loop
from tests.processes import lines, run_processes, train, write_recipe
from tests.reference_order import fingerprints, stream_of
from trainer.data.order import Slices
from trainer.recipe.load import load_recipe
from trainer.trainer import Trainer

STEPS = 15
OPTIONS = ("loss=cross_entropy", f"train.duration={STEPS} steps", "schedule.warmup=0%", "train.precision=fp64")


def _plain(recipe: Path, out: Path) -> None:
    """Gives the plain loop the model and the batches of the framework, and nothing else of it."""
    trainer = Trainer(load_recipe(recipe, ("name=plain", *OPTIONS)))
    trainer.build()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for positions in Slices(8, 1, 0, 1, 0):
            batch = trainer.data.train.batch(positions)
            yield batch["image"], batch["mask"][:, 0]

    losses = plain_loop.train(
        trainer.task.model, batches(), STEPS, torch.optim.AdamW(trainer.task.model.parameters(), lr=1e-2)
    )
    out.write_text(json.dumps([float(loss) for loss in losses]))


def test_losses_equal_those_of_a_plain_loop(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run_processes(1, train, recipe, ("name=framework", *OPTIONS))
    run_processes(1, _plain, recipe, tmp_path / "losses.json")
    found = [line["loss"] for line in lines(tmp_path / "runs" / "framework", "train")]
    expected = json.loads((tmp_path / "losses.json").read_text())
    assert len(found) == len(expected) == STEPS
    assert all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(found, expected, strict=True)), (found, expected)
    assert expected[-1] < 0.8 * expected[0]
    assert torch.isfinite(torch.tensor(found)).all()


# ---------------------------------------------------------------- everything that an optimizer step may hold

BATCH, EVERY = 8, 4  # samples in a step; steps between evaluations; one more is at the end
LR, MOMENTUM, DECAY, CLIP, EMA = 0.05, 0.8, 0.02, 0.5, 0.9
SEED, WINDOW = 3, 2
GROUPS = [(i + 1) * 52 // 8 - i * 52 // 8 for i in range(8)]  # of tests/tiny.py: 52 rows in 8 row groups
SGD = (
    "loss=cross_entropy",
    "train.precision=fp64",
    f"train.seed={SEED}",
    f"data.window={WINDOW}",
    f"train.duration={STEPS} steps",
    f"evaluate.every={EVERY} steps",
    f"optimizer={{name: sgd, lr: {LR}, momentum: {MOMENTUM}, weight_decay: {DECAY}}}",
    "schedule={name: cosine, warmup: 20%}",
)
VARIANTS = {
    "everything": ("train.accumulate=2", f"train.clip_norm={CLIP}", f"train.ema={EMA}"),
    "nothing": (),
}


def _metrics(model: nn.Module, images: Tensor, masks: Tensor) -> dict[str, float]:
    """Cross entropy, IoU and accuracy of the validation set taken as one batch, pixel by pixel."""
    model.eval()
    with torch.no_grad():
        log_p = model(plain_loop.normalised(images, torch.float64)).log_softmax(1).permute(0, 2, 3, 1).numpy()
    valid = masks.numpy() != 255
    true_labels, guess = masks.numpy()[valid].astype(int), log_p.argmax(-1)[valid]
    ious = [np.sum((true_labels == c) & (guess == c)) / np.sum((true_labels == c) | (guess == c)) for c in (0, 1)]
    shares = [np.mean(guess[true_labels == c] == c) for c in (0, 1)]
    loss = -log_p[valid][np.arange(len(true_labels)), true_labels].mean()
    return {
        "loss": loss,
        "miou": np.mean(ious),
        "class_accuracy": np.mean(shares),
        "pixel_accuracy": np.mean(true_labels == guess),
    }


def _sgd(recipe: Path, out: Path, options: tuple[str, ...]) -> None:
    """A training written down step by step; of the framework it has the initial model and the samples,
    decoded and augmented.
    """
    trainer = Trainer(load_recipe(recipe, ("name=plain", *options)))
    trainer.build()
    model, data = trainer.task.model, trainer.data
    whole = data.validation.batch(list(range(len(data.validation))))
    validation = whole["image"], whole["mask"][:, 0]
    has_extras = options != SGD
    parts = 2 if has_extras else 1
    average = deepcopy(model)
    momenta = {parameter: torch.zeros_like(parameter) for parameter in model.parameters()}
    found: list[tuple[str, dict[str, float]]] = []
    for step in range(STEPS):
        model.train()
        model.zero_grad()
        losses = []
        for part in range(parts):
            first = step * BATCH + part * BATCH // parts
            batch = data.train.batch(list(range(first, first + BATCH // parts)))
            logits = model(plain_loop.normalised(batch["image"], torch.float64))
            loss = F.cross_entropy(logits, batch["mask"][:, 0].long(), ignore_index=255)
            (loss / parts).backward()
            losses.append(float(loss.detach()))
        norm = math.sqrt(sum(float((parameter.grad**2).sum()) for parameter in momenta))
        progress = (step + 0.5) / STEPS
        lr = LR * (progress / 0.2 if progress < 0.2 else (1 + math.cos(math.pi * (progress - 0.2) / 0.8)) / 2)
        with torch.no_grad():
            for parameter, momentum in momenta.items():
                gradient = parameter.grad * (min(1, CLIP / (norm + 1e-6)) if has_extras else 1) + DECAY * parameter
                momentum.mul_(MOMENTUM).add_(gradient)
                parameter -= lr * momentum
            stays = min(EMA, (2 + step) / (11 + step))
            for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                mean.copy_(stays * mean + (1 - stays) * value if value.is_floating_point() else value)
        found.append(
            ("train", {"step": step + 1, "loss": sum(losses) / parts, "gradient_norm": norm, "learning_rate": lr})
        )
        if (step + 1) % EVERY == 0 or step + 1 == STEPS:
            found.append(("validation", {"step": step + 1} | _metrics(average if has_extras else model, *validation)))
    (out / "lines.json").write_text(json.dumps(found))
    for name, trained in (("model", model), ("ema", average)):
        save_file({key: value.contiguous() for key, value in trained.state_dict().items()}, out / f"{name}.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_gradients_metrics_and_weights_equal_those_of_a_training_written_down_step_by_step(
    tmp_path: Path, variant: str
) -> None:
    """With SGD, since Adam hides a wrong scale of the gradients."""
    recipe, options = write_recipe(tmp_path), (*SGD, *VARIANTS[variant])
    run_processes(1, train, recipe, ("name=framework", *options))
    run_processes(1, _sgd, recipe, tmp_path, options)
    run = tmp_path / "runs" / "framework"
    expected = json.loads((tmp_path / "lines.json").read_text())
    assert [split for split, _ in expected].count("validation") == 4
    for line, (split, plain) in zip(lines(run), expected, strict=True):
        assert line["split"] == split
        assert {name: line[name] for name in plain} == pytest.approx(plain, rel=1e-9)
    for name in ("model", *(["ema"] if VARIANTS[variant] else [])):
        weights = load_file(run / "checkpoints" / f"step_{STEPS:08d}" / f"{name}.safetensors")
        for key, value in load_file(tmp_path / f"{name}.safetensors").items():
            torch.testing.assert_close(weights[key], value, rtol=1e-9, atol=1e-12)
    norms = [line["gradient_norm"] for line in lines(run, "train")]
    assert min(norms) < CLIP < max(norms)  # some steps are clipped
    samples = stream_of(GROUPS, SEED, WINDOW, STEPS * BATCH)
    assert {epoch for epoch, _ in samples} == {0, 1, 2}
    assert [line["data_fingerprint"] for line in lines(run, "train")] == fingerprints(samples, BATCH)
