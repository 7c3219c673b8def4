"""A cell of a table and what came of it.

A cell is one method tuned on one data set with some shots and one seed, under one protocol. Its key
is a digest of everything that its figures depend on, so that a result is never taken for another's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from ztune.io.schema import AtLeastOne, Count, plain
from ztune.types import Json


@dataclass(frozen=True)
class Cell:
    """What a cell is called; two cells of a plan differ in at least one of these."""

    protocol: str
    model: str
    """Its name in the plan; so are the next two."""
    data: str
    """What is tuned on."""
    method: str
    shots: AtLeastOne
    seed: Count

    def __str__(self) -> str:
        shots = f"{self.shots} shot{'s' if self.shots > 1 else ''}"
        where = f"{self.protocol}, {self.model}, {self.data}"
        return f"{where}, {shots}, {self.method}, seed {self.seed}"


@dataclass(frozen=True)
class PartScore:
    """How well a result does on the images of one part."""

    part: str
    """test, base or new; the name of the data set where that is another than was tuned on."""
    n: Count
    classes: Count
    zero_shot: float
    """Accuracy of the hand-written prompts, in 0…1."""
    zero_shot_class_accuracy: float
    """Mean over the classes of their accuracies."""
    accuracy: float | None
    """None where the method serves only the classes that it was tuned on."""
    class_accuracy: float | None


@dataclass(frozen=True)
class Point:
    """What a method had reached midway, on the first part."""

    queries: Count
    seconds: float | None
    accuracy: float


@dataclass(frozen=True)
class Outcome:
    """What one finished cell measured.

    Nothing of it but the seconds and what was found encoded differs from run to run.
    """

    uses: str
    """The method's name in the table of methods."""
    config: Mapping[str, Json]
    run: str
    """The folder of its run, below runs/."""
    artifact: str
    """SHA-256 of the result's file."""
    result_bytes: Count
    n_train: Count
    n_val: Count
    copies: Count
    """Images of the parts that equal one tuned on or validated on, byte by byte."""
    queries: Count
    probe_queries: Count
    text_forwards: Count
    image_forwards: Count
    """Images and views that go through the image tower, found encoded or not."""
    image_forwards_cached: Count
    """Those of them that were found encoded, so that `seconds` leaves them out."""
    seconds: float
    """From start to result, without the report and without scoring."""
    stop_reason: str
    train_loss: float
    scores: tuple[PartScore, ...]
    """In the order of the protocol: base before new; targets as the plan lists them."""
    curve: tuple[Point, ...]
    """In order of queries, the result itself last; empty for a method without steps."""

    def repeatable(self) -> dict[str, Json]:
        """Return all that is the same whenever and wherever the cell is carried out."""
        document = plain(self)
        del document["seconds"], document["image_forwards_cached"]
        document["curve"] = [[p.queries, p.accuracy] for p in self.curve]
        return document


def key_of(document: Mapping[str, Json]) -> str:
    """Return the digest of a JSON object, 32 hexadecimal digits; the order of keys is no matter."""
    text = json.dumps(document, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
