"""The ridge of a convex fit, chosen by approximate cross-validation."""

from __future__ import annotations

import numpy as np

from ztune.objective import cross_entropy
from ztune.optim.convex import SoftmaxProblem, Terms, total
from ztune.types import F64, I64

# From a ridge that prevents any move to one without effect.
RIDGES = 10.0 ** np.arange(1, -4.6, -0.5)
_N_FOLDS = 4
_STEPS_PER_RIDGE = 2  # warm-started from the heavier ridge
_NEWTON_STEPS = 16  # for a single ridge
_WITHOUT_FOLDS = 0.1  # the ridge if most classes have one image


def cross_validate_ridge(
    problem: SoftmaxProblem, unit: float, ridge: float | None, tolerance: float
) -> F64:
    """Return the mean f64[r] of the solutions close to the best on held-out images.

    Ridges are tried from the heaviest, in units of `unit`, the directions' mean square, or only
    `ridge` if given. A held-out fold's loss is estimated by one Newton step from the solution with
    all images (Beirami et al., NeurIPS 2017), without a fit per fold. The mean is over the best
    ridge and all lighter ones whose mean loss is within `tolerance` standard errors (paired, over
    images): heavy ridges are safe, light ones fit the training images.
    """
    r = len(problem.directions)
    eye, a = np.eye(r), np.zeros(r)
    if r == 0:
        return a
    folds = fold_of_each(problem.labels)
    if ridge is not None or folds is None:
        share = ridge if ridge is not None else _WITHOUT_FOLDS
        return problem.minimise(share * unit * eye, a, _NEWTON_STEPS)
    parts = [problem.rows(folds == k) for k in range(int(folds.max()) + 1)]
    terms = [part.terms(a) for part in parts]
    tried: list[tuple[F64, F64]] = []
    for share in RIDGES:
        matrix = share * unit * eye
        for _ in range(_STEPS_PER_RIDGE):
            a, _ = problem.take_newton_step(a, total(terms), matrix)
            terms = [part.terms(a) for part in parts]
        losses = _held_out_losses(parts, terms, folds, a, matrix)
        tried.append((a, losses))
        best = min((one for _, one in tried), key=lambda one: float(one.mean()))
        if not _within(losses, best, tolerance):
            break
    first = next(i for i, (_, losses) in enumerate(tried) if losses is best)
    near = [one for one, losses in tried[first:] if _within(losses, best, tolerance)]
    return np.asarray(np.mean(near, axis=0))


def _held_out_losses(
    parts: list[SoftmaxProblem], terms: list[Terms], folds: I64, a: F64, ridge: F64
) -> F64:
    """Return f64[N], each image's loss if its fold were left out of the solution a."""
    whole = total(terms)
    losses = np.empty(len(folds))
    for k, (part, own) in enumerate(zip(parts, terms, strict=True)):
        without = a + (whole - own).step(a, ridge)
        losses[folds == k] = cross_entropy(part.logits(without), part.labels)
    return losses


def _within(losses: F64, best: F64, tolerance: float) -> bool:
    """Return whether a ridge is at most `tolerance` standard errors worse than the best."""
    excess = losses - best
    return bool(excess.mean() <= tolerance * excess.std() / np.sqrt(len(excess)))


def fold_of_each(labels: I64) -> I64 | None:
    """Return the fold i64[N] of every image, stratified by class.

    None if most classes have a single image, which cannot be held out.
    """
    _, counts = np.unique(labels, return_counts=True)
    n_folds = min(_N_FOLDS, int(np.median(counts)))
    if n_folds < 2:
        return None
    folds = np.empty(len(labels), dtype=np.int64)
    # By class, so that a class's images are spread over the folds.
    folds[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % n_folds
    return folds
