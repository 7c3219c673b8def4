"""An ensemble of calibrated classifiers on image features, as one classifier.

Members are Gaussian discriminant analysis and kernel ridge regression, each on two priors: the
hand-written prompts' text features and those of a mixture of prompts fitted to the images. The
logits of each member are divided by a temperature, fitted with its settings on images that it was
not fitted to, and averaged. The mean of logarithms of probabilities is, up to a constant, the mean
of logits, so the ensemble is one affine map and one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from ztune.calibration import class_weights, fit_temperature, mean_loss
from ztune.heads import first_of_each_class, keep_whole_classes
from ztune.logits import FeatureClassifier, Kernel, Whitening
from ztune.methods.gda import ALPHAS, DEFAULT_ALPHA, gaussian_classifier
from ztune.methods.proker import residual_coefficients
from ztune.types import F32, F64, I64, Json

MOST_KEYS = 4096
"""Training images up to which the ensemble has a kernel, if it takes no more than MOST_BYTES."""
MOST_BYTES = 18_000_000
SHRINKAGES = (0.3, 0.7)
BETAS = (0.5, 1.0, 2.0, 4.0)
RIDGES = (0.1, 0.3, 1.0, 3.0)
# Without images to choose on.
_SHRINKAGE, _BETA, _RIDGE = 0.7, 1.0, 1.0
_TEMPERATURE = 1.0
_MOST_TRIED = 800  # images of a kernel while its settings are chosen
_LEAST_PER_CLASS = 4
_LEAST_JUDGED = 400  # held-out images, if there are so many
_MOST_LOGITS = 100_000  # of held-out images, per setting
_TINY = 1e-12
_HALF = 0.5  # length of a key; those at the centre of all have none


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
    """The features of n images, and the fold of each."""

    features: F32
    """f32[n, e], unit rows."""
    labels: I64
    """i64[n], every class at least once."""
    folds: I64
    """i64[n], −1 for an image that is never held out."""
    n_classes: int

    def rows(self, chosen: np.ndarray) -> LabelledFeatures:
        """Return some of the images."""
        return replace(
            self,
            features=self.features[chosen],
            labels=self.labels[chosen],
            folds=self.folds[chosen],
        )

    @property
    def n_folds(self) -> int:
        return int(self.folds.max(initial=-1)) + 1

    def thinned(self, most: int) -> LabelledFeatures:
        """Keep the first images of each class, about `most` in all."""
        if len(self.labels) <= most:
            return self
        return self.rows(first_of_each_class(self.labels, self.n_classes, most))

    def keeping_classes(self) -> LabelledFeatures:
        """Hold no class out as a whole (`keep_whole_classes`)."""
        return replace(self, folds=keep_whole_classes(self.folds, self.labels, self.n_classes))

    def held_out(self, most: int) -> LabelledFeatures:
        """Return images that have a fold, about `most` of them, spread over classes and folds."""
        with_fold = np.flatnonzero(self.folds >= 0)
        order = with_fold[np.argsort(self.labels[with_fold], kind="stable")]
        # An odd step meets all of four folds.
        step = 1 if len(order) <= most else -(-len(order) // most) | 1
        return self.rows(np.sort(order[::step]))


@dataclass(frozen=True)
class Ensemble:
    """An ensemble, what was chosen, and its logits of images that it was not fitted to."""

    classifier: FeatureClassifier
    chosen: dict[str, Json]
    logits: F32
    """f32[h, C]: calibrated out-of-fold logits; empty if nothing could be held out."""
    labels: I64
    """i64[h]"""


@dataclass(frozen=True)
class Spread:
    """The centre of some features, and the covariance within their classes."""

    centre: F64
    """f64[e]"""
    values: F64
    """f64[r]: the covariance's eigenvalues, relative to their mean; e − r more are 0."""
    vectors: F64
    """f64[e, r]"""

    @classmethod
    def of(cls, features: F64, labels: I64, n_classes: int) -> Spread:
        """Measure features f64[n, e]; without any spread all directions count as equal."""
        means = np.stack([features[labels == c].mean(axis=0) for c in range(n_classes)])
        n, e = features.shape
        centred, centre = features - means[labels], features.mean(axis=0)
        total = float((centred**2).sum())
        if total <= _TINY:
            return cls(centre, np.ones(e), np.eye(e))
        if n < e:
            _, roots, vectors = np.linalg.svd(centred, full_matrices=False)
            return cls(centre, roots**2 * e / total, vectors.T)
        values, vectors = np.linalg.eigh(centred.T @ centred * (e / total))
        return cls(centre, np.maximum(values, 0), vectors)

    def whitening(self, shrinkage: float) -> Whitening:
        """Return A = ((1 − s) Σ / v + s I)^(−½), with Σ / v the relative covariance."""
        scales = 1 / np.sqrt((1 - shrinkage) * self.values + shrinkage)
        others = 1 / np.sqrt(shrinkage)
        A = (self.vectors * (scales - others)) @ self.vectors.T
        A[np.diag_indices_from(A)] += others
        return Whitening(self.centre.astype(np.float32), A.astype(np.float32))


def has_kernel(n_images: int, n_classes: int, n_features: int) -> bool:
    """Return whether an ensemble of so many training images has a kernel."""
    n_values = n_images * (n_features + n_classes) + n_features**2
    return n_images <= MOST_KEYS and 4 * n_values <= MOST_BYTES


def fit_ensemble(images: LabelledFeatures, priors: Sequence[Prior], scale: float) -> Ensemble:
    """Fit members, settings and temperatures; `scale` multiplies cosines.

    Settings are those with the least loss on held-out images after their temperature. If nothing
    can be held out they are fixed.
    """
    found = _choose(images.keeping_classes(), priors, scale)
    W, b = gaussian_classifier(images.features, images.labels, images.n_classes)
    weight, bias = np.zeros_like(W), np.zeros_like(b)
    total = found.temperature * (len(found.gda) + len(found.kernel))
    for prior, member in zip(priors, found.gda, strict=True):
        share = 1 / (total * member.temperature)
        weight += share * (scale * prior.texts + member.setting * W)
        bias += share * member.setting * b
    kernel = None
    if found.kernel:
        part = _KernelPart(images)
        part.whiten(found.shrinkage)
        values = np.zeros((len(images.labels), images.n_classes))
        for prior, member in zip(priors, found.kernel, strict=True):
            share = 1 / (total * member.temperature)
            weight += share * scale * prior.texts
            values += share * scale * part.solve(found.beta, member.setting, [prior.texts])[0]
        kernel = part.kernel(found.beta, values)
    classifier = FeatureClassifier(weight.astype(np.float32), bias.astype(np.float32), kernel)
    return Ensemble(classifier, found.to_json(priors), found.logits, found.labels)


@dataclass(frozen=True)
class _Member:
    """A member's own setting, alpha or a ridge, and its temperature."""

    setting: float
    temperature: float = _TEMPERATURE
    loss: float = 0.0
    logits: F64 = field(default_factory=lambda: np.zeros((0, 0)))
    """f64[h, C], of the held-out images."""


@dataclass(frozen=True)
class _Choice:
    gda: list[_Member]
    """One per prior."""
    kernel: list[_Member]
    """One per prior; none above a number of images."""
    shrinkage: float
    beta: float
    temperature: float
    logits: F32
    labels: I64

    def to_json(self, priors: Sequence[Prior]) -> dict[str, Json]:
        """Return the settings by member."""
        members: list[Json] = [
            {
                "kind": kind,
                "prior": prior.name,
                name: one.setting,
                "temperature": round(one.temperature, 4),
            }
            for kind, name, own in (("gda", "alpha", self.gda), ("kernel", "ridge", self.kernel))
            for prior, one in zip(priors, own, strict=False)
        ]
        shared = {"shrinkage": self.shrinkage, "beta": self.beta} if self.kernel else {}
        return {"members": members, **shared, "temperature": round(self.temperature, 4)}


def _choose(images: LabelledFeatures, priors: Sequence[Prior], scale: float) -> _Choice:
    """Return the settings and temperatures, on held-out images if there are any."""
    n_priors, C = len(priors), images.n_classes
    with_kernel = has_kernel(len(images.labels), C, images.features.shape[1])
    if not images.n_folds:
        kernel = [_Member(_RIDGE)] * n_priors if with_kernel else []
        gda, nothing = [_Member(DEFAULT_ALPHA)] * n_priors, np.zeros((0, C), np.float32)
        return _Choice(gda, kernel, _SHRINKAGE, _BETA, 1.0, nothing, np.zeros(0, np.int64))
    judged = images.held_out(max(_LEAST_JUDGED, _MOST_LOGITS // C))
    tried, labels = _out_of_fold(images, judged, priors, partial(_gda_logits, scale))
    gda = [_least(tried, labels, p) for p in range(n_priors)]
    shrinkage, beta, kernel = _SHRINKAGE, _BETA, list[_Member]()
    if with_kernel:
        shrinkage, beta, ridges = _choose_kernel(*_few(images, priors), scale)
        # Again with all images, which make a kernel more certain.
        logits_of = partial(_kernel_logits, scale, (shrinkage,), (beta,), sorted(set(ridges)))
        tried, _ = _out_of_fold(images, judged, priors, logits_of)
        kernel = [
            _judge(tried[p, shrinkage, beta, ridges[p]], labels, ridges[p]) for p in range(n_priors)
        ]
    mean = np.mean([one.logits / one.temperature for one in (*gda, *kernel)], axis=0)
    temperature = fit_temperature(mean, labels)
    logits = (mean / temperature).astype(np.float32)
    return _Choice(gda, kernel, shrinkage, beta, temperature, logits, labels)


def _few(
    images: LabelledFeatures, priors: Sequence[Prior]
) -> tuple[LabelledFeatures, Sequence[Prior]]:
    """Return fewer images to choose a kernel's settings on: some per class, of some classes."""
    if len(images.labels) <= _MOST_TRIED:
        return images, priors
    C = max(2, min(images.n_classes, _MOST_TRIED // _LEAST_PER_CLASS))
    own = images.rows(images.labels < C)
    some = replace(own, n_classes=C).thinned(_MOST_TRIED).keeping_classes()
    return some, [Prior(one.name, one.texts[:C], one.held_out[:, :C]) for one in priors]


def _choose_kernel(
    images: LabelledFeatures, priors: Sequence[Prior], scale: float
) -> tuple[float, float, list[float]]:
    """Return shrinkage and beta for all priors, and the ridge of each."""
    if not images.n_folds:
        return _SHRINKAGE, _BETA, [_RIDGE] * len(priors)
    logits_of = partial(_kernel_logits, scale, SHRINKAGES, BETAS, RIDGES)
    tried, labels = _out_of_fold(images, images, priors, logits_of)
    pairs = {
        (s, b): [_least(tried, labels, p, s, b) for p in range(len(priors))]
        for s in SHRINKAGES
        for b in BETAS
    }
    (shrinkage, beta), best = min(pairs.items(), key=lambda item: sum(one.loss for one in item[1]))
    return shrinkage, beta, [one.setting for one in best]


_Key = tuple[float, ...]
"""A prior's index and the settings of a member, its own last."""
_Logits = Iterator[tuple[_Key, F64]]


def _out_of_fold(
    images: LabelledFeatures,
    judged: LabelledFeatures,
    priors: Sequence[Prior],
    logits_of: Callable[[LabelledFeatures, F64, list[F64]], _Logits],
) -> tuple[dict[_Key, F32], I64]:
    """Return logits f32[h, C] by setting of `judged` images by fits without them, and labels."""
    parts: dict[_Key, list[F32]] = {}
    labels = []
    for k in range(images.n_folds):
        asked, rest = judged.rows(judged.folds == k), images.rows(images.folds != k)
        texts = [prior.held_out[k] for prior in priors]
        labels.append(asked.labels)
        for key, logits in logits_of(rest, asked.features.astype(np.float64), texts):
            parts.setdefault(key, []).append(logits.astype(np.float32))
    return {key: np.concatenate(found) for key, found in parts.items()}, np.concatenate(labels)


def _gda_logits(scale: float, rest: LabelledFeatures, queries: F64, texts: list[F64]) -> _Logits:
    W, b = gaussian_classifier(rest.features, rest.labels, rest.n_classes)
    gaussian = queries @ W.T + b
    for p, own in enumerate(texts):
        for alpha in ALPHAS:
            yield (p, alpha), scale * queries @ own.T + alpha * gaussian


def _kernel_logits(
    scale: float,
    shrinkages: Sequence[float],
    betas: Sequence[float],
    ridges: Sequence[float],
    rest: LabelledFeatures,
    queries: F64,
    texts: list[F64],
) -> _Logits:
    part, narrow = _KernelPart(rest), queries.astype(np.float32)
    cosines = [queries @ own.T for own in texts]
    for shrinkage in shrinkages:
        part.whiten(shrinkage)
        distances = 1 - part.whitening(narrow).astype(np.float64) @ part.keys.T
        for beta in betas:
            k = np.exp(-beta * distances)
            for ridge in ridges:
                for p, values in enumerate(part.solve(beta, ridge, texts)):
                    yield (p, shrinkage, beta, ridge), scale * (cosines[p] + k @ values)


class _KernelPart:
    """Kernel ridge regression in whitened features: all that does not depend on the prior."""

    def __init__(self, images: LabelledFeatures):
        self._features = images.features.astype(np.float64)
        self._weights = class_weights(images.labels, images.n_classes)
        self._one_hot = np.eye(images.n_classes)[images.labels]
        self._spread = Spread.of(self._features, images.labels, images.n_classes)

    def whiten(self, shrinkage: float) -> None:
        """Set the whitening and the keys."""
        self.whitening = self._spread.whitening(shrinkage)
        self.keys = self.whitening(self._features.astype(np.float32)).astype(np.float64)

    def solve(self, beta: float, ridge: float, texts: Sequence[F64]) -> list[F64]:
        """Return the coefficients f64[n, C] of the residuals of each prior f64[C, e].

        Every class counts the same: with weights w the ridge of an image is ridge / w.
        """
        residuals = np.concatenate(
            [self._one_hot - self._features @ own.T for own in texts], axis=1
        )
        solved = residual_coefficients(self.keys, residuals, beta, ridge / self._weights)
        return np.split(solved, len(texts), axis=1)

    def kernel(self, beta: float, values: F64) -> Kernel | None:
        """Return the kernel of values f64[n, C]; None without any key that has a direction."""
        kept = np.linalg.norm(self.keys, axis=1) > _HALF
        if not kept.any():
            return None
        keys, own = self.keys[kept].astype(np.float32), values[kept].astype(np.float32)
        return Kernel(keys, own, beta, self.whitening)


def _judge(logits: F32, labels: I64, setting: float) -> _Member:
    """Return a member with its temperature and loss on held-out images."""
    wide = logits.astype(np.float64)
    temperature = fit_temperature(wide, labels)
    return _Member(setting, temperature, mean_loss(wide, labels, temperature), wide)


def _least(tried: Mapping[_Key, F32], labels: I64, *first: float) -> _Member:
    """Return the best of the settings whose key starts with `first`."""
    own = (_judge(logits, labels, key[-1]) for key, logits in tried.items() if key[:-1] == first)
    return min(own, key=lambda one: one.loss)
