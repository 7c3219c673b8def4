"""Measure the error that zero-shot logits have in common for all images; one JSON document.

    python -m benchmarks.shift BUNDLE --run runs/compare/runs/zero-shot-1

One fitted bias per class, or subtracting each class's mean logit, shows how much of the gain of a
tuned prompt is a shift that needs no prompt.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from runtimes.providers import Execution
from ztune.data.split import Split
from ztune.io.files import read_json
from ztune.model import open_model
from ztune.statistics import score
from ztune.types import F32, F64, I64


def fit_bias(logits: F32, labels: I64, n_steps: int = 2000) -> F64:
    """Return b f64[C] that minimises the cross-entropy of logits f32[N, C] + b."""
    bias = np.zeros(logits.shape[1])
    wanted = np.bincount(labels, minlength=len(bias)) / len(labels)
    for _ in range(n_steps):
        shifted = np.exp(logits + bias - (logits + bias).max(axis=1, keepdims=True))
        bias -= (shifted / shifted.sum(axis=1, keepdims=True)).mean(axis=0) - wanted
    return bias


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--run", type=Path, required=True, help="a run, for its split.json")
    parser.add_argument("--template", default="a photo of a {}.")
    arguments = parser.parse_args()
    model = open_model(arguments.bundle, Execution())
    path = arguments.run / "split.json"
    split = Split.from_json(read_json(path, str(path)), str(path))
    zero_shot = model.zero_shot((arguments.template,), split.classes)
    with tempfile.TemporaryDirectory() as cache:
        train, test = (
            zero_shot.logits(model.features(split.items(part), Path(cache), what=part).values[0])
            for part in ("train", "test")
        )
    labels, classes = split.labels("test"), split.classes
    bias = fit_bias(train, split.labels("train")).astype(np.float32)
    document = {
        "largest_share_of_predictions": np.bincount(test.argmax(axis=1)).max() / len(test),
        "zero_shot": score(test, labels, classes).accuracy,
        "class_bias_fitted": score(test + bias, labels, classes).accuracy,
        "mean_logit_removed": score(test - train.mean(axis=0), labels, classes).accuracy,
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
