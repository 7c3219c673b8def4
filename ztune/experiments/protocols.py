"""The papers' protocols: which pictures tune, and which test what has come of it.

few-shot              so many shots per class; all test pictures
base-to-new           tuned on the first half of the classes; their test pictures, and the others'
cross-data-set        tuned on all classes of a source; the test pictures of other data sets
out-of-distribution   the same with variants of the source: its classes, or some of them

Shots are drawn and classes divided as CoOp (arXiv 2109.01134) and CoCoOp (arXiv 2203.05557) do it,
see data/coop.py. A task is complete in itself: what is tuned never sees the pictures of its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ztune.data.coop import CoopSplit, Item, base_and_new, by_label, few_shot
from ztune.data.library import shown
from ztune.data.split import Entry, Split, SplitSettings
from ztune.errors import DataError

PROTOCOLS = ("few-shot", "base-to-new", "cross-data-set", "out-of-distribution")
TRANSFERS = ("cross-data-set", "out-of-distribution")
"""Those that tune on one data set and test on others."""
_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Source:
    """A data set."""

    name: str
    root: Path
    """What the lists' paths are relative to; absolute."""
    lists: CoopSplit
    templates: tuple[str, ...]
    """Hand-written prompts of its classes."""


@dataclass(frozen=True)
class Part:
    """Pictures to score a result on."""

    name: str
    """test, base or new; a data set's name where it is not the source."""
    source: Source
    lists: CoopSplit
    """All that there is of its classes; only `test` is scored."""

    @property
    def items(self) -> tuple[Item, ...]:
        return self.lists.test

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that a picture may be taken for, those without test pictures included."""
        return classes_of([item for _, item in self.lists])


@dataclass(frozen=True)
class Task:
    """What one result is tuned on and scored on."""

    protocol: str
    source: Source
    shots: int
    seed: int
    drawn: CoopSplit
    """Pictures to tune with and to validate on; no others."""
    parts: tuple[Part, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return classes_of(self.drawn.train)


def classes_of(items: Sequence[Item]) -> tuple[str, ...]:
    """Return the class names as templates take them, sorted by code point, each once."""
    return tuple(sorted({shown(item.name) for item in items}))


def task_of(
    protocol: str, source: Source, targets: Sequence[Source], shots: int, seed: int
) -> Task:
    """Draw a protocol's task; `targets` are those of a transfer, none otherwise.

    Raises: DataError where the source cannot be tuned on, or a part has nothing to test on.
    """
    if not source.lists.train:
        raise DataError(f'data set "{source.name}" has no pictures to tune with, only to test on')
    drawn = few_shot(source.lists, shots, seed)
    if protocol == "base-to-new":
        base, new = base_and_new(drawn)
        drawn = base
        parts = [Part("base", source, base), Part("new", source, new)]
    elif protocol == "few-shot":
        parts = [Part("test", source, drawn)]
    else:
        parts = [Part(target.name, target, target.lists) for target in targets]
    for part in parts:
        if (n := len(classes_of(part.items))) < 2:
            raise DataError(
                f'data set "{part.source.name}" has test pictures of {n} {_group(part)}class(es), '
                "at least 2 are needed"
            )
    return Task(protocol, source, shots, seed, CoopSplit(drawn.train, drawn.val), tuple(parts))


def _group(part: Part) -> str:
    """Return which classes a message is about, with a space, where there are several groups."""
    return "" if part.name == "test" else f"{part.name} "


def remarks_on(task: Task) -> list[str]:
    """Return what is unusual about a task, a line each."""
    remarks = []
    groups = by_label(task.drawn.train)
    if short := [group for group in groups.values() if len(group) < task.shots]:
        fewest = min(short, key=len)
        remarks.append(
            f"{len(short)} class(es) have fewer than {task.shots} pictures to tune with and give "
            f'all they have, "{fewest[0].name}" {len(fewest)}'
        )
    if not task.drawn.val:
        remarks.append("no validation pictures: heads take their settings from the shots")
    for part in task.parts:
        if untested := sorted(set(part.classes) - set(classes_of(part.items))):
            named = ", ".join(untested[:_SHOWN])
            remarks.append(
                f"{len(untested)} {_group(part)}class(es) have no test pictures, and are wrong "
                f"answers: {named}"
            )
    if task.protocol == "out-of-distribution":
        for part in task.parts:
            if unknown := sorted(set(part.classes) - set(task.classes)):
                named = ", ".join(unknown[:_SHOWN])
                remarks.append(
                    f"{len(unknown)} of {len(part.classes)} classes of {part.name} are none of "
                    f"{task.source.name}'s: {named} (is it a variant of it?)"
                )
    return remarks


def split_of(task: Task, digest: Callable[[Path], str]) -> Split:
    """Return the pictures to tune with as a run takes them; `digest` is a file's SHA-256.

    A picture that the protocol lists twice, or under two roles, stays so.
    """
    label_of = {name: label for label, name in enumerate(task.classes)}
    root = task.source.root
    entries = [
        Entry("data", item.path, digest(root / item.path), label_of[shown(item.name)], role)
        for role, item in task.drawn
    ]
    entries.sort(key=lambda entry: (entry.role, entry.label))  # train before val; shots as drawn
    settings = SplitSettings(task.shots, test_fraction=0.0, seed=task.seed)
    return Split({"data": root}, task.classes, tuple(entries), settings, ())
