"""Results of a bench by hand: a store with the cells of a test."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ztune.experiments.cells import Cell, Outcome, PartScore, Point, key_of
from ztune.experiments.store import Store
from ztune.io.config import as_json
from ztune.types import Json

PLAN = "plan"
"""What every store's plan is called."""
OUTCOME = Outcome(
    uses="zip",
    config={"n_context": 8},
    run="one",
    artifact="ab" * 32,
    result_bytes=1000,
    n_train=32,
    n_val=8,
    copies=0,
    queries=100,
    probe_queries=20,
    text_forwards=1200,
    image_forwards=50,
    image_forwards_cached=40,
    seconds=10.0,
    stop_reason="budget",
    train_loss=0.5,
    scores=(),
    curve=(),
)
SESSION: dict[str, Json] = {
    "began": "2026-02-03T04:05:06",
    "command": "ztune bench plan.toml --out out",
    "versions": {"ztune": "0.1.0", "numpy": "2.0"},
    "machine": {"processor": "a processor", "cores": 4},
    "commit": "0123abc",
    "workers": 2,
    "executor": "process",
    "provider": "cpu",
}


@dataclass(frozen=True)
class Row:
    """A method on one data set: an accuracy per seed, or by part; None: not run."""

    method: str
    data: str
    accuracy: Sequence[float | Mapping[str, float | None] | str | None]
    """Of seeds 1, 2, …; a string is the reason of a failure."""
    shots: int = 16
    protocol: str = "few-shot"
    model: str = "clip"
    zero_shot: float = 0.5
    outcome: Outcome = OUTCOME


def score(part: str, accuracy: float | None, zero_shot: float) -> PartScore:
    """Return a score whose figures by class are 0.1 below the others."""
    of_classes = None if accuracy is None else accuracy - 0.1
    return PartScore(part, 100, 10, zero_shot, zero_shot - 0.1, accuracy, of_classes)


def digest_of(model: str) -> str:
    """Return a stand-in for the digest of a model's bundle."""
    return f"digest of {model}"


def store_of(
    folder: Path,
    rows: Sequence[Row],
    *,
    title: str = "a title",
    uses: Mapping[str, str] | None = None,
    data: Mapping[str, str] | None = None,
    known_as: Mapping[str, str] | None = None,
    remarks: Mapping[str, Sequence[str]] | None = None,
) -> Store:
    """Return a store of the rows' cells, wanted by PLAN in their order.

    `data` is what is shown of data sets, `known_as` the known names that some of them are meant by.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(folder / "results.sqlite")
    session = store.begin_session(SESSION)
    cells = {}
    for row in rows:
        for seed, found in enumerate(row.accuracy, start=1):
            cell = Cell(row.protocol, row.model, row.data, row.method, row.shots, seed)
            key = key_of(as_json(cell))
            cells[cell] = key
            if isinstance(found, str):
                store.fail(key, cell, found, session)
            elif found is not None:
                parts = found if isinstance(found, Mapping) else {"test": found}
                scores = tuple(score(p, value, row.zero_shot) for p, value in parts.items())
                store.finish(key, cell, replace(row.outcome, scores=scores), session)
    shown, known, said = data or {}, known_as or {}, remarks or {}
    models, names = ({getattr(row, of): None for row in rows} for of in ("model", "data"))
    document: dict[str, Json] = {
        "title": title,
        "models": {name: {"digest": digest_of(name)} for name in models},
        "data": {
            name: {
                "title": shown.get(name, name),
                "found": {"known_as": known.get(name), "remarks": [*said.get(name, ())]},
            }
            for name in names
        },
        "methods": {label: {"uses": name} for label, name in (uses or {}).items()},
    }
    store.set_plan(PLAN, document, cells)
    return store


def curve(*points: tuple[int, float | None, float]) -> Outcome:
    """Return an outcome with a curve of (queries, seconds, accuracy)."""
    return replace(OUTCOME, curve=tuple(Point(*point) for point in points))
