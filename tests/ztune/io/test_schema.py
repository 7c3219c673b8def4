"""Documents read into types: what is wrong is named with its place, in one line."""

import json
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from msgspec import field

from ztune.errors import ConfigError, FormatError
from ztune.io.schema import Count, Record, convert, current, decoded, plain


class Item(Record, frozen=True):
    n: Count
    kind: Literal["a", "b"] = "a"


class Circle(Record, frozen=True, tag="circle", tag_field="shape"):
    radius: float


class Square(Record, frozen=True, tag="square", tag_field="shape"):
    side: float


@dataclass(frozen=True)
class Checked:
    rate: float
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rate > 1:
            raise ConfigError(f"`rate` is {self.rate}, expected at most 1")


class Whole(Record, frozen=True, kw_only=True):
    name: str
    items: tuple[Item, ...] = ()
    by_name: dict[str, Item] = field(default_factory=dict)
    shape: Circle | Square | None = None
    flag: bool = False
    mean: tuple[float, float] = (0.0, 1.0)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "$: object missing required field name"),
    ({"name": 3}, "$.name: expected str, got int"),
    ({"name": None}, "$.name: expected str, got null"),
    ({"nam": "x", "name": "x"}, '$: unknown key "nam" (did you mean name?); known: name, items, '),
    ({"name": "x", "items": {}}, "$.items: expected array, got object"),
    ({"name": "x", "items": [{"n": 1}, {"n": True}]}, "$.items[1].n: expected int, got bool"),
    ({"name": "x", "items": [{"n": 1.0}]}, "$.items[0].n: expected int, got float"),
    ({"name": "x", "items": [{"n": -1}]}, "$.items[0].n: expected int >= 0, got -1"),
    ({"name": "x", "items": [{"n": 1, "kind": "c"}]}, "$.items[0].kind: expected a or b, got 'c'"),
    ({"name": "x", "items": [{"n": 1, "x": 1}]}, '$.items[0]: unknown key "x"; known: n, kind'),
    ({"name": "x", "by_name": {"a": {"n": "1"}}}, "$.by_name[...].n: expected int, got str"),
    ({"name": "x", "shape": {"shape": "line"}}, "$.shape.shape: expected circle or square, got 'l"),
    (
        {"name": "x", "shape": {"shape": "circle", "side": 1}},
        '$.shape: unknown key "side"; known: r',
    ),
    ({"name": "x", "shape": {"radius": 1}}, "$.shape: object missing required field shape"),
    ({"name": "x", "flag": 1}, "$.flag: expected bool, got int"),
    ({"name": "x", "mean": [1]}, "$.mean: expected array of length 2, got 1"),
    ({"name": "x", "mean": [1, "2"]}, "$.mean[1]: expected float, got str"),
    ({"name": "x", "mean": [1, 10**400]}, "$.mean[1]: number out of range"),
]


@pytest.mark.parametrize(("document", "message"), WRONG)
def test_what_is_wrong_is_named_with_its_place(document: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError) as caught:
        convert(document, Whole, 'run "x": run.json')
    said = str(caught.value)
    assert said.startswith(f'run "x": run.json: {message}')
    assert said.endswith("(file damaged or written by another program)")
    assert "\n" not in said


def test_a_dataclass_is_read_as_strictly() -> None:
    assert convert({"rate": 1, "words": ["a"]}, Checked, "x") == Checked(1.0, ("a",))
    with pytest.raises(
        FormatError, match=r'unknown key "rat" \(did you mean rate\?\); known: rate, w'
    ):
        convert({"rat": 1}, Checked, "x")
    with pytest.raises(FormatError, match=r"^x: `rate` is 2\.0, expected at most 1"):
        convert({"rate": 2}, Checked, "x")


def test_what_is_written_reads_back() -> None:
    whole = Whole(name="é", items=(Item(3, "b"),), shape=Square(0.5))
    document = plain(whole)
    assert json.loads(json.dumps(document)) == document
    assert convert(document, Whole, "x") == whole
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            plain(Square(value))


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[1]", b"null", b"3", b"{} x", b"\xff\xfe",
        b'{"a": "\\ud800"}', b'{"a": "\x00"}',
        b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": 1e999}', b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": "\\u0000"}', b'{"a\\u0000": 1}', b'{"a": [{"b": "x\\\\\\u0000"}]}',
        b"[" * 100_000, b'{"a":' * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_document(text: bytes) -> None:
    with pytest.raises(FormatError, match=r"^x: ") as caught:
        decoded(text, "x")
    assert "\n" not in str(caught.value)


def test_texts_of_every_kind_are_read() -> None:
    assert decoded('{"a": "\\\\u0000 é \\ud83d\\ude00"}', "x") == {"a": "\\u0000 é 😀"}
    assert decoded(b'{"a": 1, "a": 2}', "x") == {"a": 2}


def test_formats_and_versions() -> None:
    document: dict[str, Any] = {"format": "ztune-test", "version": 2, "a": 1}
    assert current(document, "ztune-test", 2, "x") == {"a": 1}
    for change, message in (
        ({"format": "other"}, r"\$\.format: expected \"ztune-test\", got 'other' \(not written by"),
        ({"format": None}, "got nothing"),
        (
            {"version": 9},
            r"^x: format version 9 is newer than this ztune reads \(2\); upgrade ztune$",
        ),
        ({"version": 0}, r"\$\.version: expected int >= 1, got 0"),
        ({"version": True}, r"\$\.version: expected int, got bool"),
        ({"version": None}, r"\$\.version: expected int, got null"),
    ):
        with pytest.raises(FormatError, match=message):
            current({**document, **change}, "ztune-test", 2, "x")
    del document["version"]
    with pytest.raises(FormatError, match="missing required field version"):
        current(document, "ztune-test", 2, "x")
