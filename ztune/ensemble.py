"""An ensemble of calibrated classifiers on image features, as one classifier.

Members are Gaussian discriminant analysis and kernel ridge regression, each on two priors: the
hand-written prompts' text features and those of a mixture of prompts fitted to the images. The
logits of each member are divided by a temperature, fitted with its settings on images that it was
not fitted to, and averaged. The mean of logarithms of probabilities is, up to a constant, the mean
of logits, so the ensemble is one affine map and one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ztune.calibration import fit_temperature, mean_loss, smoothed_targets
from ztune.logits import FeatureClassifier, Kernel, Whitening
from ztune.methods.gda import ALPHAS, DEFAULT_ALPHA, gaussian_classifier
from ztune.methods.proker import residual_coefficients
from ztune.types import F32, F64, I64, Json

MOST_KEYS = 4096
"""Training images up to which the ensemble has a kernel."""
SHRINKAGES = (0.3, 0.7)
BETAS = (0.5, 1.0, 2.0, 4.0)
RIDGES = (0.1, 0.3, 1.0, 3.0)
# Without images to choose on.
_SHRINKAGE, _BETA, _RIDGE = 0.7, 1.0, 1.0
_TEMPERATURE = 2.0
_MOST_TRIED = 1600  # images of a kernel while its settings are chosen
_MOST_LOGITS = 500_000  # of held-out images, per setting
_TINY = 1e-12


@dataclass(frozen=True)
class Prior:
    """Text features that members start from."""

    name: str
    texts: F64
    """f64[C, e]"""
    held_out: F64
    """f64[F, C, e]: those fitted without each fold; the same for texts that saw no images."""


@dataclass(frozen=True)
class LabelledFeatures:
    """The views of n images, and the fold of each image, all of its views in one."""

    features: F32
    """f32[V, n, e], unit rows."""
    labels: I64
    """i64[n], every class at least once."""
    folds: I64
    """i64[n], −1 for an image that is never held out."""
    n_classes: int

    def rows(self, chosen: np.ndarray) -> LabelledFeatures:
        """Return some of the images."""
        return LabelledFeatures(
            self.features[:, chosen], self.labels[chosen], self.folds[chosen], self.n_classes
        )

    @property
    def n_folds(self) -> int:
        return int(self.folds.max(initial=-1)) + 1

    @property
    def each_view(self) -> tuple[F32, I64]:
        """Rows f32[V n, e] and their labels."""
        n_views, _, e = self.features.shape
        return self.features.reshape(-1, e), np.tile(self.labels, n_views)

    @property
    def means(self) -> F64:
        """Unit rows f64[n, e], the mean direction of each image's views."""
        mean = self.features.astype(np.float64).mean(axis=0)
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        return np.asarray(mean)

    def thinned(self, most: int) -> LabelledFeatures:
        """Keep the first images of each class, about `most` in all."""
        if len(self.labels) <= most:
            return self
        per_class = max(1, most // self.n_classes)
        order = np.argsort(self.labels, kind="stable")
        starts = np.searchsorted(self.labels[order], np.arange(self.n_classes))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order)) - starts[self.labels[order]]
        return self.rows(rank < per_class)


@dataclass(frozen=True)
class Ensemble:
    """An ensemble, what was chosen, and its logits of images that it was not fitted to."""

    classifier: FeatureClassifier
    chosen: dict[str, Json]
    logits: F32
    """f32[h, C]: calibrated out-of-fold logits; empty if nothing could be held out."""
    labels: I64
    """i64[h]"""


def whitening_of(features: F64, labels: I64, n_classes: int, shrinkage: float) -> Whitening:
    """Return the whitening by the covariance within classes, shrunk towards its mean variance.

    A = ((1 − s) Σ / v + s I)^(−½) with v = tr(Σ)/e; the identity if classes have no spread.
    """
    means = np.stack([features[labels == c].mean(axis=0) for c in range(n_classes)])
    centred = features - means[labels]
    covariance = centred.T @ centred / max(len(features) - n_classes, 1)
    e = len(covariance)
    variance = float(np.trace(covariance)) / e
    centre = features.mean(axis=0).astype(np.float32)
    if variance <= _TINY:
        return Whitening(centre, np.eye(e, dtype=np.float32))
    values, vectors = np.linalg.eigh(covariance / variance)
    scales = 1 / np.sqrt((1 - shrinkage) * np.maximum(values, 0) + shrinkage)
    return Whitening(centre, ((vectors * scales) @ vectors.T).astype(np.float32))


def fit_ensemble(images: LabelledFeatures, priors: Sequence[Prior], scale: float) -> Ensemble:
    """Fit members, settings and temperatures; `scale` multiplies cosines.

    Settings are those with the least loss on held-out images after their temperature. If nothing
    can be held out they are fixed.
    """
    with_kernel = len(images.labels) <= MOST_KEYS
    found = _choose(images, priors, scale, with_kernel=with_kernel)
    W, b = gaussian_classifier(*images.each_view, images.n_classes)
    weight, bias = np.zeros_like(W), np.zeros_like(b)
    total = found.temperature * (len(found.gda) + len(found.kernel))
    for prior, member in zip(priors, found.gda, strict=True):
        share = 1 / (total * member.temperature)
        weight += share * (scale * prior.texts + member.setting * W)
        bias += share * member.setting * b
    kernel = None
    if with_kernel:
        part = _KernelPart(images, found.shrinkage)
        values = np.zeros((len(images.labels), images.n_classes))
        for prior, member in zip(priors, found.kernel, strict=True):
            share = 1 / (total * member.temperature)
            weight += share * scale * prior.texts
            values += share * scale * part.solve(found.beta, member.setting, [prior.texts])[0]
        keys = part.keys.astype(np.float32)
        kernel = Kernel(keys, values.astype(np.float32), found.beta, part.whitening)
    classifier = FeatureClassifier(weight.astype(np.float32), bias.astype(np.float32), kernel)
    return Ensemble(classifier, found.to_json(priors), found.logits, found.labels)


@dataclass(frozen=True)
class _Setting:
    """A member's setting (alpha, or a ridge) and temperature."""

    setting: float
    temperature: float
    loss: float = 0.0
    logits: F32 = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """f32[h, C], of the held-out images."""


@dataclass(frozen=True)
class _Choice:
    gda: list[_Setting]
    kernel: list[_Setting]
    """Empty without a kernel."""
    shrinkage: float
    beta: float
    temperature: float
    logits: F32
    labels: I64

    def to_json(self, priors: Sequence[Prior]) -> dict[str, Json]:
        """Return the settings by member."""
        members: list[Json] = []
        for kind, name, settings in (("gda", "alpha", self.gda), ("kernel", "ridge", self.kernel)):
            for prior, one in zip(priors, settings, strict=False):
                members.append(
                    {
                        "kind": kind,
                        "prior": prior.name,
                        name: one.setting,
                        "temperature": round(one.temperature, 4),
                    }
                )
        shared = {"shrinkage": self.shrinkage, "beta": self.beta} if self.kernel else {}
        return {"members": members, **shared, "temperature": round(self.temperature, 4)}


class _KernelPart:
    """Kernel ridge regression in whitened features: all that does not depend on the prior."""

    def __init__(self, images: LabelledFeatures, shrinkage: float):
        self._features = images.means
        self._one_hot = np.eye(images.n_classes)[images.labels]
        self.whitening = whitening_of(self._features, images.labels, images.n_classes, shrinkage)
        self.keys = self.whitening(self._features.astype(np.float32)).astype(np.float64)

    def solve(self, beta: float, ridge: float, priors: Sequence[F64]) -> list[F64]:
        """Return the coefficients f64[n, C] of the residuals of each prior f64[C, e]."""
        residuals = [self._one_hot - self._features @ texts.T for texts in priors]
        solved = residual_coefficients(self.keys, np.concatenate(residuals, axis=1), beta, ridge)
        return np.split(solved, len(priors), axis=1)


def _choose(
    images: LabelledFeatures, priors: Sequence[Prior], scale: float, *, with_kernel: bool
) -> _Choice:
    """Return the settings and temperatures, on held-out images if there are any."""
    n_priors = len(priors)
    if not images.n_folds:
        gda = [_Setting(DEFAULT_ALPHA, _TEMPERATURE)] * n_priors
        kernel = [_Setting(_RIDGE, _TEMPERATURE)] * n_priors if with_kernel else []
        nothing = np.zeros((0, images.n_classes), np.float32)
        return _Choice(gda, kernel, _SHRINKAGE, _BETA, 1.0, nothing, np.zeros(0, np.int64))
    judged = images.thinned(max(images.n_classes, _MOST_LOGITS // images.n_classes))
    judged = judged.rows(judged.folds >= 0)
    labels = np.concatenate(
        [judged.rows(judged.folds == k).each_view[1] for k in range(images.n_folds)]
    )
    tried: dict[tuple[str, int, tuple[float, ...]], list[F32]] = {}
    for k in range(images.n_folds):
        rest = images.rows(images.folds != k)
        queries, _ = judged.rows(judged.folds == k).each_view
        texts = [prior.held_out[k] for prior in priors]
        for key, logits in _fold_logits(rest, queries, texts, scale, with_kernel=with_kernel):
            tried.setdefault(key, []).append(logits.astype(np.float32))
    judgements = {key: _judge(key[2][-1], parts, labels) for key, parts in tried.items()}
    del tried
    gda = [
        _least(one for (kind, i, _), one in judgements.items() if (kind, i) == ("gda", p))
        for p in range(n_priors)
    ]
    shrinkage, beta, kernel = _SHRINKAGE, _BETA, list[_Setting]()
    if with_kernel:
        pairs = {
            (s, b): [
                _least(
                    one
                    for (kind, i, own), one in judgements.items()
                    if (kind, i, own[:2]) == ("kernel", p, (s, b))
                )
                for p in range(n_priors)
            ]
            for s in SHRINKAGES
            for b in BETAS
        }
        (shrinkage, beta), kernel = min(
            pairs.items(), key=lambda item: sum(one.loss for one in item[1])
        )
    scaled = [one.logits.astype(np.float64) / one.temperature for one in (*gda, *kernel)]
    mean = np.asarray(np.mean(scaled, axis=0))
    temperature = fit_temperature(mean, labels)
    return _Choice(
        gda, kernel, shrinkage, beta, temperature, (mean / temperature).astype(np.float32), labels
    )


def _fold_logits(
    rest: LabelledFeatures,
    queries: F32,
    priors: Sequence[F64],
    scale: float,
    *,
    with_kernel: bool,
) -> Iterator[tuple[tuple[str, int, tuple[float, ...]], F64]]:
    """Yield the logits f64[q, C] of held-out features f32[q, e] for each family, prior, setting."""
    wide = queries.astype(np.float64)
    cosines = [wide @ texts.T for texts in priors]
    W, b = gaussian_classifier(*rest.each_view, rest.n_classes)
    gaussian = wide @ W.T + b
    for p, own in enumerate(cosines):
        for alpha in ALPHAS:
            yield ("gda", p, (alpha,)), scale * own + alpha * gaussian
    if not with_kernel:
        return
    fewer = rest.thinned(_MOST_TRIED)
    for shrinkage in SHRINKAGES:
        part = _KernelPart(fewer, shrinkage)
        distances = 1 - part.whitening(queries).astype(np.float64) @ part.keys.T
        for beta in BETAS:
            k = np.exp(-beta * distances)
            for ridge in RIDGES:
                for p, values in enumerate(part.solve(beta, ridge, priors)):
                    yield (
                        ("kernel", p, (shrinkage, beta, ridge)),
                        scale * (cosines[p] + k @ values),
                    )


def _judge(setting: float, parts: list[F32], labels: I64) -> _Setting:
    """Return a setting with its temperature and loss on all held-out images."""
    logits = np.concatenate(parts)
    wide = logits.astype(np.float64)
    temperature = fit_temperature(wide, labels)
    loss = mean_loss(wide, smoothed_targets(labels, wide.shape[1]), temperature)
    return _Setting(setting, temperature, loss, logits)


def _least(settings: Iterator[_Setting]) -> _Setting:
    return min(settings, key=lambda one: one.loss)
