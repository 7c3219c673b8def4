"""A cell, its outcome and its key: nothing is lost in JSON, and nothing taken for another's."""

import dataclasses
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztune.errors import FormatError
from ztune.experiments.cells import Cell, Outcome, PartScore, Point, key_of
from ztune.io.config import as_json
from ztune.io.schema import convert, decoded, plain
from ztune.statistics import Bin
from ztune.types import Json

CELL = Cell("base-to-new", "vit-b-16", "café 東京", "zip", 16, 3)
SCORES = (
    PartScore("base", 120, 6, 0.5, 0.4375, 0.1 + 0.2, 0.25),
    PartScore(
        *("new 🦊 “née”", 80, 5, 1.0, 0.0, None, None, ("a/1.jpg",), {"alpha": 2}),
        *(0.75, 0.4, (Bin(3, 20, 0.25, 0.3), Bin(14, 60, 0.99, 0.9))),
    ),
)
CURVE = (Point(10, None, 0.3), Point(20, 1.5, 0.4), Point(5000, 2.25, 0.45))
OUTCOME = Outcome(
    uses="zip",
    config={"rank": 5, "step_size": 1e-3, "kind": "ZIP ½", "nested": {"a": [1, None, True]}},
    run="base-to-new-café-3",
    artifact="ab" * 32,
    result_bytes=12345,
    n_train=96,
    n_val=24,
    copies=1,
    queries=5000,
    probe_queries=20,
    text_forwards=60000,
    image_forwards=216,
    image_forwards_cached=96,
    seconds=1 / 3,
    stop_reason="budget",
    train_loss=0.7071067811865476,
    scores=SCORES,
    curve=CURVE,
    broken=("b/2.jpg", "b/3.jpg"),
    conversions={"cmyk": 1},
)
VARYING = ("seconds", "peak_memory_mb", "image_forwards_cached")
"""What may differ when a cell is run again; the seconds of the curve are tested apart."""


LATER = ("broken", "conversions", "nll", "brier", "reliability")
"""Fields that older files lack."""


def through_json(record: object) -> dict[str, Json]:
    return decoded(json.dumps(plain(record), ensure_ascii=False), "row")


def read(document: object) -> Outcome:
    return convert(document, Outcome, "row")


def changed(record: Any, name: str) -> Any:
    """Return the record with another value, of the same type, in one field."""
    value = getattr(record, name)
    if isinstance(value, str):
        other: Any = value + "'"
    elif isinstance(value, tuple):
        other = value[:-1]
    elif isinstance(value, dict):
        other = {**value, "rank": 6}
    else:
        other = 7 if value is None else value + 1
    return dataclasses.replace(record, **{name: other})


def names(record: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(record)]


def test_an_outcome_reads_back_equal_in_all_fields() -> None:
    assert read(through_json(OUTCOME)) == OUTCOME
    head = dataclasses.replace(OUTCOME, uses="gda", config={}, curve=(), scores=SCORES[:1])
    assert read(through_json(head)) == head


@pytest.mark.parametrize("name", names(OUTCOME))
def test_no_field_of_an_outcome_is_read_from_another(name: str) -> None:
    # Two fields with equal values would hide that they are swapped.
    other = changed(OUTCOME, name)
    assert read(through_json(other)) == other != OUTCOME


def test_a_cell_reads_back_equal_and_says_all_that_it_is_called() -> None:
    for name in names(CELL):
        cell = changed(CELL, name)
        assert convert(through_json(cell), Cell, "row") == cell
        assert str(cell) != str(CELL)


def test_a_config_may_hold_tuples() -> None:
    # Settings are dataclasses, some with tuples in them; JSON has lists alone.
    outcome = dataclasses.replace(OUTCOME, config={"layers": (1, 2)})  # type: ignore[dict-item]
    assert plain(outcome)["config"] == {"layers": [1, 2]}
    again = read(through_json(outcome))
    assert plain(again) == plain(outcome)
    assert again.repeatable() == outcome.repeatable()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_is_refused_when_written(value: float) -> None:
    # Written, it would make the whole table unreadable.
    for outcome in (
        dataclasses.replace(OUTCOME, train_loss=value),
        dataclasses.replace(OUTCOME, config={"step_size": value}),
        dataclasses.replace(OUTCOME, curve=(Point(1, value, 0.5),)),
    ):
        with pytest.raises(ValueError, match="not JSON compliant"):
            plain(outcome)


@pytest.mark.parametrize("name", names(OUTCOME))
def test_repeatable_leaves_out_what_differs_between_runs_and_nothing_else(name: str) -> None:
    same = changed(OUTCOME, name).repeatable() == OUTCOME.repeatable()
    assert same == (name in VARYING)


def test_repeatable_holds_every_figure_of_scores_and_curve_but_the_seconds() -> None:
    for name in names(SCORES[1]):
        other = dataclasses.replace(OUTCOME, scores=(SCORES[0], changed(SCORES[1], name)))
        assert other.repeatable() != OUTCOME.repeatable()
    for name in names(CURVE[0]):
        other = dataclasses.replace(OUTCOME, curve=(changed(CURVE[0], name), *CURVE[1:]))
        same = other.repeatable() == OUTCOME.repeatable()
        assert same == (name == "seconds")


def test_repeatable_is_json_and_the_same_after_reading_back() -> None:
    document = OUTCOME.repeatable()
    assert json.loads(json.dumps(document)) == document
    assert read(through_json(OUTCOME)).repeatable() == document
    assert set(names(OUTCOME)) - set(document) == set(VARYING)


@pytest.mark.parametrize("name", sorted({*names(OUTCOME)} - {"peak_memory_mb", "needs", *LATER}))
def test_an_outcome_that_lacks_a_field_is_refused(name: str) -> None:
    document = plain(OUTCOME)
    del document[name]
    with pytest.raises(FormatError, match=f"^row: .*missing required field {name} "):
        read(document)


@pytest.mark.parametrize("name", [name for name in names(SCORES[0]) if name not in LATER])
def test_a_score_that_lacks_a_field_is_refused(name: str) -> None:
    # An absent accuracy is no None: None is written, and says that there can be no figure.
    document: Any = plain(OUTCOME)
    del document["scores"][1][name]
    with pytest.raises(
        FormatError, match=rf"^row: \$\.scores\[1\]: .*missing required field {name} "
    ):
        read(document)


@pytest.mark.parametrize("name", names(CURVE[0]))
def test_a_point_that_lacks_a_field_is_refused(name: str) -> None:
    document: Any = plain(OUTCOME)
    del document["curve"][2][name]
    with pytest.raises(
        FormatError, match=rf"^row: \$\.curve\[2\]: .*missing required field {name} "
    ):
        read(document)


@pytest.mark.parametrize("name", names(CELL))
def test_a_cell_that_lacks_a_field_is_refused(name: str) -> None:
    document = as_json(CELL)
    del document[name]
    with pytest.raises(FormatError, match=f"^row: .*missing required field {name} "):
        convert(document, Cell, "row")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("uses", 1),
        ("config", []),
        ("n_train", -1),
        ("n_train", 1.5),
        ("queries", True),
        ("seconds", "1"),
        ("train_loss", float("nan")),
        ("train_loss", None),
        ("scores", {}),
        ("scores", [1]),
        ("curve", None),
    ],
)
def test_a_field_of_another_kind_is_refused(name: str, value: Json) -> None:
    text = json.dumps({**plain(OUTCOME), name: value})
    with pytest.raises(FormatError, match=rf"^row: (\$\.{name}|cannot be read as JSON)"):
        read(decoded(text, "row"))


@pytest.mark.parametrize(
    ("name", "value"), [("shots", 0), ("seed", -1), ("seed", "1"), ("data", None), ("data", "\0")]
)
def test_a_cell_with_a_field_of_another_kind_is_refused(name: str, value: Json) -> None:
    text = json.dumps({**as_json(CELL), name: value})
    with pytest.raises(FormatError, match=rf"^row: (\$\.{name}: |a string has a NUL)"):
        convert(decoded(text, "row"), Cell, "row")


def test_a_key_is_32_hexadecimal_digits_and_the_same_in_every_process_and_version() -> None:
    # Fixed bytes: a key that changes with the program would orphan every result there is.
    assert key_of({}) == "44136fa355b3678a1146ad16f7e8649e"
    assert key_of({"b": [1, 2.5, None], "a": "é"}) == "c8e177ab11af9dbe561b9cd455fa2264"


def test_a_key_changes_with_every_value_and_its_kind() -> None:
    values: list[Json] = [
        0, 1, 1.0, True, False, None, "1", "", "true", "null", [], [1], [1, 1], [[1]], {}, {"v": 1},
        0.1, 0.1 + 2e-17, "é", "e\u0301", "e",
    ]  # fmt: skip
    keys = [key_of({"v": value}) for value in values] + [key_of({"w": 1}), key_of({})]
    assert len(set(keys)) == len(keys)
    nested = [key_of({"a": {"b": [{"c": value}]}}) for value in values]
    assert len(set(nested)) == len(nested)


def test_a_key_heeds_the_order_of_lists_and_not_that_of_objects() -> None:
    one: dict[str, Json] = {"x": {"p": 1, "q": [1, 2]}, "y": 2}
    other: dict[str, Json] = {"y": 2, "x": {"q": [1, 2], "p": 1}}
    assert key_of(one) == key_of(other)
    assert key_of({"x": [1, 2]}) != key_of({"x": [2, 1]})
    three: dict[str, Json] = {"a": 1, "b": "2", "ä": None}
    for order in itertools.permutations(three):
        assert key_of({name: three[name] for name in order}) == key_of(three)


def test_what_is_no_number_has_no_key() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        key_of({"v": float("nan")})


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), _VALUES, max_size=4), st.randoms(use_true_random=False))
def test_a_key_survives_json_and_any_order(document: dict[str, Json], random: Any) -> None:
    # Keys are made of plans that were read again, by another process.
    items = list(document.items())
    random.shuffle(items)
    assert key_of(dict(items)) == key_of(json.loads(json.dumps(document))) == key_of(document)
