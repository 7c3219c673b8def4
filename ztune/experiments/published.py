"""What papers printed of methods, read from published.toml and checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources

from ztune.data.named import NAMED
from ztune.errors import FormatError
from ztune.experiments.protocols import PROTOCOLS
from ztune.io.fields import Fields
from ztune.io.toml import parsed_toml
from ztune.methods.registry import METHODS

AVERAGE = "average of 11"
AVERAGED = (
    "caltech101", "oxfordpets", "flowers102", "food101", "fgvcaircraft", "sun397", "dtd",
    "eurosat", "ucf101", "stanfordcars", "imagenet",
)  # fmt: skip
"""CoOp's data sets, which published averages are over."""
_FILE = "published.toml"
_TOP = {"protocol", "model", "shots", "series"}
_SERIES = {"method", "title", "paper", "arxiv", "origin", "queries", "steps", "accuracy"}
_ARXIV = re.compile(r"\d{4}\.\d{5}")


@dataclass(frozen=True)
class Published:
    """One figure that a paper prints."""

    method: str | None
    """Its name in the table of methods; None: not one of ours."""
    title: str
    """What the papers call it."""
    paper: str
    """Where the method was published, with the number at arXiv."""
    origin: str
    """Where the figure stands, as far as that is known."""
    protocol: str
    model: str
    shots: int
    budget: str
    """Queries or steps; empty where there are none, or it was not noted."""
    data: str
    """A name of data/named.py, or AVERAGE."""
    accuracy: float
    """In per cent, as printed."""


def published() -> tuple[Published, ...]:
    """Return all published figures, in the file's order.

    Raises: FormatError naming the series and the field that is wrong.
    """
    text = resources.files("ztune.experiments").joinpath(_FILE).read_text(encoding="utf-8")
    return published_in(text)


def published_in(text: str) -> tuple[Published, ...]:
    """Return the figures of a text in the form of published.toml.

    Raises: FormatError naming the series and the field that is wrong; ConfigError for no TOML.
    """
    top = Fields(parsed_toml(text, _FILE), _FILE)
    _require_known(top, _TOP)
    return tuple(figure for series in top.objects("series") for figure in _figures(top, series))


def _figures(top: Fields, series: Fields) -> list[Published]:
    _require_known(series, _SERIES)
    arxiv = series.text("arxiv")
    if not _ARXIV.fullmatch(arxiv):
        raise FormatError(f'{series.where}: arxiv is "{arxiv}", expected a number like 2504.06838')
    accuracy = series.object("accuracy")
    return [
        Published(
            method=series.text("method", tuple(METHODS)) if "method" in series.values else None,
            title=series.text("title"),
            paper=f"{series.text('paper')} (arXiv {arxiv})",
            origin=series.text("origin"),
            protocol=top.text("protocol", PROTOCOLS),
            model=top.text("model"),
            shots=top.integer("shots", least=1),
            budget=_budget(series),
            data=_data(accuracy, data),
            accuracy=_percent(accuracy, data),
        )
        for data in accuracy.values
    ]


def _require_known(fields: Fields, known: set[str]) -> None:
    if unknown := sorted(set(fields.values) - known):
        raise FormatError(f'{fields.where} has no key "{unknown[0]}"')


def _budget(series: Fields) -> str:
    found = [name for name in ("queries", "steps") if name in series.values]
    if len(found) > 1:
        raise FormatError(f"{series.where}: give queries or steps, not both")
    return "".join(f"{series.integer(name, least=1):,} {name}" for name in found)


def _data(accuracy: Fields, data: str) -> str:
    if data != AVERAGE and data not in NAMED:
        raise FormatError(f'{accuracy.where}: data set "{data}" is unknown')
    return data


def _percent(accuracy: Fields, data: str) -> float:
    value = accuracy.number(data)
    if not 0 <= value <= 100:
        raise FormatError(f'{accuracy.where}: "{data}" is {value:g}, expected 0 to 100 per cent')
    return value
