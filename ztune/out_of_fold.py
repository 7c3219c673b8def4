"""Temperatures of results, fitted on images that the results were not fitted to."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np

from ztune.artifact import Artifact
from ztune.calibration import fit_temperature
from ztune.errors import ZtuneError
from ztune.heads import Fitted, Shots, keep_whole_classes
from ztune.methods.base import HeadMethod
from ztune.optim.ridge_path import fold_of_each
from ztune.progress import warn
from ztune.run_document import Calibration
from ztune.types import F32, I64

LabelledLogits = tuple[F32, I64]
"""Logits f32[h, C] of labelled images, and their labels i64[h]."""


def held_out_logits(
    method: HeadMethod, config: Any, fitted: Fitted, shots: Shots, seed: int
) -> LabelledLogits | None:
    """Return a head's logits of training images by fits without them, with the settings it chose.

    An image with several views counts once, with their mean direction. None if no image can be held
    out, or a fit with fewer images fails, which is said.
    """
    n_images = len(shots.labels) // shots.n_views
    labels = shots.labels[:n_images]
    folds = fold_of_each(labels)
    if folds is None:
        return None
    folds = keep_whole_classes(folds, labels, shots.n_classes)
    known = {field.name for field in fields(config)}
    chosen = replace(config, **{k: v for k, v in fitted.chosen.items() if k in known})
    queries, logits, own = shots.queries, [], []
    for k in range(int(folds.max(initial=-1)) + 1):
        out = folds == k
        try:
            found = method.fit_shots(chosen, shots.without(out), seed)
        except ZtuneError as error:
            warn(f"probabilities are not calibrated: without a quarter of the images {error}")
            return None
        logits.append(found.classifier.logits(queries[out]))
        own.append(labels[out])
    return (np.concatenate(logits), np.concatenate(own)) if logits else None


def calibrate(
    artifact: Artifact, held_out: LabelledLogits | None, validation: LabelledLogits | None
) -> tuple[Artifact, Calibration | None]:
    """Return an artifact with its temperature; None and the same artifact without such images.

    Validation images decide if there are any, else `held_out` logits. An artifact that already has
    a temperature, fitted on `held_out`, keeps it.
    """
    if artifact.temperature is not None:
        n = 0 if held_out is None else len(held_out[1])
        return artifact, Calibration(artifact.temperature, "folds", n)
    images = held_out if validation is None else validation
    if images is None or not np.isfinite(images[0]).all():
        return artifact, None
    logits, labels = images
    # Rounded, so that the last bits of one processor do not show.
    temperature = float(f"{fit_temperature(logits.astype(np.float64), labels):.4g}")
    source = Calibration(temperature, "folds" if validation is None else "validation", len(labels))
    return replace(artifact, temperature=temperature), source
