"""Every head by the same rules, and each against an independent transcription of its formulas."""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from ztune.errors import ConfigError, ZtuneError
from ztune.heads import (
    Fitted,
    Predict,
    Shots,
    choose,
    stratified_folds,
)
from ztune.methods import gda, linear_probe, lp_plus, proker, tip_adapter
from ztune.methods.gda import GdaConfig, fit_gda
from ztune.methods.linear_probe import LinearProbeConfig, fit_linear_probe, logistic_regression
from ztune.methods.lp_plus import LpPlusConfig, fit_lp_plus
from ztune.methods.proker import ProkerConfig, fit_proker
from ztune.methods.tip_adapter import TipConfig, fit_tip
from ztune.methods.zero_shot import ZeroShotConfig, fit_zero_shot

Fit = Callable[[Any, Shots, int], Fitted]

C, E = 4, 12
HEADS: dict[str, tuple[Any, Fit]] = {
    "zero-shot": (ZeroShotConfig, fit_zero_shot),
    "gda": (GdaConfig, fit_gda),
    "tip": (TipConfig, fit_tip),
    "proker": (ProkerConfig, fit_proker),
    "lp++": (LpPlusConfig, fit_lp_plus),
    "linear probe": (LinearProbeConfig, fit_linear_probe),
}
FITTED = {name: head for name, head in HEADS.items() if name != "zero-shot"}
every_head = pytest.mark.parametrize(("config", "fit"), HEADS.values(), ids=HEADS)
every_fitted_head = pytest.mark.parametrize(("config", "fit"), FITTED.values(), ids=FITTED)


def unit(rows: np.ndarray) -> np.ndarray:
    normalised = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(normalised.astype(np.float32))


def images(n_per_class: int, seed: int, spread: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    """Return unit features in a cone, as a model's are, around one direction a class."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(C, dtype=np.int64), n_per_class)
    noise = spread * rng.standard_normal((len(labels), E))
    return unit(np.eye(C, E)[labels] + np.eye(E)[-1] + noise), labels


def poor_texts() -> np.ndarray:
    """Texts that name each class's neighbour a little louder than the class."""
    near = np.eye(C, E) + 1.5 * np.roll(np.eye(C, E), 1, axis=0)
    return unit(near + 0.3 * np.random.default_rng(1).standard_normal((C, E)))


def make(n_per_class: int = 8, validation: bool = True, n_views: int = 1) -> Shots:
    features, labels = images(n_per_class, 2)
    if n_views > 1:
        noise = 0.05 * np.random.default_rng(3).standard_normal((n_views, *features.shape))
        features = unit((features + noise).reshape(-1, E))
    held_out = images(4, 4) if validation else None
    labels = np.tile(labels, n_views)
    return Shots(features, labels, poor_texts(), 20.0, -3.0, held_out, n_views)


def arrays_of(shots: Shots) -> list[np.ndarray]:
    held_out = () if shots.held_out is None else shots.held_out
    return [shots.features, shots.labels, shots.text_features, *held_out]


CASES = {
    "validation": make(),
    "cross-validation": make(validation=False),
    "two shots": make(2, validation=False),
    "one shot": make(1, validation=False),
    "one shot and validation": make(1),
    "views": make(validation=False, n_views=3),
    "one shot with views": make(1, validation=False, n_views=3),
    "a class with one image": replace(
        make(validation=False),
        features=images(8, 2)[0][7:],
        labels=images(8, 2)[1][7:],
    ),
}


@every_head
@pytest.mark.parametrize("case", CASES)
def test_every_head_gives_a_finite_classifier_and_leaves_its_inputs(
    config: Any, fit: Fit, case: str
) -> None:
    shots = CASES[case]
    before = [array.copy() for array in arrays_of(shots)]
    for array in arrays_of(shots):
        array.setflags(write=False)
    fitted = fit(config(), shots, 1)
    for array, copy in zip(arrays_of(shots), before, strict=True):
        np.testing.assert_array_equal(array, copy)
    classifier = fitted.classifier
    assert classifier.weight.shape == (C, E)
    assert classifier.bias.shape == (C,)
    parts = [classifier.weight, classifier.bias]
    if classifier.kernel is not None:
        n_images = len(shots.labels) // shots.n_views
        assert classifier.kernel.keys.shape == (n_images, E)
        assert classifier.kernel.values.shape == (n_images, C)
        assert math.isfinite(classifier.kernel.sharpness)
        np.testing.assert_allclose(np.linalg.norm(classifier.kernel.keys, axis=1), 1, atol=1e-6)
        parts += [classifier.kernel.keys, classifier.kernel.values]
    for part in parts:
        assert part.dtype == np.float32
        assert np.isfinite(part).all()
    logits = classifier.logits(images(5, 9)[0])
    assert logits.dtype == np.float32
    assert logits.shape == (5 * C, C)
    assert set(fitted.chosen) == {part.name for part in fields(config)}
    assert all(type(value) in (float, int, str) for value in fitted.chosen.values())


@every_head
def test_the_same_seed_gives_the_same_bytes(config: Any, fit: Fit) -> None:
    shots = CASES["views"]
    first, second = fit(config(), shots, 3), fit(config(), shots, 3)
    assert first.chosen == second.chosen
    f = images(5, 9)[0]
    assert first.classifier.logits(f).tobytes() == second.classifier.logits(f).tobytes()


@every_fitted_head
@pytest.mark.parametrize("validation", [True, False])
def test_every_head_mends_poor_texts(config: Any, fit: Fit, validation: bool) -> None:
    shots = make(16, validation)
    test, truth = images(100, 5)

    def accuracy(fitted: Fitted) -> float:
        return float((fitted.classifier.logits(test).argmax(1) == truth).mean())

    zero_shot = accuracy(fit_zero_shot(ZeroShotConfig(), shots, 1))
    assert zero_shot < 0.5
    assert accuracy(fit(config(), shots, 1)) > max(0.8, zero_shot + 0.3)


SET: dict[str, Any] = {
    "gda": GdaConfig(alpha=2.0),
    "tip": TipConfig(alpha=2.0, beta=3.0),
    "proker": ProkerConfig(beta=3.0, ridge=0.5, scale=7.0),
    "lp++": LpPlusConfig(iterations=7),
    "linear probe": LinearProbeConfig(C=2.0),
}


@pytest.mark.parametrize("name", SET)
def test_what_is_set_is_used_and_then_validation_images_are_not(name: str) -> None:
    fit = HEADS[name][1]
    shots = make()
    with_validation, without = (
        fit(SET[name], s, 1) for s in (shots, replace(shots, held_out=None))
    )
    assert dict(with_validation.chosen) == {
        part.name: getattr(SET[name], part.name) for part in fields(SET[name])
    }
    f = images(5, 9)[0]
    np.testing.assert_array_equal(
        with_validation.classifier.logits(f), without.classifier.logits(f)
    )


@pytest.mark.parametrize("name", SET)
def test_validation_images_choose_and_are_not_fitted(name: str) -> None:
    config, fit = HEADS[name]
    shots = make()
    chosen = fit(config(), shots, 1)
    again = fit(config(**chosen.chosen), replace(shots, held_out=None), 1)
    f = images(5, 9)[0]
    np.testing.assert_array_equal(chosen.classifier.logits(f), again.classifier.logits(f))


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (TipConfig, "alpha", -1.0),
        (TipConfig, "beta", 0.0),
        (ProkerConfig, "ridge", 0.0),
        (ProkerConfig, "beta", math.inf),
        (ProkerConfig, "scale", -2.0),
        (LinearProbeConfig, "C", math.nan),
        (LinearProbeConfig, "C", 1e300),
        (LinearProbeConfig, "C", 1e-300),
        (ProkerConfig, "beta", 1e30),
        (ProkerConfig, "beta", 1e-30),
        (ProkerConfig, "ridge", 1e300),
        (ProkerConfig, "ridge", 1e-300),
        (ProkerConfig, "scale", 1e38),
        (TipConfig, "alpha", 1e38),
        (TipConfig, "beta", 1e38),
        (GdaConfig, "alpha", 1e300),
        (LpPlusConfig, "iterations", -1),
    ],
)
def test_impossible_settings_are_refused(config: Any, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} is "):
        config(**{name: value})


EXTREMES = [
    *(TipConfig(alpha, beta) for alpha in (0.0, 1e-6, 1e6) for beta in (1e-6, 1e6)),
    *(ProkerConfig(b, r, s) for b in (1e-6, 1e6) for r in (1e-6, 1e6) for s in (1e-6, 1e6)),
    *(LinearProbeConfig(strength) for strength in (1e-6, 1e6)),
    *(GdaConfig(alpha) for alpha in (0.0, 1e-6, 1e6)),
]


@pytest.mark.parametrize("config", EXTREMES, ids=repr)
@pytest.mark.parametrize("case", ["one shot", "views", "validation"])
def test_the_most_extreme_settings_give_finite_logits(config: Any, case: str) -> None:
    fit = next(fit for kind, fit in HEADS.values() if kind is type(config))
    shots = CASES[case]
    for f in (shots.features, images(5, 9)[0]):
        assert np.isfinite(fit(config, shots, 1).classifier.logits(f)).all()


@pytest.mark.parametrize(
    ("module", "solver", "name"),
    [
        (linear_probe, "cholesky", "linear probe"),
        (proker, "solve", "proker"),
        (lp_plus, "eigvalsh", "lp++"),
        (gda, "solve", "gda"),
    ],
)
def test_a_system_without_solution_is_one_line(
    module: Any, solver: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise np.linalg.LinAlgError("Singular matrix")

    config, fit = HEADS[name]
    monkeypatch.setattr(module.np.linalg, solver, fail)
    with pytest.raises(ZtuneError, match=r"cannot be fitted.*\(Singular matrix\)"):
        fit(config(), make(), 1)


# Selection


def answers(right: list[bool]) -> Callable[[Shots], Predict]:
    """Return a fit whose i-th setting is right on every image, or wrong on every one."""

    def fit(training: Shots) -> Predict:
        def predict(features: np.ndarray) -> Iterator[np.ndarray]:
            truth = features[:, :C].argmax(axis=1)
            for is_right in right:
                yield np.eye(C)[truth if is_right else (truth + 1) % C]

        return predict

    return fit


def test_the_first_of_the_best_settings_is_chosen() -> None:
    shots = replace(make(), held_out=images(4, 4, spread=0.01))
    assert choose("abcd", "z", answers([False, True, True, False]), shots, 1) == "b"


def test_nothing_is_judged_where_nothing_can_be_held_out() -> None:
    shots = make(1, validation=False)
    assert choose("abc", "z", answers([True] * 3), shots, 1) == "z"
    assert choose("a", "z", answers([True]), shots, 1) == "a"


@pytest.mark.parametrize("n_views", [1, 3])
def test_no_image_is_judged_by_a_fit_that_has_seen_one_of_its_views(n_views: int) -> None:
    shots = make(6, validation=False, n_views=n_views)
    rows = {row.tobytes(): i for i, row in enumerate(shots.features)}
    n_images = len(shots.labels) // n_views
    judged: list[int] = []

    def fit(training: Shots) -> Predict:
        assert training.held_out is None
        seen = {rows[row.tobytes()] % n_images for row in training.features}
        assert len(seen) * n_views == len(training.labels)
        first = training.features[: len(seen)], training.labels[: len(seen)]
        for view in range(n_views):  # the order that `images` relies on
            part = slice(view * len(seen), (view + 1) * len(seen))
            here = [rows[row.tobytes()] % n_images for row in training.features[part]]
            assert here == [rows[row.tobytes()] for row in first[0]]
            np.testing.assert_array_equal(training.labels[part], first[1])

        def predict(features: np.ndarray) -> Iterator[np.ndarray]:
            indices = [rows[row.tobytes()] for row in features.astype(np.float32)]
            assert not seen & {i % n_images for i in indices}
            judged.extend(indices)
            for _ in range(2):
                yield np.zeros((len(features), C))

        return predict

    assert choose("ab", "z", fit, shots, 1) == "a"
    assert sorted(judged) == list(range(len(shots.labels)))
    folds = stratified_folds(shots, 1)
    assert folds is not None
    for c in range(C):
        counts = np.bincount(folds[shots.labels[:n_images] == c], minlength=4)
        assert counts.max() - counts.min() <= 1


# Each head against its formulas


def test_zero_shot_is_the_scaled_cosine() -> None:
    shots = make()
    f = images(3, 9)[0]
    got = fit_zero_shot(ZeroShotConfig(), shots, 1).classifier.logits(f)
    expected = [[20 * float(np.dot(x, t)) - 3 for t in shots.text_features] for x in f]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_tip_against_a_loop_over_images() -> None:
    shots = make(3, n_views=2)
    alpha, beta = 1.5, 4.0
    got = fit_tip(TipConfig(alpha, beta), shots, 1).classifier
    x = shots.features.astype(np.float64)
    n = len(x) // 2
    for f in images(3, 9)[0].astype(np.float64):
        logits = [20 * f @ t - 3 for t in shots.text_features.astype(np.float64)]
        for i in range(n):
            key = (x[i] + x[n + i]) / np.linalg.norm(x[i] + x[n + i])
            logits[shots.labels[i]] += alpha * math.exp(-beta * (1 - f @ key))
        np.testing.assert_allclose(
            got.logits(f[None].astype(np.float32))[0], logits, rtol=1e-4, atol=1e-4
        )


def test_tip_without_votes_is_zero_shot() -> None:
    shots, f = make(), images(5, 9)[0]
    got = fit_tip(TipConfig(alpha=0.0, beta=1.0), shots, 1).classifier.logits(f)
    zero_shot = fit_zero_shot(ZeroShotConfig(), shots, 1).classifier.logits(f)
    np.testing.assert_array_equal(got, zero_shot)


def test_tip_falls_back_to_the_papers_settings() -> None:
    chosen = fit_tip(TipConfig(), make(1, validation=False), 1).chosen
    assert chosen == {"alpha": 1.0, "beta": 5.5}
    half = fit_tip(TipConfig(beta=2.0), make(1, validation=False), 1).chosen
    assert half == {"alpha": 1.0, "beta": 2.0}


def test_proker_minimises_what_it_says() -> None:
    shots = make(3)
    beta, ridge, scale = 2.0, 0.3, 8.0
    fitted = fit_proker(ProkerConfig(beta, ridge, scale), shots, 1)
    x, t = shots.features.astype(np.float64), shots.text_features.astype(np.float64)
    n = len(x)
    K = np.array([[math.exp(-beta * (1 - a @ b)) for b in x] for a in x])
    f0, Y = x @ t.T, np.array([[float(c == y) for c in range(C)] for y in shots.labels])
    assert fitted.classifier.kernel is not None
    A = fitted.classifier.kernel.values.astype(np.float64) / scale

    def objective(A: np.ndarray) -> float:
        return float(((f0 + K @ A - Y) ** 2).sum() + ridge * np.trace(A.T @ K @ A))

    least = objective(A)
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert objective(A + 1e-2 * rng.standard_normal((n, C))) > least
    # The eigenvectors of K give the same solution without an inverse.
    eigenvalues, Q = np.linalg.eigh(K)
    f = images(4, 9)[0]
    k = np.array([[math.exp(-beta * (1 - a @ b)) for b in x] for a in f.astype(np.float64)])
    shrunken = (Q.T @ (Y - f0)) / (eigenvalues + ridge)[:, None]
    expected = scale * (f.astype(np.float64) @ t.T + k @ Q @ shrunken) - 3
    np.testing.assert_allclose(fitted.classifier.logits(f), expected, rtol=1e-4, atol=1e-4)


def test_proker_with_a_ridge_without_bound_is_zero_shot() -> None:
    shots, f = make(), images(5, 9)[0]
    config = ProkerConfig(beta=2.0, ridge=1e6, scale=shots.logit_scale)
    got = fit_proker(config, shots, 1).classifier.logits(f)
    zero_shot = fit_zero_shot(ZeroShotConfig(), shots, 1).classifier.logits(f)
    np.testing.assert_allclose(got, zero_shot, atol=1e-3)


def test_proker_with_a_ridge_of_nothing_repeats_the_labels() -> None:
    shots = make(3)
    config = ProkerConfig(beta=5.0, ridge=1e-6, scale=1.0)
    got = fit_proker(config, shots, 1).classifier.logits(shots.features) - shots.logit_bias
    np.testing.assert_allclose(got, np.eye(C)[shots.labels], atol=1e-3)


def test_proker_chooses_on_a_part_of_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    solve = proker.residual_coefficients

    def counted(keys: np.ndarray, *rest: Any) -> np.ndarray:
        sizes.append(len(keys))
        return solve(keys, *rest)

    monkeypatch.setattr(proker, "residual_coefficients", counted)
    monkeypatch.setattr(proker, "_MOST", 3 * C + 1)
    fit_proker(ProkerConfig(), make(8), 1)
    assert set(sizes[:-1]) == {3 * C}
    assert sizes[-1] == 8 * C
    keys, labels = proker._thinned(*make(8).images, C)
    np.testing.assert_array_equal(np.bincount(labels), 3)
    expected = np.concatenate([images(8, 2)[0][8 * c : 8 * c + 3] for c in range(C)])
    np.testing.assert_allclose(keys, expected, atol=1e-6)


def loss_of(shots: Shots, w: np.ndarray, alpha: np.ndarray) -> float:
    """The mean cross-entropy of f (w + α t), image by image."""
    total = 0.0
    for f, y in zip(shots.features.astype(np.float64), shots.labels, strict=True):
        logits = [
            float(f @ (w[k] + alpha[k] * shots.text_features[k].astype(np.float64)))
            for k in range(C)
        ]
        total += math.log(sum(math.exp(v) for v in logits)) - logits[y]
    return total / len(shots.labels)


def test_lp_plus_starts_as_published() -> None:
    shots = replace(make(3), logit_scale=100.0)
    probe = lp_plus.start(shots)
    x, t = shots.features.astype(np.float64), shots.text_features.astype(np.float64)
    own = []
    for c in range(C):
        np.testing.assert_allclose(probe.w[c], x[shots.labels == c].mean(0))
        own.append(np.mean([x[i] @ t[c] for i in np.flatnonzero(shots.labels == c)]))
    np.testing.assert_allclose(probe.alpha, 250 * np.mean(own))


def test_lp_plus_steps_are_gradient_steps_of_one_over_the_bound() -> None:
    shots = make(3)
    probe = lp_plus.start(shots)
    w, alpha = probe.w.copy(), probe.alpha.copy()
    assert probe.loss() == pytest.approx(loss_of(shots, w, alpha))
    x, t = shots.features.astype(np.float64), shots.text_features.astype(np.float64)
    n, h = len(x), 1e-6
    probe.descend()
    w_bound = 0.5 * np.linalg.norm(x, ord=2) ** 2 / n
    gradient = np.empty_like(w)
    for index in np.ndindex(*w.shape):
        d = np.zeros_like(w)
        d[index] = h
        gradient[index] = (loss_of(shots, w + d, alpha) - loss_of(shots, w - d, alpha)) / (2 * h)
    np.testing.assert_allclose(probe.w, w - gradient / w_bound, atol=1e-6)
    for k in range(C):
        d = h * np.eye(C)[k]
        slope = (loss_of(shots, probe.w, alpha + d) - loss_of(shots, probe.w, alpha - d)) / (2 * h)
        bound = 0.5 * np.mean([(f @ t[k]) ** 2 for f in x])
        assert probe.alpha[k] == pytest.approx(alpha[k] - slope / bound, abs=1e-5)


@pytest.mark.parametrize("logit_scale", [1.0, 20.0, 1000.0])
def test_the_loss_of_lp_plus_never_rises(logit_scale: float) -> None:
    probe = lp_plus.start(replace(make(3), logit_scale=logit_scale))
    losses = [probe.loss()]
    for _ in range(300):
        probe.descend()
        losses.append(probe.loss())
    assert (np.diff(losses) <= 1e-12).all()
    assert losses[-1] < losses[0]


def test_lp_plus_in_chunks_is_lp_plus(monkeypatch: pytest.MonkeyPatch) -> None:
    shots = make(3)
    whole = fit_lp_plus(LpPlusConfig(20), shots, 1).classifier
    monkeypatch.setattr(lp_plus, "_ROWS", 5)
    parts = fit_lp_plus(LpPlusConfig(20), shots, 1).classifier
    np.testing.assert_allclose(parts.weight, whole.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
def test_the_linear_probe_stands_where_its_gradient_vanishes(strength: float) -> None:
    features, labels = images(6, 2)
    theta = logistic_regression(features, labels, C, strength)
    W, b = theta[:, :-1], theta[:, -1]
    gradient_W, gradient_b = W.copy(), np.zeros(C)
    start = 0.0
    for f, y in zip(features.astype(np.float64), labels, strict=True):
        exponentials = np.exp(W @ f + b)
        p = exponentials / exponentials.sum()
        for k in range(C):
            residual = p[k] - float(k == y)
            gradient_W[k] += strength * residual * f
            gradient_b[k] += strength * residual
        start += strength * float(np.abs(1 / C - np.eye(C)[y]).sum())
    assert np.abs(gradient_W).max() < 1e-5 * start
    assert np.abs(gradient_b).max() < 1e-5 * start


def test_the_linear_probe_is_scikit_learns() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    features, labels = images(6, 2)
    theta = logistic_regression(features, labels, C, 3.0)
    reference = sklearn.LogisticRegression(C=3.0, tol=1e-10, max_iter=10_000)
    reference.fit(features.astype(np.float64), labels)
    np.testing.assert_allclose(theta[:, :-1], reference.coef_, atol=1e-4)
    # scikit-learn's biases may differ from these by one number for all classes.
    difference = theta[:, -1] - reference.intercept_
    np.testing.assert_allclose(difference, difference.mean(), atol=1e-4)


def test_a_weak_linear_probe_says_how_frequent_classes_are() -> None:
    features, labels = images(8, 2)
    kept = np.r_[0:8, 8:10, 16:20, 24:26]
    theta = logistic_regression(features[kept], labels[kept], C, 1e-7)
    p = np.exp(theta[:, -1])
    np.testing.assert_allclose(p / p.sum(), np.array([8, 2, 4, 2]) / 16, atol=1e-4)


def test_the_linear_probe_does_not_look_at_texts() -> None:
    shots = make()
    other = replace(shots, text_features=unit(np.ones((C, E))), logit_scale=3.0)
    for a, b in zip(
        *(
            vars(fit_linear_probe(LinearProbeConfig(), s, 1).classifier).values()
            for s in (shots, other)
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_a_warm_start_ends_where_a_cold_one_does() -> None:
    features, labels = images(6, 2)
    cold = logistic_regression(features, labels, C, 10.0)
    first = logistic_regression(features, labels, C, 0.1)
    warm = logistic_regression(features, labels, C, 10.0, first)
    np.testing.assert_allclose(warm, cold, atol=1e-4)


def test_grids_hold_their_defaults() -> None:
    assert tip_adapter.DEFAULT_ALPHA in tip_adapter.ALPHAS
    assert tip_adapter.DEFAULT_BETA in tip_adapter.BETAS
    assert proker.DEFAULT_BETA in proker.BETAS
    assert proker.DEFAULT_RIDGE in proker.RIDGES
    assert any(math.isclose(linear_probe.DEFAULT_C, c) for c in linear_probe.CS)
