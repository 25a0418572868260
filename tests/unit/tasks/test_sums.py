"""Sums of parts of a set add up to those of the set, whichever process has none of it."""

from __future__ import annotations

from dataclasses import fields

import torch

from trainer.tasks.sums import EvaluationSums


def part(*values: float) -> EvaluationSums:
    rows = torch.tensor(values, dtype=torch.float64)
    return EvaluationSums({"x": rows.sum()}, {"x": rows.sum().long()}, {"x": rows}, torch.tensor(len(values)))


def test_a_metric_and_a_term_of_the_loss_may_have_the_same_name() -> None:
    both = part(1.5, 2.5) + part(4.0)
    assert both.loss["x"] == 8 and both.metrics["x"] == 8 and both.rows["x"].tolist() == [1.5, 2.5, 4.0]
    assert both.samples == 3


def test_an_empty_share_adds_nothing_and_keeps_names_shapes_and_dtypes() -> None:
    whole, nothing = part(1.5, 2.5), part(7.0, 8.0).emptied()
    for name in (field.name for field in fields(EvaluationSums)):
        added, expected = getattr(whole + nothing, name), getattr(whole, name)
        if name == "samples":
            assert torch.equal(added, expected)
        else:
            assert torch.equal(added["x"], expected["x"]) and added["x"].dtype == expected["x"].dtype
