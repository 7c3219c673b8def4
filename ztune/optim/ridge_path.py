"""The ridge of a convex fit, chosen by approximate cross-validation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ztune.objective import cross_entropy
from ztune.optim.convex import SoftmaxProblem, Terms, total
from ztune.types import F32, F64, I64

# From a ridge that prevents any move to one without effect.
RIDGES = 10.0 ** np.arange(1, -4.6, -0.5)
_N_FOLDS = 4
_STEPS_PER_RIDGE = 2  # warm-started from the heavier ridge
_NEWTON_STEPS = 16  # for a single ridge
_WITHOUT_FOLDS = 0.1  # the ridge if most classes have one image


@dataclass(frozen=True)
class Solutions:
    """The solution with all images, and those with a fold of them held out."""

    whole: F64
    """f64[r]"""
    without: tuple[F64, ...] = ()
    """f64[r] per fold; empty if nothing can be held out."""
    held_out: F32 | None = None
    """The logits f32[N, C] of each image under the solution without its fold; None without folds.
    """


def cross_validate_ridge(
    problem: SoftmaxProblem, unit: float, ridge: float | None, tolerance: float
) -> Solutions:
    """Return the mean of the solutions close to the best on held-out images.

    Ridges are tried from the heaviest, in units of `unit`, the directions' mean square, or only
    `ridge` if given. A held-out fold's loss is estimated by one Newton step from the solution with
    all images (Beirami et al., NeurIPS 2017), without a fit per fold. The mean is over the best
    ridge and all lighter ones whose mean loss is within `tolerance` standard errors (paired, over
    images): heavy ridges are safe, light ones fit the training images.
    """
    r = len(problem.directions)
    eye, a = np.eye(r), np.zeros(r)
    folds = fold_of_each(problem.labels)
    if folds is None:
        if r:
            share = ridge if ridge is not None else _WITHOUT_FOLDS
            a = problem.minimise(share * unit * eye, a, _NEWTON_STEPS)
        return Solutions(a)
    n_folds = int(folds.max()) + 1
    parts = [problem.rows(folds == k) for k in range(n_folds)]
    if r == 0:
        return _judged(parts, folds, Solutions(a, (a,) * n_folds))
    if ridge is not None:
        matrix = ridge * unit * eye
        a = problem.minimise(matrix, a, _NEWTON_STEPS)
        without = _without(a, [part.terms(a) for part in parts], matrix)
        return _judged(parts, folds, Solutions(a, without))
    terms = [part.terms(a) for part in parts]
    tried: list[tuple[Solutions, F64]] = []
    for share in RIDGES:
        matrix = share * unit * eye
        for _ in range(_STEPS_PER_RIDGE):
            a, _ = problem.take_newton_step(a, total(terms), matrix)
            terms = [part.terms(a) for part in parts]
        found = Solutions(a, _without(a, terms, matrix))
        losses = cross_entropy(_held_out_logits(parts, folds, found), problem.labels)
        tried.append((found, losses))
        best = min((one for _, one in tried), key=lambda one: float(one.mean()))
        if not _within(losses, best, tolerance):
            break
    first = next(i for i, (_, losses) in enumerate(tried) if losses is best)
    near = [one for one, losses in tried[first:] if _within(losses, best, tolerance)]
    whole = np.mean([one.whole for one in near], axis=0)
    by_fold = zip(*(one.without for one in near), strict=True)
    mean = Solutions(np.asarray(whole), tuple(np.mean(fold, axis=0) for fold in by_fold))
    return _judged(parts, folds, mean)


def _judged(parts: list[SoftmaxProblem], folds: I64, found: Solutions) -> Solutions:
    """Return the solutions with their logits of held-out images."""
    return replace(found, held_out=_held_out_logits(parts, folds, found))


def _without(a: F64, terms: list[Terms], ridge: F64) -> tuple[F64, ...]:
    """Return f64[r] per fold: one Newton step on the other folds from the solution a."""
    whole = total(terms)
    return tuple(a + (whole - own).step(a, ridge) for own in terms)


def _held_out_logits(parts: list[SoftmaxProblem], folds: I64, found: Solutions) -> F32:
    """Return f32[N, C], each image's logits under the solution without its fold."""
    logits = np.empty((len(folds), parts[0].base.shape[1]), dtype=np.float32)
    for k, (part, without) in enumerate(zip(parts, found.without, strict=True)):
        logits[folds == k] = part.logits(without)
    return logits


def _within(losses: F64, best: F64, tolerance: float) -> bool:
    """Return whether a ridge is at most `tolerance` standard errors worse than the best."""
    excess = losses - best
    return bool(excess.mean() <= tolerance * excess.std() / np.sqrt(len(excess)))


def fold_of_each(labels: I64) -> I64 | None:
    """Return the fold i64[N] of every image, stratified by class.

    None if most classes have a single image, which cannot be held out.
    """
    _, counts = np.unique(labels, return_counts=True)
    if np.median(counts) < 2:
        return None
    folds = np.empty(len(labels), dtype=np.int64)
    # By class, so that a class's images are spread over the folds. With two images per class a fold
    # has one of every second class: the others keep theirs, and with them a spread within classes.
    folds[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % _N_FOLDS
    return folds
