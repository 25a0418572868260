"""Average precision over pixels agrees with scikit-learn's, whose memory grows with the pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.metrics import average_precision_score
from torch import Tensor

from trainer.metrics.average_precision import average_precision, log_odds, score_counts

CLASSES, IGNORED = 5, 255
ABSENT = 3  # predicted here and there, and never true


def sample(seed: int, height: int = 20, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits that lean towards the true class, as a trained model's do, and the ground truth with ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.multinomial(
        torch.tensor([0.6, 0.25, 0.1, 0.0, 0.05]), 4 * height * 30, replacement=True, generator=generator
    ).view(4, height, 30)
    logits = torch.randn(4, CLASSES, height, 30, generator=generator) * spread
    logits += 1.5 * spread * torch.nn.functional.one_hot(targets, CLASSES).movedim(-1, 1)
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = IGNORED
    return logits, targets.to(torch.uint8)


def by_scikit_learn(scores: Tensor, targets: Tensor) -> list[float]:
    """AP of each class that is there."""
    valid = targets != IGNORED
    columns = scores.double().movedim(1, 0)[:, valid].numpy()
    return [
        average_precision_score(targets[valid] == index, columns[index]) for index in range(CLASSES) if index != ABSENT
    ]


def present(values: Tensor) -> list[float]:
    assert values.dtype == torch.float64 and values.isnan().nonzero().flatten().tolist() == [ABSENT]
    return values[~values.isnan()].tolist()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # of the second many pixels have equal scores
def test_it_is_scikit_learns_on_the_rounded_scores(seed: int, dtype: torch.dtype) -> None:
    logits, targets = sample(seed)
    logits = logits.to(dtype)
    scores = log_odds(logits).half()
    assert dtype == torch.float32 or len(scores.unique()) < scores.numel() / 2
    assert present(average_precision(score_counts(logits, targets, IGNORED))) == pytest.approx(
        by_scikit_learn(scores, targets), abs=1e-9
    )


@pytest.mark.parametrize("spread", [1.0, 3.0, 10.0])
def test_rounding_moves_it_by_less_than_a_ten_thousandth(spread: float) -> None:
    logits, targets = sample(1, height=200, spread=spread)
    assert present(average_precision(score_counts(logits, targets, IGNORED))) == pytest.approx(
        by_scikit_learn(log_odds(logits), targets), abs=1e-4
    )


def test_counts_of_parts_add_up_to_those_of_the_whole_in_the_same_memory() -> None:
    logits, targets = sample(5)
    whole = score_counts(logits, targets, IGNORED)
    assert whole.dtype == torch.int64 and whole.shape == (CLASSES, 2, 2**16)
    assert whole.sum() == CLASSES * (targets != IGNORED).sum() and whole[:, 1].sum() == (targets != IGNORED).sum()
    assert torch.equal(
        sum(score_counts(logits[part], targets[part], IGNORED) for part in (slice(0, 1), slice(1, 4), slice(4, 4))),
        whole,
    )


@pytest.mark.parametrize("gap", [0.0, 1e-3, 5.0, 30.0, 80.0])
def test_log_odds_are_exact_where_probabilities_are_one_but_for_rounding(gap: float) -> None:
    logits = torch.tensor([gap, 0.0, -0.25, -40.0]).view(1, 4, 1, 1)
    wide = logits.double().flatten().numpy()
    expected = [value - logsumexp(np.delete(wide, index)) for index, value in enumerate(wide)]
    assert log_odds(logits).dtype == torch.float32
    np.testing.assert_allclose(log_odds(logits).flatten(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_log_odds_are_computed_in_single_precision_whatever_the_type_of_the_logits(dtype: torch.dtype) -> None:
    logits = sample(4)[0].to(dtype)
    assert torch.equal(log_odds(logits), log_odds(logits.float()))


def test_scores_are_counted_in_their_order_with_one_place_for_both_zeros() -> None:
    first = torch.tensor([-80.0, -3.0, -1e-9, 0.0, 1e-9, 3.0, 80.0])
    logits = torch.stack([first, torch.zeros_like(first)]).view(1, 2, 1, -1)
    counts = score_counts(logits, torch.ones(1, 1, len(first)), None)
    assert not counts[0, 1].any() and not counts[1, 0].any()
    (places,) = counts[0, 0].nonzero(as_tuple=True)
    assert counts[0, 0, places].tolist() == [1, 1, 3, 1, 1] and places[2] == 2**15
    assert torch.equal(counts[1, 1], counts[0, 0].flip(-1).roll(1))  # the other class has the opposite log-odds


def test_a_score_that_knows_nothing_has_the_share_of_the_class() -> None:
    targets = torch.tensor([0, 0, 0, 1]).view(1, 1, 4)
    assert average_precision(score_counts(torch.zeros(1, 2, 1, 4), targets, None)).tolist() == [0.75, 0.25]


def test_a_perfect_order_has_1_and_ignored_pixels_do_not_disturb_it() -> None:
    logits = torch.tensor([[4.0, 3.0, 9.0, -1.0, -2.0]]).view(1, 1, 1, 5)
    targets = torch.tensor([1, 1, IGNORED, 0, 0]).view(1, 1, 5)
    assert average_precision(score_counts(torch.cat([-logits, logits], 1), targets, IGNORED)).tolist() == [1.0, 1.0]
    assert (
        average_precision(score_counts(torch.cat([-logits, logits], 1), targets * 0 + IGNORED, IGNORED)).isnan().all()
    )
