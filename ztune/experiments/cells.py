"""A cell and its outcome.

A cell is one method tuned on one data set with some shots and one seed, under one protocol. Its key
is a digest of everything that its figures depend on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from ztune.io.schema import AtLeastOne, Count, plain
from ztune.statistics import Bin, ece_of
from ztune.types import Json


@dataclass(frozen=True)
class Cell:
    """A cell's name, unique in its plan."""

    protocol: str
    model: str
    """Name in the plan, as are the next two."""
    data: str
    """The data set to tune on."""
    method: str
    shots: AtLeastOne
    seed: Count

    def __str__(self) -> str:
        shots = f"{self.shots} shot{'s' if self.shots > 1 else ''}"
        where = f"{self.protocol}, {self.model}, {self.data}"
        return f"{where}, {shots}, {self.method}, seed {self.seed}"


@dataclass(frozen=True)
class PartScore:
    """Accuracy of a result on one part."""

    part: str
    """test, base or new; in a transfer, the name of the target data set."""
    n: Count
    classes: Count
    zero_shot: float
    """Accuracy of the templates, in 0…1."""
    zero_shot_class_accuracy: float
    """Mean per-class accuracy."""
    accuracy: float | None
    """None if the method supports only the classes that it was tuned on."""
    class_accuracy: float | None
    broken: tuple[str, ...] = ()
    """Unreadable images that were not scored; paths relative to the part's root."""
    conversions: Mapping[str, int] = field(default_factory=dict)
    """How many of the images each rule changed (docs/images.md)."""
    nll: float | None = None
    """Mean negative log-likelihood of the labels in nats; None as for `accuracy`, or in results of
    earlier versions, as are the next two."""
    brier: float | None = None
    reliability: tuple[Bin, ...] = ()

    @property
    def ece(self) -> float | None:
        """The expected calibration error, in 0…1."""
        return ece_of(self.reliability) if self.reliability else None


@dataclass(frozen=True)
class Point:
    """A point of the accuracy curve, on the first part."""

    queries: Count
    seconds: float | None
    accuracy: float


@dataclass(frozen=True)
class Outcome:
    """The result of a finished cell.

    Only the seconds, the peak memory and the cached image forwards differ from run to run.
    """

    uses: str
    """Name of the method."""
    config: Mapping[str, Json]
    run: str
    """Folder of its run, below runs/."""
    artifact: str
    """SHA-256 of the artifact."""
    result_bytes: Count
    n_train: Count
    n_val: Count
    copies: Count
    """Test images that are byte-identical to a training or validation image."""
    queries: Count
    probe_queries: Count
    text_forwards: Count
    image_forwards: Count
    """Images and views through the image tower, cached ones included."""
    image_forwards_cached: Count
    """Those found in the cache, which `seconds` excludes."""
    seconds: float
    """From start to result, without report and scoring."""
    stop_reason: str
    train_loss: float
    scores: tuple[PartScore, ...]
    """In the order of the protocol: base before new; targets as the plan lists them."""
    curve: tuple[Point, ...]
    """In order of queries, the result itself last; empty for a method without steps."""
    peak_memory_mb: float | None = None
    """Of the run's process; None if that process had other tasks."""
    needs: str = ""
    """Capabilities that the method needs with its settings."""
    broken: tuple[str, ...] = ()
    """Unreadable training and validation images; paths relative to the root."""
    conversions: Mapping[str, int] = field(default_factory=dict)
    """How many training and validation images each rule changed."""

    def repeatable(self) -> dict[str, Json]:
        """Return the fields that are equal in every run of the cell."""
        document = plain(self)
        for name in ("seconds", "peak_memory_mb", "image_forwards_cached"):
            del document[name]
        document["curve"] = [[p.queries, p.accuracy] for p in self.curve]
        return document


def key_of(document: Mapping[str, Json]) -> str:
    """Return the digest of a JSON object, 32 hexadecimal digits, whatever the order of keys."""
    text = json.dumps(document, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
