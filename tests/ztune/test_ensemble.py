"""The ensemble: the mean of its members' calibrated logits, judged on images it did not see."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ztune import ensemble
from ztune.calibration import fit_temperature
from ztune.ensemble import LabelledFeatures, Prior, Spread, _choose, fit_ensemble
from ztune.logits import Whitening
from ztune.methods.gda import gaussian_classifier
from ztune.types import F32, F64, I64

C, E, SCALE, N_FOLDS = 4, 12, 20.0, 4


def unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def images(seed: int = 0, per_class: int = 8) -> LabelledFeatures:
    """Return features around one direction a class, with one direction of large spread."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((C, E))
    labels = np.repeat(np.arange(C), per_class)
    spread = 0.8 * rng.standard_normal((len(labels), E))
    spread[:, 0] *= 5
    features = unit(2 + centres[labels] + spread).astype(np.float32)
    folds = np.arange(len(labels)) % N_FOLDS if per_class > 1 else np.full(len(labels), -1)
    return LabelledFeatures(features, labels, folds, C)


def priors(seed: int = 1) -> list[Prior]:
    rng = np.random.default_rng(seed)
    made = []
    for name in ("zero-shot", "prompts"):
        texts = unit(rng.standard_normal((1 + N_FOLDS, C, E)))
        made.append(Prior(name, texts[0], texts[1:]))
    return made


def by_definition(
    given: LabelledFeatures, texts_of: dict[str, F64], queries: F64, chosen: Any
) -> F64:
    """Return the logits of the members as chosen, from the formulas of docs/methods.md."""
    features, labels = given.features.astype(np.float64), given.labels
    W, b = gaussian_classifier(given.features, labels, C)
    means = np.stack([features[labels == c].mean(axis=0) for c in range(C)])
    centred = features - means[labels]
    covariance = centred.T @ centred / (len(labels) - C)
    variance = np.trace(covariance) / E
    s = chosen["shrinkage"]
    values, vectors = np.linalg.eigh((1 - s) * covariance / variance + s * np.eye(E))
    A = vectors @ np.diag(values**-0.5) @ vectors.T
    mean = features.mean(axis=0)
    keys, asked = unit((features - mean) @ A.T), unit((queries - mean) @ A.T)
    total = np.zeros((len(queries), C))
    for member in chosen["members"]:
        texts = texts_of[member["prior"]]
        logits = SCALE * queries @ texts.T
        if member["kind"] == "gda":
            logits = logits + member["alpha"] * (queries @ W.T + b)
        else:
            K = np.exp(-chosen["beta"] * (1 - keys @ keys.T))
            k = np.exp(-chosen["beta"] * (1 - asked @ keys.T))
            residuals = np.eye(C)[labels] - features @ texts.T
            counts = np.bincount(labels)[labels]
            ridges = member["ridge"] * counts * C / len(labels)
            inverse = np.linalg.inv(K + np.diag(ridges))
            logits = logits + SCALE * k @ inverse @ residuals
        total += logits / member["temperature"]
    return total / len(chosen["members"]) / chosen["temperature"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("imbalanced", [False, True])
def test_it_is_the_mean_of_its_members(seed: int, imbalanced: bool) -> None:
    given, own = images(seed), priors()
    if imbalanced:
        given = given.rows((given.labels != 1) | (np.cumsum(given.labels == 1) <= 3))
    found = fit_ensemble(given, own, SCALE)
    queries = images(seed + 50).features
    texts = {one.name: one.texts for one in own}
    expected = by_definition(given, texts, queries.astype(np.float64), found.chosen)
    # What is recorded is rounded to four digits.
    np.testing.assert_allclose(found.classifier.logits(queries), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("judged", [1000, 9])
def test_held_out_logits_are_those_of_refits(judged: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble, "_LEAST_JUDGED", judged)
    monkeypatch.setattr(ensemble, "_MOST_LOGITS", 0)
    given, own = images(), priors()
    found = fit_ensemble(given, own, SCALE)
    asked = given.held_out(judged)
    assert len(found.labels) == len(asked.labels) == (32 if judged == 1000 else 7)
    expected = []
    for k in range(N_FOLDS):
        rest, queries = given.rows(given.folds != k), asked.rows(asked.folds == k)
        assert len(queries.labels)
        texts = {one.name: one.held_out[k] for one in own}
        wide = queries.features.astype(np.float64)
        expected.append(by_definition(rest, texts, wide, found.chosen))
    np.testing.assert_allclose(found.logits, np.concatenate(expected), rtol=2e-2, atol=2e-2)


GRIDS = ("ALPHAS", "SHRINKAGES", "BETAS", "RIDGES")


def test_no_other_setting_loses_less_on_held_out_images(monkeypatch: pytest.MonkeyPatch) -> None:
    given, own = images(3), priors()
    best = _choose(given, own, SCALE)
    kernels, gdas = [], []
    grids = [getattr(ensemble, name) for name in GRIDS]
    for alpha in grids[0]:
        monkeypatch.setattr(ensemble, "ALPHAS", (alpha,))
        gdas.append([one.loss for one in _choose(given, own, SCALE).gda])
    for point in itertools.product(*grids[1:3]):
        for name, value in zip(GRIDS[1:3], point, strict=True):
            monkeypatch.setattr(ensemble, name, (value,))
        losses = []
        for ridge in grids[3]:
            monkeypatch.setattr(ensemble, "RIDGES", (ridge,))
            losses.append([one.loss for one in _choose(given, own, SCALE).kernel])
        kernels.append(sum(np.min(losses, axis=0)))
    assert [one.loss for one in best.gda] == np.min(gdas, axis=0).tolist()
    assert np.ptp(gdas, axis=0).min() > 1e-3
    assert sum(one.loss for one in best.kernel) == min(kernels)
    assert np.ptp(kernels) > 1e-3


def test_temperatures_are_those_of_the_held_out_images() -> None:
    best = _choose(images(3), priors(), SCALE)
    members = [*best.gda, *best.kernel]
    for one in members:
        assert one.temperature == fit_temperature(one.logits, best.labels)
        assert abs(np.log(one.temperature)) > 0.01
    mean = np.mean([one.logits / one.temperature for one in members], axis=0)
    assert best.temperature == fit_temperature(mean, best.labels)
    assert abs(np.log(best.temperature)) > 1e-3


def test_held_out_images_are_not_seen() -> None:
    """With random labels a fit is right about its own images, and as a coin about others."""
    rng = np.random.default_rng(3)
    given = images(per_class=40)
    noise = LabelledFeatures(given.features, rng.permutation(given.labels), given.folds, C)
    found = fit_ensemble(noise, priors(), SCALE)
    right = (found.logits.argmax(axis=1) == found.labels).mean()
    assert len(found.labels) == len(given.labels)
    assert 0.1 < right < 0.42
    assert right + 0.1 < fitted_share(noise, found.classifier.logits)
    # And its probabilities say so.
    p = np.exp(found.logits - found.logits.max(axis=1, keepdims=True))
    assert (p / p.sum(axis=1, keepdims=True)).max(axis=1).mean() == pytest.approx(right, abs=0.12)


def fitted_share(given: LabelledFeatures, logits: Callable[[F32], F32]) -> float:
    return float((logits(given.features).argmax(axis=1) == given.labels).mean())


def test_priors_of_a_fold_are_used_for_that_fold_only() -> None:
    given, (plain, tuned) = images(), priors()
    good = unit(np.random.default_rng(99).standard_normal((C, E)) + 2)
    leaky = Prior("prompts", tuned.texts, np.stack([good] + [tuned.texts] * (N_FOLDS - 1)))
    honest = Prior("prompts", tuned.texts, np.stack([tuned.texts] * N_FOLDS))
    first = fit_ensemble(given, [plain, leaky], SCALE).logits[: len(given.labels) // N_FOLDS]
    other = fit_ensemble(given, [plain, honest], SCALE).logits[: len(given.labels) // N_FOLDS]
    assert not np.allclose(first, other, atol=1e-3)


@pytest.mark.parametrize("per_class", [1, 2, 3])
def test_few_images(per_class: int) -> None:
    found = fit_ensemble(images(per_class=per_class), priors(), SCALE)
    queries = images(7).features
    assert np.isfinite(found.classifier.logits(queries)).all()
    assert len(found.labels) == (0 if per_class == 1 else C * per_class)


def test_one_image_in_a_class_stays_in_every_fit() -> None:
    given = images()
    kept = (given.labels != 2) | (np.cumsum(given.labels == 2) == 1)
    fewer = given.rows(kept)
    found = fit_ensemble(fewer, priors(), SCALE)
    assert 2 not in found.labels
    assert np.isfinite(found.classifier.logits(given.features)).all()


def test_a_class_whose_images_share_a_fold_stays_in_every_fit() -> None:
    given = images()
    folds = np.where(given.labels == 1, 3, given.folds)
    one_fold = LabelledFeatures(given.features, given.labels, folds, C)
    kept = one_fold.keeping_classes().folds
    assert set(kept[given.labels == 1]) == {-1}
    np.testing.assert_array_equal(kept[given.labels != 1], given.folds[given.labels != 1])
    found = fit_ensemble(one_fold, priors(), SCALE)
    assert 1 not in found.labels
    assert np.isfinite(found.classifier.logits(given.features)).all()


def test_keys_without_a_direction_are_left_out() -> None:
    given = images()
    features = np.tile(given.features[:1], (len(given.labels), 1))
    same = LabelledFeatures(features, given.labels, given.folds, C)
    assert fit_ensemble(same, priors(), SCALE).classifier.kernel is None
    part = ensemble._KernelPart(given)
    part.whiten(0.3)
    part.keys[3] = 0
    kernel = part.kernel(1.0, np.ones((len(given.labels), C)))
    assert kernel is not None
    assert len(kernel.keys) == len(kernel.values) == len(given.labels) - 1


@pytest.mark.parametrize("what", ["all", "one class"])
def test_features_without_spread(what: str) -> None:
    given = images()
    features = given.features.copy()
    if what == "all":
        features[:] = features[:1]
    else:
        features[given.labels == 1] = features[given.labels == 1][:1]
    same = LabelledFeatures(features, given.labels, given.folds, C)
    found = fit_ensemble(same, priors(), SCALE)
    assert np.isfinite(found.classifier.logits(images(7).features)).all()
    assert np.isfinite(found.classifier.logits(features)).all()


def test_above_a_number_of_images_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    given, own = images(), priors()
    monkeypatch.setattr(ensemble, "MOST_KEYS", len(given.labels))
    assert fit_ensemble(given, own, SCALE).classifier.kernel is not None
    monkeypatch.setattr(ensemble, "MOST_KEYS", len(given.labels) - 1)
    found = fit_ensemble(given, own, SCALE)
    assert found.classifier.kernel is None
    monkeypatch.undo()
    assert ensemble.has_kernel(4096, 20, 512)
    assert not ensemble.has_kernel(4097, 20, 512)
    assert not ensemble.has_kernel(4000, 1000, 512)  # 25 MB
    members: Any = found.chosen["members"]
    assert [one["kind"] for one in members] == ["gda", "gda"]


def test_a_whitened_spread_is_even() -> None:
    given = images(per_class=200)
    features = given.features.astype(np.float64)
    white = Spread.of(features, given.labels, C).whitening(1e-9)
    moved = (features - white.centre) @ white.matrix
    means = np.stack([moved[given.labels == c].mean(axis=0) for c in range(C)])
    centred = moved - means[given.labels]
    covariance = centred.T @ centred / (len(features) - C)
    np.testing.assert_allclose(
        covariance, covariance[0, 0] * np.eye(E), atol=0.02 * covariance[0, 0]
    )
    np.testing.assert_allclose(np.linalg.norm(white(given.features), axis=1), 1, atol=1e-5)


def test_fewer_images_than_values_are_whitened_by_the_same_formula() -> None:
    features = images(per_class=2).features.astype(np.float64)
    labels = images(per_class=2).labels
    assert len(features) < E
    means = np.stack([features[labels == c].mean(axis=0) for c in range(C)])
    covariance = (features - means[labels]).T @ (features - means[labels])
    covariance *= E / np.trace(covariance)
    values, vectors = np.linalg.eigh(0.3 * covariance + 0.7 * np.eye(E))
    expected = vectors @ np.diag(values**-0.5) @ vectors.T
    found = Spread.of(features, labels, C).whitening(0.7)
    np.testing.assert_allclose(found.matrix, expected, atol=1e-5)


def test_settings_of_a_kernel_are_chosen_on_some_images_of_some_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = images(per_class=8)
    assert ensemble._few(given, priors())[0] is given
    monkeypatch.setattr(ensemble, "_MOST_TRIED", 12)
    some, own = ensemble._few(given, priors())
    assert np.bincount(some.labels).tolist() == [4, 4, 4]
    assert [one.held_out.shape for one in own] == [(N_FOLDS, 3, E)] * 2
    found = fit_ensemble(given, priors(), SCALE)
    assert len(found.labels) == len(given.labels)


def test_the_centre_itself_has_no_direction() -> None:
    white = Whitening(np.ones(E, np.float32), np.eye(E, dtype=np.float32))
    assert not white(np.ones((2, E), np.float32)).any()


def test_thinning_keeps_every_class() -> None:
    given = images(per_class=8)
    order = np.random.default_rng(0).permutation(len(given.labels))
    mixed = given.rows(order)
    fewer = mixed.thinned(12)
    assert np.bincount(fewer.labels).tolist() == [3] * C
    assert mixed.thinned(len(order)) is mixed
    labels: I64 = mixed.thinned(1).labels
    assert sorted(labels.tolist()) == list(range(C))
