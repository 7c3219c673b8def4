"""Adapt a vision-language model with forward passes only.

    import ztune
    model = ztune.load("models/mini")
    train, test = ztune.Dataset.from_folder("photos").split(shots=16, seed=1)
    clf = ztune.FewShotClassifier(model, method="zip", queries=5000).fit(train)
    clf.score(test)

Names are loaded on first use, so lower layers can import `ztune.types`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ztune.dataset import Dataset
    from ztune.deployed import DeployedClassifier, load_classifier
    from ztune.estimator import FewShotClassifier
    from ztune.experiments.bench import run_plan
    from ztune.exporting import export, list_models
    from ztune.model import Model, load

__all__ = [
    "Dataset",
    "DeployedClassifier",
    "FewShotClassifier",
    "Model",
    "export",
    "list_models",
    "load",
    "load_classifier",
    "run_plan",
]
_HOMES = {
    "Dataset": "ztune.dataset",
    "DeployedClassifier": "ztune.deployed",
    "FewShotClassifier": "ztune.estimator",
    "Model": "ztune.model",
    "export": "ztune.exporting",
    "list_models": "ztune.exporting",
    "load": "ztune.model",
    "load_classifier": "ztune.deployed",
    "run_plan": "ztune.experiments.bench",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ztune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
