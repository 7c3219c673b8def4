"""Temperatures: one number by which a classifier's logits are divided to give probabilities.

Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2.
"""

from __future__ import annotations

import numpy as np

from ztune.types import F64, I64

COLDEST, HOTTEST = 1e-3, 1e3
_ENOUGH = 1e-4  # of the logarithm


def smoothed_targets(labels: I64, n_classes: int) -> F64:
    """Return the targets f64[n, C], which keep a little probability for the other classes.

    The label has (n + 1) / (n + 2), as in Platt, "Probabilistic Outputs for Support Vector
    Machines", 1999, section 2.2; without it, images that are all right have no finite temperature.
    """
    n = len(labels)
    targets = np.full((n, n_classes), 1 / ((n + 2) * (n_classes - 1)))
    targets[np.arange(n), labels] = (n + 1) / (n + 2)
    return targets


def class_weights(labels: I64, n_classes: int) -> F64:
    """Return weights f64[n] of mean 1 with which every class that occurs counts the same."""
    counts = np.bincount(labels, minlength=n_classes)
    return np.asarray(len(labels) / (np.count_nonzero(counts) * counts[labels]))


def log_prior_ratios(labels: I64, n_classes: int) -> F64:
    """Return log(n_c C / n), f64[C], of the labels i64[n] of all C classes.

    Every class counts the same in all fits; added to logarithms of probabilities, these make
    classes as probable as they are frequent among the labels.
    """
    counts = np.bincount(labels, minlength=n_classes)
    return np.asarray(np.log(counts * n_classes / len(labels)))


def mean_loss(logits: F64, labels: I64, temperature: float = 1.0) -> float:
    """Return the mean cross-entropy in nats of logits f64[n, C], mean over the classes.

    Targets are those of `smoothed_targets`.
    """
    C = logits.shape[1]
    scaled = logits / temperature
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    losses = np.log(np.exp(scaled).sum(axis=1)) - (smoothed_targets(labels, C) * scaled).sum(axis=1)
    return float((class_weights(labels, C) * losses).mean())


def fit_temperature(logits: F64, labels: I64) -> float:
    """Return the temperature with the least `mean_loss` on held-out logits f64[n, C].

    The loss is convex in 1/T; Newton's method is guarded by bisection.

    Example:
        >>> import numpy as np
        >>> logits = np.array([[9.0, 0.0], [9.0, 0.0], [9.0, 0.0], [9.0, 0.0]])
        >>> 5 < fit_temperature(logits, np.array([0, 0, 0, 1])) < 30
        True

    """
    C = logits.shape[1]
    targets, weights = smoothed_targets(labels, C), class_weights(labels, C)
    low, high = np.log(1 / HOTTEST), np.log(1 / COLDEST)
    s = 0.0
    while high - low > _ENOUGH:
        slope, curvature = _derivatives(logits, targets, weights, float(np.exp(s)))
        if slope == 0:  # also for logits that are all the same
            break
        low, high = (low, s) if slope > 0 else (s, high)
        # In s = log 1/T the loss is not convex everywhere: then halve the interval.
        step = s - slope / curvature if curvature > 0 else np.inf
        s = step if low < step < high else (low + high) / 2
        if curvature > 0 and abs(slope / curvature) < _ENOUGH / 2:
            break
    return float(np.exp(-s))


def _derivatives(logits: F64, targets: F64, weights: F64, inverse: float) -> tuple[float, float]:
    """Return the loss's first and second derivative in the logarithm of 1/T."""
    scaled = inverse * (logits - logits.max(axis=1, keepdims=True))
    p = np.exp(scaled)
    p /= p.sum(axis=1, keepdims=True)
    mean = (p * scaled).sum(axis=1, keepdims=True)
    slope = (weights * (mean[:, 0] - (targets * scaled).sum(axis=1))).mean()
    variance = (weights * (p * (scaled - mean) ** 2).sum(axis=1)).mean()
    return float(slope), float(variance + slope)
