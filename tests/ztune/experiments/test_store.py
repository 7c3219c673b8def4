"""Results in one file: what was recorded stays, with other writers and after a kill."""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import pytest

from tests.ztune.experiments.test_cells import CELL, CURVE, OUTCOME
from ztune.errors import FormatError
from ztune.experiments import store as module
from ztune.experiments.cells import Cell, Outcome, Point, key_of
from ztune.experiments.plan_document import PlanDocument
from ztune.experiments.store import APPLICATION, VERSION, ImagePass, Result, Session, Store, View
from ztune.io.config import as_json
from ztune.io.schema import decoded, plain
from ztune.types import Json


def cell(number: int) -> Cell:
    return dataclasses.replace(CELL, seed=number)


def key(number: int) -> str:
    return key_of(as_json(cell(number)))


def outcome(number: int, writer: str = "test") -> Outcome:
    """Return what a writer measures of a cell: more than one page of the file."""
    curve = tuple(Point(n, None, number / 1000) for n in range(100))
    return dataclasses.replace(OUTCOME, run=f"{writer}/{number}", n_train=number, curve=curve)


def reason(number: int) -> str:
    return f"cell {number} failed: " + "why " * 2000


def cells(*numbers: int) -> dict[Cell, str]:
    return {cell(number): key(number) for number in numbers}


PLAN = "a plan"
"""What is wanted and shown where nothing else is said."""


def results(store: Store, plan: str = PLAN) -> list[Result]:
    return list(store.view(plan).results)


def document(store: Store, plan: str = PLAN) -> Mapping[str, Json]:
    """Return a plan's document as the file holds it."""
    with raw(store.path) as database:
        query = "SELECT document FROM plans WHERE name = ?"
        return decoded(database.execute(query, [plan]).fetchone()[0], "plan")


def n_left_out(store: Store) -> int:
    return store.view(PLAN).n_left_out


def sessions(store: Store) -> dict[int, Session]:
    """Return the sessions of all cells, of any plan."""
    return dict(store.view(PLAN).sessions)


def rates(store: Store) -> dict[str, float]:
    return {digest: one.seconds_per_image for digest, one in store.view(PLAN).passes.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.sqlite"


@pytest.fixture
def store(path: Path) -> Store:
    return Store(path)


@contextlib.contextmanager
def raw(path: Path) -> Iterator[sqlite3.Connection]:
    """Yield the file as another program sees it; what is done counts."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        yield database


# What goes in comes out.


def test_results_are_the_wanted_cells_in_order_with_what_came_of_them(store: Store) -> None:
    store.set_plan(PLAN, {"title": "t"}, cells(3, 1, 2))
    assert results(store) == [Result(cell(3)), Result(cell(1)), Result(cell(2))]
    first, second = store.begin_session({}), store.begin_session({})
    store.finish(key(2), cell(2), OUTCOME, second)
    store.fail(key(3), cell(3), "no images in “café”", first)
    assert results(store) == [
        Result(cell(3), None, "no images in “café”", first),
        Result(cell(1)),
        Result(cell(2), OUTCOME, "", second),
    ]
    assert store.finished() == {key(2)}


def test_what_was_recorded_is_there_for_the_next_process(store: Store, path: Path) -> None:
    store.set_plan(PLAN, {"title": "é", "models": {"m": {"more": [1, None]}}}, cells(1))
    number = store.begin_session({"host": "ä", "versions": {"numpy": "2"}})
    store.finish(key(1), cell(1), OUTCOME, number)
    store.add_pass("m", 10, 5.0)
    for again in (Store(path), Store.existing(path)):
        assert again.plans() == [PLAN]
        assert results(again) == [Result(cell(1), OUTCOME, "", number)]
        assert document(again) == {"title": "é", "models": {"m": {"more": [1, None]}}}
        assert sessions(again) == {number: {"host": "ä", "versions": {"numpy": "2"}}}
        assert rates(again) == {"m": 0.5}
        assert again.finished() == {key(1)}


def test_a_finished_cell_is_never_replaced(store: Store) -> None:
    store.set_plan(PLAN, {"title": "t"}, cells(1))
    store.finish(key(1), cell(1), OUTCOME, 1)
    store.fail(key(1), cell(1), "too late", 2)
    store.finish(key(1), cell(1), dataclasses.replace(OUTCOME, train_loss=9.0), 3)
    assert results(store) == [Result(cell(1), OUTCOME, "", 1)]


def test_a_failure_is_replaced_by_what_comes_later(store: Store) -> None:
    store.set_plan(PLAN, {"title": "t"}, cells(1))
    store.fail(key(1), cell(1), "first", 1)
    store.fail(key(1), cell(1), "second", 2)
    assert results(store) == [Result(cell(1), None, "second", 2)]
    assert store.finished() == set()
    store.finish(key(1), cell(1), OUTCOME, 3)
    assert results(store) == [Result(cell(1), OUTCOME, "", 3)]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("two\nlines", "two\nlines"),
        ("nul \0 inside", "nul \0 inside"),
        ("x" * 100_000, "x" * 100_000),
        # A file name that is no UTF-8 comes like this from the system, into the error's message.
        ("image \udcff.png", "image \\udcff.png"),
        # What an assertion without words says; empty, the cell would look as if it was not run.
        ("", "no reason given"),
    ],
)
def test_any_reason_can_be_recorded(store: Store, given: str, kept: str) -> None:
    store.set_plan(PLAN, {"title": "t"}, cells(1))
    store.fail(key(1), cell(1), given, 1)
    assert results(store) == [Result(cell(1), None, kept, 1)]


def test_an_outcome_that_cannot_be_written_leaves_the_cell_as_it_was(store: Store) -> None:
    store.set_plan(PLAN, {"title": "t"}, cells(1))
    store.fail(key(1), cell(1), "first", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.finish(key(1), cell(1), dataclasses.replace(OUTCOME, train_loss=float("nan")), 2)
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.begin_session({"x": float("inf")})
    assert results(store) == [Result(cell(1), None, "first", 1)]
    assert sessions(store) == {}


def test_a_plan_given_again_replaces_what_it_was_and_no_result(store: Store) -> None:
    store.set_plan(PLAN, {"title": "first"}, cells(1, 2, 3))
    for number in (1, 2):
        store.finish(key(number), cell(number), outcome(number), 1)
    store.fail(key(3), cell(3), "why", 1)
    assert n_left_out(store) == 0
    store.set_plan(PLAN, {"title": "second"}, cells(4, 2))
    assert document(store) == {"title": "second"}
    assert results(store) == [Result(cell(4)), Result(cell(2), outcome(2), "", 1)]
    assert store.finished() == {key(1), key(2)}
    assert n_left_out(store) == 1  # the failure is no result that is left out
    store.set_plan(PLAN, {"title": "none"}, {})
    assert results(store) == []
    assert n_left_out(store) == 2
    store.set_plan(PLAN, {"title": "first"}, cells(3, 1))
    assert results(store) == [
        Result(cell(3), None, "why", 1),
        Result(cell(1), outcome(1), "", 1),
    ]
    assert n_left_out(store) == 1


def test_a_plan_that_cannot_be_written_leaves_what_it_was(store: Store) -> None:
    store.set_plan(PLAN, {"title": "first"}, cells(1))
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.set_plan(PLAN, {"x": float("nan")}, cells(2))
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.set_plan("another", {"x": float("nan")}, cells(2))
    assert store.plans() == [PLAN]
    assert document(store) == {"title": "first"}
    assert results(store) == [Result(cell(1))]


def test_a_cell_has_the_name_that_the_latest_plan_gives_it(store: Store) -> None:
    # Names are not part of what a figure depends on, so a renamed model keeps its results.
    renamed = dataclasses.replace(CELL, model="another name")
    store.finish("k", CELL, OUTCOME, 1)
    store.set_plan(PLAN, {"title": "t"}, {CELL: "k"})
    store.set_plan(PLAN, {"title": "t"}, {renamed: "k"})
    assert results(store) == [Result(renamed, OUTCOME, "", 1)]


def test_before_the_first_plan_there_is_none(store: Store, path: Path) -> None:
    assert store.finished() == set()
    for opened in (store, Store.existing(path)):
        with pytest.raises(FormatError, match=f'^results "{path}": no plan was run yet$'):
            opened.plans()
        with pytest.raises(FormatError, match=f'^results "{path}": unknown plan "{PLAN}"$'):
            opened.view(PLAN)
    # What is there without a plan, the first one finds.
    number = store.begin_session({"host": "h"})
    store.finish(key(1), cell(1), OUTCOME, number)
    store.set_plan(PLAN, {"title": "t"}, {})
    assert store.plans() == [PLAN]
    assert results(store) == []
    assert list(sessions(store)) == [number]
    assert n_left_out(store) == 1


def test_plans_keep_their_own_cells_documents_and_order(store: Store) -> None:
    store.set_plan("z", {"title": "last"}, cells(3, 1))
    store.set_plan("a", {"title": "first"}, cells(1, 2))
    number = store.begin_session({"host": "h"})
    store.finish(key(1), cell(1), outcome(1), number)
    store.fail(key(2), cell(2), "why", number)
    store.add_pass("m", 4, 1.0)
    both, alone = Result(cell(1), outcome(1), "", number), Result(cell(2), None, "why", number)
    view = partial(
        View, n_left_out=0, sessions={number: {"host": "h"}}, passes={"m": ImagePass(0.25, None)}
    )
    last = view("z", PlanDocument("last"), (Result(cell(3)), both))
    assert store.view("z") == last
    assert store.view("a") == view("a", PlanDocument("first"), (both, alone))
    store.set_plan("a", {"title": "again"}, cells(2))
    assert store.view("z") == last
    assert store.view("a") == view("a", PlanDocument("again"), (alone,))
    assert store.plans() == ["z", "a"]
    store.set_plan("z", {"title": "again"}, {})
    assert store.plans() == ["z", "a"]  # in the order that they were first given
    assert results(store, "a") == [alone]
    assert results(store, "z") == []


def asking(**data: Json) -> dict[str, Json]:
    """Return a plan's document; `data` are what its data sets are known as, null where not read."""
    entries: dict[str, Json] = {
        name: {"template": "{}", "found": one and {"known_as": one, "remarks": []}}
        for name, one in data.items()
    }
    return {"title": "t", "provider": "cpu", "models": {"m": {"digest": "b"}}, "data": entries}


def test_what_was_not_read_stays_as_it_was(store: Store) -> None:
    store.set_plan(PLAN, asking(a="of a", b=None), {cell(1): key(1), cell(2): None})
    store.finish(key(1), cell(1), OUTCOME, 1)
    both = {cell(2): key(2), cell(1): None}
    store.set_plan(PLAN, {**asking(a=None, b="of b"), "title": "x"}, both)
    assert results(store) == [Result(cell(2)), Result(cell(1), OUTCOME, "", 1)]
    assert document(store)["data"] == asking(a="of a", b="of b")["data"]
    assert n_left_out(store) == 0
    store.set_plan(PLAN, asking(a="again", b=None), {cell(2): None, cell(1): "other"})
    assert results(store) == [Result(cell(2)), Result(cell(1))]
    assert document(store)["data"] == asking(a="again", b="of b")["data"]
    store.set_plan("other", asking(a=None), {cell(1): None})
    assert results(store, "other") == [Result(cell(1))], "a plan of its own"


@pytest.mark.parametrize(
    "changed",
    [
        {"provider": "cuda"},
        {"models": {"m": {"digest": "c"}}},
        {"data": {"a": {"template": "a {}", "found": None}}},
    ],
)
def test_an_edited_plan_keeps_nothing_that_was_not_read(
    store: Store, changed: dict[str, Json]
) -> None:
    """Its other cells may mean something else by the same names."""
    store.set_plan(PLAN, asking(a="of a"), cells(1, 2))
    store.finish(key(1), cell(1), OUTCOME, 1)
    store.set_plan(PLAN, {**asking(a=None), **changed}, {cell(1): None, cell(2): key(2)})
    assert results(store) == [Result(cell(1)), Result(cell(2))]
    (entry,) = cast(dict[str, Json], document(store)["data"]).values()
    assert isinstance(entry, dict)
    assert entry["found"] is None
    assert n_left_out(store) == 1


@pytest.mark.parametrize("name", ["b", "A plan", "a", "a pla_", "%", ""])
def test_a_plan_that_is_not_there_is_named(store: Store, name: str) -> None:
    store.set_plan(PLAN, {"title": "t"}, cells(1))
    with pytest.raises(FormatError, match=f'^results "{store.path}": unknown plan "{name}"$'):
        store.view(name)


def test_cells_of_one_key_show_the_same_result(store: Store) -> None:
    # A key has what a figure depends on: two names for one data set, or two methods alike in all.
    alike = [dataclasses.replace(CELL, data=name) for name in ("café", "bistro")]
    store.set_plan(PLAN, {"title": "t"}, {alike[0]: "k", **cells(1), alike[1]: "k"})
    assert results(store) == [Result(alike[0]), Result(cell(1)), Result(alike[1])]
    store.fail("k", alike[0], "why", 1)
    assert results(store) == [
        Result(alike[0], None, "why", 1),
        Result(cell(1)),
        Result(alike[1], None, "why", 1),
    ]
    store.finish("k", alike[1], OUTCOME, 2)
    assert results(store) == [
        Result(alike[0], OUTCOME, "", 2),
        Result(cell(1)),
        Result(alike[1], OUTCOME, "", 2),
    ]
    assert store.finished() == {"k"}
    store.set_plan(PLAN, {"title": "t"}, {alike[1]: "k"})
    assert n_left_out(store) == 0  # the other is the same result
    store.set_plan(PLAN, {"title": "t"}, {})
    assert n_left_out(store) == 1


def test_only_what_no_plan_has_is_left_out(store: Store) -> None:
    store.set_plan(PLAN, {"title": "t"}, cells(1, 2))
    store.set_plan("another", {"title": "t"}, cells(2, 3))
    for number in (1, 2, 3, 4):
        store.finish(key(number), cell(number), OUTCOME, 1)
    store.fail(key(5), cell(5), "why", 1)  # no result

    def left_out() -> set[int]:
        return {store.view(plan).n_left_out for plan in store.plans()}

    assert left_out() == {1}
    store.set_plan(PLAN, {"title": "t"}, cells(1))
    assert left_out() == {1}
    store.set_plan("another", {"title": "t"}, cells(3, 4))
    assert left_out() == {1}
    store.set_plan("another", {"title": "t"}, {})
    assert left_out() == {3}


@pytest.mark.parametrize("statement", ["SELECT document", module._RESULTS, module._LEFT_OUT])
def test_a_view_is_of_one_moment(
    store: Store, statement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.set_plan(PLAN, {"title": "before"}, cells(1, 2))
    store.finish(key(1), cell(1), OUTCOME, 1)
    before = store.view(PLAN)
    writers = iter([Store(store.path)])

    class Interrupted(sqlite3.Connection):
        """One between whose statements another writes, where it may."""

        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if sql.startswith(statement):
                for other in writers:  # once
                    with contextlib.suppress(FormatError):  # where it would have to wait
                        other.set_plan(PLAN, {"title": "after"}, cells(3))
            return super().execute(sql, *values)

    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Interrupted))
        seen = store.view(PLAN)
    assert next(writers, None) is None
    store.set_plan(PLAN, {"title": "after"}, cells(3))
    after = store.view(PLAN)
    assert before.n_left_out != after.n_left_out
    assert seen in (before, after)


def test_sessions_are_numbered_in_turn(store: Store) -> None:
    store.set_plan(PLAN, {"title": "t"}, {})
    numbers = [store.begin_session({"place": i}) for i in range(3)]
    assert len(set(numbers)) == 3
    assert [one["place"] for one in sessions(store).values()] == [0, 1, 2]
    assert list(sessions(store)) == numbers


def test_the_time_of_an_image_is_a_mean_over_all_passes(store: Store) -> None:
    store.set_plan(PLAN, {"title": "t"}, {})
    assert rates(store) == {}
    store.add_pass("a", 30, 3.0)
    store.add_pass("a", 10, 3)  # whole seconds must not make it a whole division
    store.add_pass("b", 3, 1)
    store.add_pass("c", 0, 0.25)  # all images were found encoded
    assert rates(store) == {"a": 0.15, "b": 1 / 3}


def test_threads_may_share_one(store: Store) -> None:
    store.set_plan(PLAN, {"title": "t"}, cells(*range(20)))

    def record(number: int) -> None:
        store.finish(key(number), cell(number), outcome(number), 1)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(record, range(20)))
    assert results(store) == [Result(cell(n), outcome(n), "", 1) for n in range(20)]


# Files that are not as they should be.


def test_a_file_that_is_not_there_is_not_made_by_a_reader(path: Path) -> None:
    with pytest.raises(FormatError, match=f'^results "{path}" do not exist'):
        Store.existing(path)
    assert not path.exists()
    with pytest.raises(FormatError, match="do not exist"):
        Store.existing(path.parent)


@pytest.mark.parametrize("content", [b"no database, " * 100, b"{}\n", bytes(8192)])
def test_a_file_that_is_no_database_is_refused_and_kept(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for opened in (Store, Store.existing):
        with pytest.raises(FormatError, match=f'^results "{path}": file is not a database'):
            opened(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE cells (key TEXT PRIMARY KEY)",
        f"PRAGMA application_id = {APPLICATION - 1}",  # without a table: still foreign
        "PRAGMA user_version = 1",
    ],
)
def test_a_database_of_another_program_is_refused_and_kept(path: Path, statement: str) -> None:
    with raw(path) as database:
        database.execute(statement)
    before = path.read_bytes()
    for opened in (Store, Store.existing):
        with pytest.raises(
            FormatError, match=f'^results "{path}": not a results file of ztune bench'
        ):
            opened(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (0, r"format version 0 is older than this ztune reads \(from 2\); use another"),
        (1, r"format version 1 is older than this ztune reads \(from 2\); use another"),
        (VERSION + 1, rf"format version \d is newer than this ztune reads \({VERSION}\); upgrade"),
    ],
)
def test_a_file_of_another_version_is_refused_and_kept(
    path: Path, version: int, message: str
) -> None:
    with raw(path) as database:
        database.execute("CREATE TABLE cells (key TEXT PRIMARY KEY)")
        database.execute(f"PRAGMA application_id = {APPLICATION}")
        database.execute(f"PRAGMA user_version = {version}")
    before = path.read_bytes()
    for opened in (Store, Store.existing):
        with pytest.raises(FormatError, match=f'^results "{path}": {message}'):
            opened(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("opened", [Store, Store.existing])
def test_an_empty_file_is_what_a_kill_leaves_of_a_new_one(path: Path, opened: type[Store]) -> None:
    path.write_bytes(b"")
    store = opened(path)
    assert store.finished() == set()
    store.set_plan(PLAN, {"title": "t"}, cells(1))
    store.finish(key(1), cell(1), OUTCOME, store.begin_session({}))
    assert results(Store.existing(path)) == [Result(cell(1), OUTCOME, "", 1)]


def test_a_file_says_whose_and_which_version_it_is(store: Store) -> None:
    with raw(store.path) as database:
        assert database.execute("PRAGMA application_id").fetchone() == (0x7A74756E,)
        assert database.execute("PRAGMA user_version").fetchone() == (VERSION,)


_NO_OBJECT = "(cannot be read as JSON|expected a JSON object)"
DAMAGES = {
    "cut short": ("UPDATE cells SET outcome = substr(outcome, 1, 100)", _NO_OBJECT),
    "empty": ("UPDATE cells SET outcome = ''", _NO_OBJECT),
    "a list": ("UPDATE cells SET outcome = '[]'", _NO_OBJECT),
    "too deep": (f"UPDATE cells SET outcome = '{'[' * 200_000}'", _NO_OBJECT),
    "bytes": ("UPDATE cells SET outcome = x'ff00ff'", _NO_OBJECT),
    "no UTF-8": ("UPDATE cells SET outcome = CAST(x'ff41' AS TEXT)", "Could not decode to UTF-8"),
    "no fields": ("UPDATE cells SET outcome = '{}'", "missing required field uses"),
    "a negative count": (
        """UPDATE cells SET outcome = replace(outcome, '"n_val": 24', '"n_val": -1')""",
        r"\$\.n_val: expected int >= 0, got -1",
    ),
    "no number": (
        """UPDATE cells SET outcome = replace(outcome, '"n": 80', '"n": NaN')""",
        "cannot be read as JSON",
    ),
    "a cell without shots": (
        """UPDATE wanted SET cell = replace(cell, '"shots": 16', '"shots": 0')""",
        r"\$\.shots: expected int >= 1, got 0",
    ),
    "a cell cut short": ("UPDATE wanted SET cell = substr(cell, 1, 20)", _NO_OBJECT),
    "a missing table": ("DROP TABLE cells", "no such table"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_row_is_refused_by_the_name_of_the_file(store: Store, damage: str) -> None:
    store.set_plan(PLAN, {"title": "t"}, cells(1))
    store.finish(key(1), cell(1), OUTCOME, 1)
    assert results(store) == [Result(cell(1), OUTCOME, "", 1)]
    statement, message = DAMAGES[damage]
    with raw(store.path) as database:
        database.execute(statement)
    with pytest.raises(FormatError, match=f'^results "{store.path}": .*{message}'):
        results(store)


@pytest.mark.parametrize("table", ["plans", "sessions"])
@pytest.mark.parametrize("text", ["{", "null"])
def test_a_damaged_plan_or_session_is_refused_by_the_name_of_the_file(
    store: Store, table: str, text: str
) -> None:
    store.set_plan(PLAN, {"title": "t"}, {})
    store.begin_session({"host": "h"})
    with raw(store.path) as database:
        database.execute(f"UPDATE {table} SET document = ?", [text])
    with pytest.raises(FormatError, match=f'^results "{store.path}": {_NO_OBJECT}'):
        store.view(PLAN)


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_file_is_refused_by_its_name(store: Store, damage: str) -> None:
    numbers = range(8)
    store.set_plan(PLAN, {"title": "t"}, cells(*numbers))
    for number in numbers:
        store.finish(key(number), cell(number), outcome(number), 1)
    content = store.path.read_bytes()
    half = len(content) // 2
    rest = b"" if damage == "cut" else b"\xaa" * (len(content) - half)
    store.path.write_bytes(content[:half] + rest)
    with pytest.raises(FormatError, match=f'^results "{store.path}": '):
        results(store)


def test_a_schema_that_is_not_text_is_refused_by_the_name_of_the_file(store: Store) -> None:
    content = store.path.read_bytes()
    assert content.count(b"CREATE TABLE") > 1
    store.path.write_bytes(content.replace(b"CREATE TABLE", b"CR\x80ATE TABLE"))
    with pytest.raises(FormatError, match=f'^results "{store.path}": '):
        Store.existing(store.path)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Be a user whom permissions hold for, which they do not for root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def closed_folder() -> Iterator[Path]:
    """Return a folder whose files, and which itself, can be read and not written."""
    folder = Path(tempfile.mkdtemp())  # tmp_path is in a private folder
    try:
        store = Store(folder / "there.sqlite")
        store.set_plan(PLAN, {"title": "t"}, cells(1, 2))
        store.finish(key(1), cell(1), OUTCOME, 1)
        store.path.chmod(0o444)
        folder.chmod(0o555)
        with unprivileged():
            if not os.access(store.path, os.R_OK, effective_ids=True):
                pytest.skip("the folder of temporary files is closed to other users")
            yield folder
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_folder_that_cannot_be_written_is_named(closed_folder: Path) -> None:
    path = closed_folder / "new.sqlite"
    with pytest.raises(FormatError, match=f'^results "{path}": unable to open'):
        Store(path)


def test_a_path_that_cannot_be_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "absent" / "x", tmp_path / "file" / "x"):
        with pytest.raises(FormatError, match=f'^results "{path}": unable to open'):
            Store(path)


def test_a_file_that_cannot_be_written_can_be_read(closed_folder: Path) -> None:
    # Reports are made of results on a shared disk, or of another user.
    store = Store.existing(closed_folder / "there.sqlite")
    assert results(store) == [Result(cell(1), OUTCOME, "", 1), Result(cell(2))]
    with pytest.raises(FormatError, match=f'^results "{store.path}": .*(readonly|unable)'):
        store.fail(key(2), cell(2), "why", 1)


def test_a_reader_waits_for_no_writer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.set_plan(PLAN, {"title": "t"}, cells(1))
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    with raw(store.path) as database:
        database.execute("BEGIN IMMEDIATE")
        assert results(Store.existing(store.path)) == [Result(cell(1))]
        with pytest.raises(FormatError, match=f'^results "{store.path}": database is locked'):
            store.fail(key(1), cell(1), "why", 1)
    assert results(store) == [Result(cell(1))]


@contextlib.contextmanager
def full_disk(largest: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("moment", ["row", "commit"])
def test_what_finds_no_room_says_so_and_leaves_all_as_it_was(store: Store, moment: str) -> None:
    store.set_plan(PLAN, {"title": "t"}, cells(1, 2))
    store.finish(key(1), cell(1), OUTCOME, 1)
    # SQLite's journal grows with the row, the file itself at the end.
    room = 512 if moment == "row" else store.path.stat().st_size
    with full_disk(room):
        with pytest.raises(FormatError, match=f'^results "{store.path}": (disk|database or disk)'):
            store.fail(key(2), cell(2), reason(2) * 10, 1)
        assert results(store) == [Result(cell(1), OUTCOME, "", 1), Result(cell(2))]
    store.fail(key(2), cell(2), "later", 1)
    assert results(store)[1] == Result(cell(2), None, "later", 1)


def test_what_fails_midway_leaves_all_as_it_was(store: Store) -> None:
    store.set_plan(PLAN, {"title": "first"}, cells(1, 2))
    with raw(store.path) as database:
        database.execute(
            "CREATE TRIGGER no_plan BEFORE INSERT ON plans BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    for plan in (PLAN, "another"):
        with pytest.raises(FormatError, match=f'^results "{store.path}": no$'):
            store.set_plan(plan, {"title": "second"}, cells(3))
    assert store.plans() == [PLAN]
    assert document(store) == {"title": "first"}
    assert results(store) == [Result(cell(1)), Result(cell(2))]


# Several processes. What follows with a `line` runs in one of its own, which a test can kill: it
# waits for a word where it should begin with others, and says what it has done.

_PROCESSES = multiprocessing.get_context("forkserver")  # a new one takes ms; pytest is never forked


@dataclasses.dataclass(frozen=True)
class Worker:
    process: BaseProcess
    line: Connection


@contextlib.contextmanager
def working(
    work: Callable[[Path, int, Connection], None], path: Path, *numbers: int
) -> Iterator[list[Worker]]:
    """Yield a worker for every number; none of them outlives the block."""
    _PROCESSES.set_forkserver_preload([__name__])
    with contextlib.ExitStack() as stack:
        workers = []
        for number in numbers:
            ours, theirs = _PROCESSES.Pipe()
            stack.enter_context(ours)
            process = _PROCESSES.Process(target=work, args=(path, number, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the line ends with the worker
            stack.callback(process.join)
            stack.callback(process.kill)
            workers.append(Worker(process, ours))
        yield workers


N_TOGETHER = 15


def create(folder: Path, _: int, line: Connection) -> None:
    line.send("ready")
    for number in range(N_TOGETHER):
        line.recv()
        line.send(Store(folder / str(number)).begin_session({}))


def test_two_processes_may_make_the_same_file_at_once(tmp_path: Path) -> None:
    with working(create, tmp_path, 0, 1) as both:
        assert [one.line.recv() for one in both] == ["ready", "ready"]
        for number in range(N_TOGETHER):
            for one in both:
                one.line.send("go")
            # Two numbers of one file: neither has replaced it under the other.
            assert {one.line.recv() for one in both} == {1, 2}
            store = Store.existing(tmp_path / str(number))
            store.set_plan(PLAN, {"title": "t"}, {})
            assert list(sessions(store)) == [1, 2]


@pytest.mark.parametrize("statement", ["PRAGMA application_id", "PRAGMA user_version"])
def test_a_file_is_not_seen_half_made(
    path: Path, statement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = iter([path])

    class Interrupted(sqlite3.Connection):
        """One whose look at the file is interrupted by another that makes it."""

        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if sql == statement:
                for other in paths:  # once
                    with contextlib.suppress(FormatError):  # where it would have to wait
                        Store(other)
            return super().execute(sql, *values)

    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Interrupted))
    assert Store(path).begin_session({}) == 1
    assert next(paths, None) is None


N_EACH, N_SHARED = 50, 25


def record(path: Path, writer: int, line: Connection) -> None:
    line.send("ready")
    line.recv()
    store = Store(path)
    session = store.begin_session({"writer": writer})
    mine = list(range(writer * N_SHARED, writer * N_SHARED + N_EACH))
    random.Random(writer).shuffle(mine)
    for place, number in enumerate(mine):
        if place % 5 == 0:
            store.fail(key(number), cell(number), reason(number), session)
        store.finish(key(number), cell(number), outcome(number, str(writer)), session)
        if place % 5 == 1:
            store.fail(key(number), cell(number), "too late", session)
    line.send("done")


def test_four_writers_lose_nothing_of_each_other(path: Path) -> None:
    numbers = range(3 * N_SHARED + N_EACH)
    with working(record, path, 0, 1, 2, 3) as four:
        assert [one.line.recv() for one in four] == ["ready"] * 4
        for one in four:
            one.line.send("go")
        assert [one.line.recv() for one in four] == ["done"] * 4
    store = Store.existing(path)
    store.set_plan(PLAN, {"title": "t"}, cells(*numbers))
    writers = {session: int(str(one["writer"])) for session, one in sessions(store).items()}
    assert sorted(writers.values()) == [0, 1, 2, 3]
    for number, result in zip(numbers, results(store), strict=True):
        assert result.session is not None
        # Whole and of one writer: the outcome with the session of the process that measured it.
        writer = writers[result.session]
        assert result == Result(cell(number), outcome(number, str(writer)), "", result.session)
        assert 0 <= number - writer * N_SHARED < N_EACH
    with raw(path) as database:
        assert database.execute("SELECT count(*) FROM cells").fetchone() == (len(numbers),)


N_KILLS, N_MOST = 20, 100


def record_results(path: Path, first: int, line: Connection) -> None:
    """Fail and then finish one cell after the other, and say so of each."""
    store = Store(path)
    session = store.begin_session({"first": first})
    for number in range(first, first + N_MOST):
        store.fail(key(number), cell(number), reason(number), session)
        line.send(Result(cell(number), None, reason(number), session))
        store.finish(key(number), cell(number), outcome(number), session)
        line.send(Result(cell(number), outcome(number), "", session))
    line.recv()  # until the kill


def killed(worker: Worker, moments: random.Random) -> list[Any]:
    """Kill a worker after some of its steps and somewhere within one; return all that it said."""
    said = [worker.line.recv() for _ in range(moments.randint(1, 12))]
    time.sleep(moments.uniform(0.0, 0.02))
    worker.process.kill()
    worker.process.join()
    assert worker.process.exitcode == -signal.SIGKILL
    with contextlib.suppress(EOFError):
        while True:
            said.append(worker.line.recv())
    return said


def check(path: Path) -> None:
    with raw(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_after_a_kill_all_that_was_recorded_is_there_and_whole(path: Path) -> None:
    moments = random.Random(0)
    everything = range(N_KILLS * N_MOST)
    Store(path).set_plan(PLAN, {"title": "t"}, cells(*everything))
    expected = [Result(cell(number)) for number in everything]
    for turn in range(N_KILLS):
        with working(record_results, path, turn * N_MOST) as (worker,):
            said = killed(worker, moments)
        for result in said:
            expected[result.cell.seed] = result
        found = results(Store.existing(path))
        # It may have taken one step more that there was no time to tell of.
        last = said[-1].cell.seed
        if said[-1].outcome is None:
            further = Result(cell(last), outcome(last), "", said[-1].session)
        else:
            further = Result(cell(last + 1), None, reason(last + 1), said[-1].session)
        if found[further.cell.seed] == further:
            expected[further.cell.seed] = further
        assert found == expected
        check(path)
    assert sum(result.outcome is not None for result in expected) > N_KILLS


def make(folder: Path, turn: int, line: Connection) -> None:
    for number in itertools.count():
        Store(folder / f"{turn}-{number}.sqlite")
        line.send(number)


def test_after_a_kill_while_files_are_made_each_can_be_taken_up(tmp_path: Path) -> None:
    moments = random.Random(1)
    for turn in range(10):
        with working(make, tmp_path, turn) as (worker,):
            n_made = killed(worker, moments)[-1] + 1
        paths = [tmp_path / f"{turn}-{number}.sqlite" for number in range(n_made + 1)]
        assert all(path.stat().st_size > 0 for path in paths[:-1])
        for path in paths:  # the last one may be absent, empty, or with a journal next to it
            assert Store(path).begin_session({}) == 1
            check(path)
        assert len(list(tmp_path.glob(f"{turn}-*"))) == len(paths)


def test_the_material_of_these_tests_is_larger_than_a_page(store: Store) -> None:
    # A row within one page could hardly be half written.
    with raw(store.path) as database:
        (page,) = database.execute("PRAGMA page_size").fetchone()
    document = plain(outcome(1))
    assert len(json.dumps(document)) > page < len(reason(1))
    assert len(CURVE) < 100


def test_a_file_with_views_is_refused(tmp_path: Path) -> None:
    """A view in the place of a table could work without end."""
    path = tmp_path / "results.sqlite"
    Store(path)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE plans")
        endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT i, i FROM n"
        database.execute(f"CREATE VIEW plans (name, document) AS {endless}")
        database.commit()
    with pytest.raises(FormatError, match="unexpected views or triggers"):
        Store.existing(path)
