"""The text of a report: progress, remarks, failures and environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ztune.experiments.render import code_in_markdown, in_markdown
from ztune.experiments.store import Result, Session, View
from ztune.experiments.tables import counted
from ztune.printing import one_line
from ztune.types import Json


def describe_progress(results: Sequence[Result]) -> str:
    """Return how many cells are finished, failed and missing."""
    finished = sum(result.outcome is not None for result in results)
    failed = sum(bool(result.reason) for result in results)
    missing = len(results) - finished - failed
    words = [f"{finished:,} of {counted(len(results), 'cell')} finished"]
    if failed:
        words.append(f"{failed:,} failed")
    if missing:
        words.append(f"{counted(missing, 'cell')} not run yet")
    return ", ".join(words) + "."


def list_remarks(view: View) -> list[str]:
    """Return the remarks on the data, a line of Markdown each."""
    found = view.document.found
    said = [f"{name}: {one}" for name, data in found.items() for one in data.remarks]
    return [in_markdown(remark) for remark in said]


def list_failures(results: Sequence[Result]) -> list[str]:
    """Return a line of Markdown per reason and group of cells, in plan order."""
    groups: dict[tuple[str, str], dict[int, list[int]]] = {}
    for result in results:
        if result.reason:
            cell = result.cell
            what = f"{cell.protocol}, {cell.model}, {cell.data}, {cell.method}"
            group = groups.setdefault((what, result.reason), {})
            group.setdefault(cell.shots, []).append(cell.seed)
    return [
        in_markdown(f"{what}, {_shots_and_seeds(group)}: {reason}")
        for (what, reason), group in groups.items()
    ]


def _shots_and_seeds(group: Mapping[int, Sequence[int]]) -> str:
    """Return the failed cells, as `16 shots (seeds 1, 2)`."""
    return ", ".join(
        f"{counted(shots, 'shot')} (seed{'s' if len(seeds) > 1 else ''} "
        f"{', '.join(map(str, seeds))})"
        for shots, seeds in group.items()
    )


def describe_environment(view: View) -> list[str]:
    """Return lines of Markdown: remarks on the cells, then date, machine and versions."""
    results = view.results
    lines = []
    if view.n_left_out:
        lines.append(f"Left out: {counted(view.n_left_out, 'result')} of no plan.")
    if missing := sum(result.outcome is None and not result.reason for result in results):
        lines.append(f"{counted(missing, 'cell')} not run yet.")
    copies = sum(result.outcome.copies > 0 for result in results if result.outcome is not None)
    if copies:
        lines.append(
            f"{counted(copies, 'cell')} with a test image that is byte-identical to a training or "
            "validation image (cells.csv, column copies)."
        )
    return lines + _sessions(view.sessions, results)


def _sessions(sessions: Mapping[int, Session], results: Sequence[Result]) -> list[str]:
    """Return a line per group of equal sessions.

    Sessions without a cell of this report are left out.
    """
    used = {result.session for result in results}
    groups: dict[str, list[int]] = {}
    for number, session in sessions.items():
        if number not in used:
            continue
        groups.setdefault(_setting(session), []).append(number)
    return [
        f"{', '.join(in_markdown(_began(sessions[n])) for n in numbers)} "
        f"({counted(sum(result.session in numbers for result in results), 'cell')} of this "
        f"report): {setting}"
        for setting, numbers in groups.items()
    ]


def _began(session: Session) -> str:
    return _plain(session.get("began"))


def _setting(values: Session) -> str:
    """Return a session without its date; missing fields are left out."""
    command = _plain(values.get("command"))
    words = [code_in_markdown(command)] if command else []
    workers = values.get("workers")
    if isinstance(workers, int):
        executor = _plain(values.get("executor"))
        words.append(
            counted(workers, "worker") + (f" ({in_markdown(executor)})" if executor else "")
        )
    for key in ("provider", "commit"):
        if values.get(key):
            words.append(f"{key} {in_markdown(_plain(values[key]))}")
    for key in ("machine", "versions"):
        found = values.get(key)
        if isinstance(found, dict):
            words.append(
                in_markdown(", ".join(f"{name} {_plain(value)}" for name, value in found.items()))
            )
    return "; ".join(words) + "."


def _plain(value: Json) -> str:
    return "" if value is None else one_line(str(value))
