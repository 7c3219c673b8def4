"""Results of a bench in one SQLite file, whole after any kill and open to several writers.

    cells     a row per cell that was carried out: finished, or failed with its reason
    plans     documents of plans by name, each as it was last given
    wanted    the cells of every plan in its order, under its names; several may share one result
    sessions  when, where and with which versions cells were carried out
    passes    how long encoding images took with a bundle, so that a cell can be charged for it

A finished cell is never replaced: by a failure, nor by a second result of another process.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ztune.errors import FormatError, StorageError
from ztune.experiments.cells import Cell, Outcome
from ztune.experiments.plan_document import PlanDocument, asked, with_found
from ztune.io.config import as_json
from ztune.io.schema import T, convert, decoded, plain
from ztune.types import Json

APPLICATION = 0x7A74756E
"""SQLite's application_id of our files."""
VERSION = 2
_PATIENCE = 120.0
"""Seconds to wait for another writer."""
_TABLES = """
CREATE TABLE cells (key TEXT PRIMARY KEY, cell TEXT NOT NULL, session INTEGER NOT NULL,
                    outcome TEXT, reason TEXT, CHECK ((outcome IS NULL) <> (reason IS NULL)));
CREATE TABLE plans (name TEXT PRIMARY KEY, document TEXT NOT NULL);
CREATE TABLE wanted (plan TEXT NOT NULL, place INTEGER NOT NULL, key TEXT, cell TEXT NOT NULL,
                     PRIMARY KEY (plan, place));
CREATE TABLE sessions (id INTEGER PRIMARY KEY, document TEXT NOT NULL);
CREATE TABLE passes (bundle TEXT NOT NULL, images INTEGER NOT NULL, seconds REAL NOT NULL);
"""
_PLANS = "SELECT name FROM plans ORDER BY rowid"
_DOCUMENT = "SELECT document FROM plans WHERE name = ?"
_KEYS = "SELECT cell, key FROM wanted WHERE plan = ?"
_RESULTS = """
SELECT wanted.cell, outcome, reason, session
FROM wanted LEFT JOIN cells ON cells.key = wanted.key WHERE plan = ? ORDER BY place
"""
_LEFT_OUT = """
SELECT count(*) FROM cells
WHERE outcome IS NOT NULL AND key NOT IN (SELECT key FROM wanted WHERE key IS NOT NULL)
"""
_RATES = """
SELECT bundle, sum(seconds) / sum(images) FROM passes GROUP BY bundle HAVING sum(images) > 0
"""


@dataclass(frozen=True)
class Result:
    """A cell and what came of it: an outcome, a reason why there is none, or neither yet."""

    cell: Cell
    outcome: Outcome | None = None
    reason: str = ""
    session: int | None = None


Session = Mapping[str, Json]
"""When, where and with what cells were carried out; nothing of it need be there."""


@dataclass(frozen=True)
class View:
    """What a report of one plan is about, all of it of one moment."""

    plan: str
    document: PlanDocument
    """The plan, as it was last given."""
    results: tuple[Result, ...]
    """Its cells in its order, each with what came of it so far."""
    n_left_out: int
    """Finished cells that no plan has."""
    sessions: Mapping[int, Session]
    """Circumstances by their number."""
    rates: Mapping[str, float]
    """Seconds that encoding an image takes, by the bundle's digest; absent where none was."""


class Store:
    """The file of results; every method is one transaction."""

    def __init__(self, path: Path):
        """Take up the file, or make it.

        Raises: FormatError when it is none of ours, or of a version that this program cannot read.
        """
        self.path = path
        self._where = f'results "{path}"'
        if path.exists() and not (path.is_file() or path.is_dir()):  # SQLite itself names a folder
            raise FormatError(f"{self._where}: not a regular file")
        # Looked at first without a lock: whoever only reads waits for no writer, and needs no
        # permission to write.
        with self._open() as database:
            database.execute("BEGIN")  # to see one moment of a file that another makes right now
            if not self._is_new(database):
                return
        with self._changing() as database:
            if self._is_new(database):
                for statement in _TABLES.split(";"):
                    database.execute(statement)
                database.execute(f"PRAGMA application_id = {APPLICATION}")
                database.execute(f"PRAGMA user_version = {VERSION}")

    @classmethod
    def existing(cls, path: Path) -> Store:
        """Take up a file that is there.

        Raises: FormatError.
        """
        if not path.is_file():
            raise FormatError(f'results "{path}": there is no such file')
        return cls(path)

    def _is_new(self, database: sqlite3.Connection) -> bool:
        # A view or trigger of somebody's file could work without end; ours has none.
        odd = "SELECT count(*) FROM sqlite_master WHERE type NOT IN ('table', 'index')"
        if database.execute(odd).fetchone()[0]:
            raise FormatError(f"{self._where}: it has views or triggers (not written by ztune)")
        tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        (application,) = database.execute("PRAGMA application_id").fetchone()
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if not (tables or application or version):
            return True
        if application != APPLICATION:
            raise FormatError(f"{self._where}: this is no file of ztune bench")
        if version != VERSION:
            age, what = ("older", "keep it, and name another `out`")
            if version > VERSION:
                age, what = ("newer", "upgrade ztune")
            raise FormatError(
                f"{self._where}: format version {version} is {age} than this ztune's {VERSION} "
                f"({what})"
            )
        return False

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            database = sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None)
            try:
                database.execute("PRAGMA trusted_schema = OFF")
                database.execute("PRAGMA synchronous = FULL")
                yield database
            finally:
                database.close()
        except sqlite3.Error as error:
            if "full" in str(error):
                raise StorageError(
                    f"{self._where}: {error} (free some space, and go on with the same command and "
                    "`resume`)"
                ) from None
            raise FormatError(f"{self._where}: {error}") from None

    @contextlib.contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """Yield the file with nobody else writing to it; all that is done counts, or nothing."""
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                if database.in_transaction:  # a full disk ends it by itself
                    database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")

    def begin(self, document: Mapping[str, Json]) -> int:
        """Note the circumstances of cells to come; return what they refer to them by."""
        with self._changing() as database:
            done = database.execute("INSERT INTO sessions (document) VALUES (?)", [_text(document)])
        return int(done.lastrowid or 0)

    def set_plan(
        self,
        plan: str,
        document: Mapping[str, Json],
        cells: Mapping[Cell, str | None],
    ) -> None:
        """Set the cells of a plan, with their keys and in order.

        As long as the plan asks for the same, what is null because its data were not read stays as
        it was: keys of cells, and what was `found` of the document's data.
        """
        names = [(_text(as_json(cell)), key) for cell, key in cells.items()]
        with self._changing() as database:
            found = database.execute(_DOCUMENT, [plan]).fetchone()
            known: dict[str, str | None] = {}
            if found is not None:
                earlier = decoded(found[0], self._where)
                if asked(earlier) == asked(document):
                    known = dict(database.execute(_KEYS, [plan]).fetchall())
                    document = with_found(document, earlier)
            rows = [
                (plan, place, known.get(cell) if key is None else key, cell)
                for place, (cell, key) in enumerate(names)
            ]
            database.execute("DELETE FROM wanted WHERE plan = ?", [plan])
            database.executemany("INSERT INTO wanted VALUES (?, ?, ?, ?)", rows)
            database.execute(
                "INSERT INTO plans VALUES (?, ?) "
                "ON CONFLICT (name) DO UPDATE SET document = excluded.document",
                [plan, _text(document)],
            )

    def finish(self, key: str, cell: Cell, outcome: Outcome, session: int) -> None:
        """Record what a cell measured, where nobody has."""
        self._record(key, cell, session, _text(plain(outcome)), None)

    def fail(self, key: str, cell: Cell, reason: str, session: int) -> None:
        """Record why a cell has no result, where it has none."""
        self._record(key, cell, session, None, escape_surrogates(reason) or "no reason was given")

    def _record(
        self, key: str, cell: Cell, session: int, outcome: str | None, reason: str | None
    ) -> None:
        with self._changing() as database:
            database.execute(
                "INSERT INTO cells (key, cell, session, outcome, reason) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (key) DO UPDATE SET session = excluded.session, "
                "outcome = excluded.outcome, reason = excluded.reason WHERE outcome IS NULL",
                [key, _text(as_json(cell)), session, outcome, reason],
            )

    def add_pass(self, bundle: str, images: int, seconds: float) -> None:
        """Note that encoding so many images took so many seconds of one worker."""
        with self._changing() as database:
            database.execute("INSERT INTO passes VALUES (?, ?, ?)", [bundle, images, seconds])

    def finished(self) -> set[str]:
        """Return the keys of all cells that have an outcome, whatever plan has them."""
        query = "SELECT key FROM cells WHERE outcome IS NOT NULL"
        with self._open() as database:
            return {str(key) for (key,) in database.execute(query)}

    def plans(self) -> list[str]:
        """Return the names of the plans that were given.

        Raises: FormatError where there was none.
        """
        with self._open() as database:
            names = [str(name) for (name,) in database.execute(_PLANS)]
        if not names:
            raise FormatError(f"{self._where}: no plan was carried out yet")
        return names

    def title_of(self, plan: str) -> str | None:
        """Return the title that a plan had when it was last given; None where it was not."""
        with self._open() as database:
            found = database.execute(_DOCUMENT, [plan]).fetchone()
        return None if found is None else self._read(found[0], PlanDocument).title

    def view(self, plan: str) -> View:
        """Return what there is of a plan.

        Raises: FormatError for an unknown plan, or a row that does not read.
        """
        with self._open() as database:
            database.execute("BEGIN")  # one moment
            found = database.execute(_DOCUMENT, [plan]).fetchone()
            cells = database.execute(_RESULTS, [plan]).fetchall()
            (n_left_out,) = database.execute(_LEFT_OUT).fetchone()
            sessions = database.execute("SELECT id, document FROM sessions ORDER BY id").fetchall()
            rates = database.execute(_RATES).fetchall()
        if found is None:
            raise FormatError(f'{self._where}: there is no plan "{plan}"')
        return View(
            plan,
            self._read(found[0], PlanDocument),
            tuple(self._result(*row) for row in cells),
            int(n_left_out),
            {int(number): decoded(document, self._where) for number, document in sessions},
            {str(bundle): float(rate) for bundle, rate in rates},
        )

    def _result(
        self, cell: str, outcome: str | None, reason: str | None, session: int | None
    ) -> Result:
        done = None if outcome is None else self._read(outcome, Outcome)
        return Result(self._read(cell, Cell), done, reason or "", session)

    def _read(self, text: str, kind: type[T]) -> T:
        return convert(decoded(text, self._where), kind, self._where)


def escape_surrogates(text: str) -> str:
    """Return a text that SQLite takes: half a surrogate pair, from the name of a file, is none."""
    return text.encode(errors="backslashreplace").decode()


def _text(document: Mapping[str, Json]) -> str:
    return json.dumps(document, ensure_ascii=False, allow_nan=False)
