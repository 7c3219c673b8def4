"""A cell of a table, what came of it, and both as JSON.

A cell is one method tuned on one data set with some shots and one seed, under one protocol. Its key
is a digest of everything that its figures depend on, so that a result is never taken for another's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from ztune.io.config import as_json
from ztune.io.fields import Fields
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
    shots: int
    seed: int

    def __str__(self) -> str:
        shots = f"{self.shots} shot{'s' if self.shots > 1 else ''}"
        where = f"{self.protocol}, {self.model}, {self.data}"
        return f"{where}, {shots}, {self.method}, seed {self.seed}"


@dataclass(frozen=True)
class PartScore:
    """How well a result does on the images of one part."""

    part: str
    """test, base or new; the name of the data set where that is another than was tuned on."""
    n: int
    classes: int
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

    queries: int
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
    result_bytes: int
    n_train: int
    n_val: int
    copies: int
    """Images of the parts that equal one tuned on or validated on, byte by byte."""
    queries: int
    probe_queries: int
    text_forwards: int
    image_forwards: int
    """Images and views that go through the image tower, found encoded or not."""
    image_forwards_cached: int
    """Those of them that were found encoded, so that `seconds` leaves them out."""
    seconds: float
    """From start to result, without the report and without scoring."""
    stop_reason: str
    train_loss: float
    scores: tuple[PartScore, ...]
    """In the order of the protocol: base before new; targets as the plan lists them."""
    curve: tuple[Point, ...]
    """In order of queries, the result itself last; empty for a method without steps."""

    def to_json(self) -> dict[str, Json]:
        document: dict[str, Json] = json.loads(json.dumps(as_json(self), allow_nan=False))
        return document

    @classmethod
    def from_json(cls, fields: Fields) -> Outcome:
        """Read an outcome back.

        Raises: FormatError naming the field.
        """
        return cls(
            uses=fields.text("uses"),
            config=fields.object("config").values,
            run=fields.text("run"),
            artifact=fields.text("artifact"),
            **{name: fields.integer(name) for name in _COUNTS},
            stop_reason=fields.text("stop_reason"),
            seconds=fields.number("seconds"),
            train_loss=fields.number("train_loss"),
            scores=tuple(_score(one) for one in fields.objects("scores")),
            curve=tuple(_point(one) for one in fields.objects("curve")),
        )

    def repeatable(self) -> dict[str, Json]:
        """Return all that is the same whenever and wherever the cell is carried out."""
        document = self.to_json()
        del document["seconds"], document["image_forwards_cached"]
        document["curve"] = [[p.queries, p.accuracy] for p in self.curve]
        return document


_COUNTS = (
    "result_bytes", "n_train", "n_val", "copies", "queries", "probe_queries", "text_forwards",
    "image_forwards", "image_forwards_cached",
)  # fmt: skip


def _score(fields: Fields) -> PartScore:
    return PartScore(
        part=fields.text("part"),
        n=fields.integer("n"),
        classes=fields.integer("classes"),
        zero_shot=fields.number("zero_shot"),
        zero_shot_class_accuracy=fields.number("zero_shot_class_accuracy"),
        accuracy=_number_or_none(fields, "accuracy"),
        class_accuracy=_number_or_none(fields, "class_accuracy"),
    )


def _point(fields: Fields) -> Point:
    seconds = _number_or_none(fields, "seconds")
    return Point(fields.integer("queries"), seconds, fields.number("accuracy"))


def _number_or_none(fields: Fields, name: str) -> float | None:
    """Return a number, or None where it says null; a field that is absent is none of ours."""
    if name in fields.values and fields.values[name] is None:
        return None
    return fields.number(name)


def cell_from_json(fields: Fields) -> Cell:
    """Read a cell back.

    Raises: FormatError naming the field.
    """
    return Cell(
        protocol=fields.text("protocol"),
        model=fields.text("model"),
        data=fields.text("data"),
        method=fields.text("method"),
        shots=fields.integer("shots", least=1),
        seed=fields.integer("seed"),
    )


def key_of(document: Mapping[str, Json]) -> str:
    """Return the digest of a JSON object, 32 hexadecimal digits; the order of keys is no matter."""
    text = json.dumps(document, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
