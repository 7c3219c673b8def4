"""The ridge of a convex fit, chosen on held-out images without a fit for each."""

from __future__ import annotations

import numpy as np

from ztune.objective import cross_entropy
from ztune.optim.convex import SoftmaxProblem, Terms, total
from ztune.types import F64, I64

# From one where nothing moves to one where the training images alone decide.
RIDGES = 10.0 ** np.arange(1, -4.6, -0.5)
_N_FOLDS = 4
_STEPS_PER_RIDGE = 2  # each starts where the heavier ridge's ended
_NEWTON_STEPS = 16  # for a ridge alone
_WITHOUT_FOLDS = 0.1  # the ridge where most classes have one image


def cross_validated(
    problem: SoftmaxProblem, unit: float, ridge: float | None, tolerance: float
) -> F64:
    """Return the mean f64[r] of the solutions that held-out images cannot tell from the best.

    Ridges are tried from the heaviest on, in units of `unit`, the directions' mean square; a
    `ridge` that is given is the only one. What a fold's images lose when they are left out is
    estimated by one Newton step away from the solution with all images (Beirami et al., NeurIPS
    2017), which costs no fit for each fold. The mean is over the best ridge and all lighter ones
    whose mean loss is within `tolerance` standard errors (paired, over images): the heavy end is
    safe, the light end fits the training images.
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
            a, _ = problem.stepped(a, total(terms), matrix)
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
    """Return f64[N], the loss of every image had its fold been left out of the solution a."""
    whole = total(terms)
    losses = np.empty(len(folds))
    for k, (part, own) in enumerate(zip(parts, terms, strict=True)):
        without = a + (whole - own).step(a, ridge)
        losses[folds == k] = cross_entropy(part.logits(without), part.labels)
    return losses


def _within(losses: F64, best: F64, tolerance: float) -> bool:
    """Say whether a ridge is at most `tolerance` standard errors worse than the best."""
    excess = losses - best
    return bool(excess.mean() <= tolerance * excess.std() / np.sqrt(len(excess)))


def fold_of_each(labels: I64) -> I64 | None:
    """Return the fold i64[N] of every image, as even over the classes as can be.

    None where most classes have a single image: leaving it out leaves nothing of its class.
    """
    _, counts = np.unique(labels, return_counts=True)
    n_folds = min(_N_FOLDS, int(np.median(counts)))
    if n_folds < 2:
        return None
    folds = np.empty(len(labels), dtype=np.int64)
    # Class by class, so that a class's images are spread over the folds.
    folds[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % n_folds
    return folds
