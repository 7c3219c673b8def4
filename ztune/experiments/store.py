"""Results of a bench in one SQLite file: crash-safe, with several writers.

    cells     a row per cell that was run: finished, or failed with its reason
    plans     the latest document of every plan, by name
    wanted    the cells of every plan, in order and by name; several may share a result
    sessions  date, machine and versions of runs
    passes    seconds of encoding images with a bundle, which cells are charged for

A finished cell is never replaced, neither by a failure nor by another result.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ztune.data.manifests import escape_surrogates
from ztune.data.split import LeftOut, together
from ztune.errors import FormatError, StorageError
from ztune.experiments.cells import Cell, Outcome
from ztune.experiments.plan_document import PlanDocument, with_findings, without_findings
from ztune.experiments.protocols import TRANSFERS
from ztune.io.config import as_json
from ztune.io.schema import T, convert, decoded, plain
from ztune.types import Json

APPLICATION = 0x7A74756E
"""SQLite application_id."""
VERSION = 3
_OLDEST = 2
"""Without the peak memory of passes."""
_PATIENCE = 120.0
"""Seconds to wait for another writer."""
_TABLES = """
CREATE TABLE cells (key TEXT PRIMARY KEY, cell TEXT NOT NULL, session INTEGER NOT NULL,
                    outcome TEXT, reason TEXT, CHECK ((outcome IS NULL) <> (reason IS NULL)));
CREATE TABLE plans (name TEXT PRIMARY KEY, document TEXT NOT NULL);
CREATE TABLE wanted (plan TEXT NOT NULL, place INTEGER NOT NULL, key TEXT, cell TEXT NOT NULL,
                     PRIMARY KEY (plan, place));
CREATE TABLE sessions (id INTEGER PRIMARY KEY, document TEXT NOT NULL);
CREATE TABLE passes (bundle TEXT NOT NULL, images INTEGER NOT NULL, seconds REAL NOT NULL,
                     peak_memory_mb REAL);
"""
_PLANS = "SELECT name FROM plans ORDER BY rowid"
_DOCUMENT = "SELECT document FROM plans WHERE name = ?"
_KEYS = "SELECT cell, key FROM wanted WHERE plan = ?"
_RESULTS = """
SELECT wanted.cell, outcome, reason, session
FROM wanted LEFT JOIN cells ON cells.key = wanted.key WHERE plan = ? ORDER BY place
"""
_BY_KEY = "SELECT key, outcome, reason, session FROM cells"
_LEFT_OUT = """
SELECT count(*) FROM cells
WHERE outcome IS NOT NULL AND key NOT IN (SELECT key FROM wanted WHERE key IS NOT NULL)
"""
_PASSES = """
SELECT bundle, sum(seconds) / sum(images), {memory} FROM passes
GROUP BY bundle HAVING sum(images) > 0
"""


@dataclass(frozen=True)
class Result:
    """A cell with its outcome, the reason of its failure, or neither yet."""

    cell: Cell
    outcome: Outcome | None = None
    reason: str = ""
    session: int | None = None


@dataclass(frozen=True)
class ImagePass:
    """Cost of encoding images with one model."""

    seconds_per_image: float
    peak_memory_mb: float | None
    """None unless measured in separate processes."""


Session = Mapping[str, Json]
"""Date, machine and versions of a run; every field may be missing."""


@dataclass(frozen=True)
class View:
    """A consistent snapshot of one plan's results."""

    plan: str
    document: PlanDocument
    """The latest version of the plan."""
    results: tuple[Result, ...]
    """Its cells, in order."""
    n_left_out: int
    """Finished cells of no plan."""
    sessions: Mapping[int, Session]
    """By id."""
    passes: Mapping[str, ImagePass]
    """By bundle digest."""

    @property
    def left_out(self) -> dict[str, LeftOut]:
        """The files that are not used, by data set that was read."""
        found = {name: [one.left_out] for name, one in self.document.found.items()}
        for result in self.results:
            cell, outcome = result.cell, result.outcome
            for score in outcome.scores if outcome else ():
                tested = score.part if cell.protocol in TRANSFERS else cell.data
                found.setdefault(tested, []).append(LeftOut(broken=score.broken))
            if outcome:
                found.setdefault(cell.data, []).append(LeftOut(broken=outcome.broken))
        return {name: together(parts) for name, parts in found.items()}


class Store:
    """The file of results; every method is one transaction."""

    def __init__(self, path: Path):
        """Open or create the file.

        Raises: FormatError for a foreign file or another version.
        """
        self.path = path
        self._where = f'results "{path}"'
        if path.exists() and not (path.is_file() or path.is_dir()):  # SQLite reports a folder
            raise FormatError(f"{self._where}: not a regular file")
        # Checked first without a lock: readers need no write permission and wait for no writer.
        with self._open() as database:
            database.execute("BEGIN")  # a consistent read while another process creates it
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
        """Open an existing file.

        Raises: FormatError.
        """
        if not path.is_file():
            raise FormatError(f'results "{path}" do not exist')
        return cls(path)

    def _is_new(self, database: sqlite3.Connection) -> bool:
        # A view or trigger in a foreign file could run without end.
        odd = "SELECT count(*) FROM sqlite_master WHERE type NOT IN ('table', 'index')"
        if database.execute(odd).fetchone()[0]:
            raise FormatError(
                f"{self._where}: unexpected views or triggers (not written by ztune bench)"
            )
        tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        (application,) = database.execute("PRAGMA application_id").fetchone()
        version = _version(database)
        if not (tables or application or version):
            return True
        if application != APPLICATION:
            raise FormatError(f"{self._where}: not a results file of ztune bench")
        if not _OLDEST <= version <= VERSION:
            wrong = f"newer than this ztune reads ({VERSION}); upgrade ztune"
            if version < _OLDEST:
                wrong = f"older than this ztune reads (from {_OLDEST}); use another `out`"
            raise FormatError(f"{self._where}: format version {version} is {wrong}")
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
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if "full" in str(error):
                raise StorageError(
                    f"{self._where}: {error} (free some space, then resume with the same command "
                    "and `resume`)"
                ) from None
            raise FormatError(f"{self._where}: {error}") from None

    @contextlib.contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """Yield the database in an exclusive write transaction."""
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                if _version(database) == _OLDEST:
                    database.execute("ALTER TABLE passes ADD COLUMN peak_memory_mb REAL")
                    database.execute(f"PRAGMA user_version = {VERSION}")
                yield database
            except BaseException:
                if database.in_transaction:  # a full disk ends it
                    database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")

    def begin_session(self, document: Mapping[str, Json]) -> int:
        """Add a session; return its id."""
        with self._changing() as database:
            done = database.execute("INSERT INTO sessions (document) VALUES (?)", [_text(document)])
        return int(done.lastrowid or 0)

    def set_plan(
        self,
        plan: str,
        document: Mapping[str, Json],
        cells: Mapping[Cell, str | None],
    ) -> None:
        """Set a plan's document and its cells, with keys and in order.

        While the plan is unchanged, null values of data that were not read (keys, `found`) keep
        their earlier values.
        """
        names = [(_text(as_json(cell)), key) for cell, key in cells.items()]
        with self._changing() as database:
            found = database.execute(_DOCUMENT, [plan]).fetchone()
            known: dict[str, str | None] = {}
            if found is not None:
                earlier = decoded(found[0], self._where)
                if without_findings(earlier) == without_findings(document):
                    known = dict(database.execute(_KEYS, [plan]).fetchall())
                    document = with_findings(document, earlier)
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
        """Record a cell's outcome, unless it has one."""
        self._record(key, cell, session, _text(plain(outcome)), None)

    def fail(self, key: str, cell: Cell, reason: str, session: int) -> None:
        """Record why a cell failed, unless it has an outcome."""
        self._record(key, cell, session, None, escape_surrogates(reason) or "no reason given")

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

    def add_pass(
        self, bundle: str, images: int, seconds: float, peak_memory_mb: float | None = None
    ) -> None:
        """Add the cost of encoding images."""
        row = [bundle, images, seconds, peak_memory_mb]
        with self._changing() as database:
            database.execute("INSERT INTO passes VALUES (?, ?, ?, ?)", row)

    def finished(self) -> set[str]:
        """Return the keys of all finished cells, of any plan."""
        query = "SELECT key FROM cells WHERE outcome IS NOT NULL"
        with self._open() as database:
            return {str(key) for (key,) in database.execute(query)}

    def plans(self) -> list[str]:
        """Return the names of all plans.

        Raises: FormatError without plans.
        """
        with self._open() as database:
            names = [str(name) for (name,) in database.execute(_PLANS)]
        if not names:
            raise FormatError(f"{self._where}: no plan was run yet")
        return names

    def title_of(self, plan: str) -> str | None:
        """Return a plan's title, None for an unknown plan."""
        with self._open() as database:
            found = database.execute(_DOCUMENT, [plan]).fetchone()
        return None if found is None else self._read(found[0], PlanDocument).title

    def view(self, plan: str, own: Mapping[Cell, str | None] | None = None) -> View:
        """Return a plan's results, or those of the cells `own` with their keys.

        Raises: FormatError for an unknown plan or an invalid row.
        """
        with self._open() as database:
            database.execute("BEGIN")  # a consistent read
            found = database.execute(_DOCUMENT, [plan]).fetchone()
            cells = database.execute(_RESULTS, [plan]).fetchall()
            if own is not None:
                known = {key: rest for key, *rest in database.execute(_BY_KEY)}
                none = (None, None, None)
                cells = [(_text(as_json(c)), *known.get(key, none)) for c, key in own.items()]
            (n_left_out,) = database.execute(_LEFT_OUT).fetchone()
            sessions = database.execute("SELECT id, document FROM sessions ORDER BY id").fetchall()
            memory = "NULL" if _version(database) == _OLDEST else "max(peak_memory_mb)"
            passes = database.execute(_PASSES.format(memory=memory)).fetchall()
        if found is None:
            raise FormatError(f'{self._where}: unknown plan "{plan}"')
        return View(
            plan,
            self._read(found[0], PlanDocument),
            tuple(self._result(*row) for row in cells),
            int(n_left_out),
            {int(number): decoded(document, self._where) for number, document in sessions},
            {str(bundle): ImagePass(float(rate), memory) for bundle, rate, memory in passes},
        )

    def _result(
        self, cell: str, outcome: str | None, reason: str | None, session: int | None
    ) -> Result:
        done = None if outcome is None else self._read(outcome, Outcome)
        return Result(self._read(cell, Cell), done, reason or "", session)

    def _read(self, text: str, kind: type[T]) -> T:
        return convert(decoded(text, self._where), kind, self._where)


def _version(database: sqlite3.Connection) -> int:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    return int(version)


def _text(document: Mapping[str, Json]) -> str:
    return json.dumps(document, ensure_ascii=False, allow_nan=False)
