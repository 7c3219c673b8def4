"""Figures of probabilities: by their definitions, image by image."""

import numpy as np
import pytest

from ztune.errors import ZtuneError
from ztune.statistics import Bin, ece_of, score


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_by_their_definitions(temperature: float) -> None:
    rng = np.random.default_rng(5)
    logits = (3 * rng.standard_normal((5000, 4))).astype(np.float32)
    labels = rng.integers(0, 4, 5000)
    found = score(logits, labels, ("a", "b", "c", "d"), temperature)
    nll, brier = list[float](), list[float]()
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for row, label in zip(logits.astype(np.float64), labels, strict=True):
        p = np.exp(row / temperature) / np.exp(row / temperature).sum()
        nll.append(-np.log(p[label]))
        brier.append(sum((p[c] - (c == label)) ** 2 for c in range(4)))
        bins[min(int(15 * p.max()), 14)].append((p.max(), p.argmax() == label))
    assert found.nll == pytest.approx(np.mean(nll))
    assert found.brier == pytest.approx(np.mean(brier))
    gaps = [
        len(b) * abs(np.mean([x for x, _ in b]) - np.mean([y for _, y in b])) for b in bins if b
    ]
    assert found.ece == pytest.approx(sum(gaps) / 5000)
    assert sum(one.n for one in found.reliability) == 5000
    assert found.accuracy == score(logits, labels, found.classes).accuracy


def test_a_sure_classifier_that_is_right_has_no_error() -> None:
    logits = np.array([[100, -100], [-1e30, 1e30]], np.float32)
    found = score(logits, np.array([0, 1]), ("a", "b"))
    assert (found.ece, found.nll, found.brier) == (0, 0, 0)
    wrong = score(logits, np.array([1, 1]), ("a", "b"))
    assert wrong.ece == 0.5
    assert np.isfinite(wrong.nll)
    assert wrong.brier == 1


def test_bins_of_several_results_are_one() -> None:
    """Errors of opposite sign in one bin cancel, as they do for images of one result."""
    over, under = Bin(7, 50, 0.5, 0.4), Bin(7, 50, 0.5, 0.6)
    assert ece_of([over]) == pytest.approx(0.1)
    assert ece_of([over, under]) == pytest.approx(0)
    assert np.isnan(ece_of([]))


def test_logits_that_are_not_finite_are_named() -> None:
    with pytest.raises(ZtuneError, match="image 2 of 2"):
        score(np.array([[0, 1], [0, np.nan]], np.float32), np.array([0, 1]), ("a", "b"))
