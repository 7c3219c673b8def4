"""Figures that papers print, read from published.toml and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Annotated

from msgspec import Meta

from ztune.data.named import NAMED
from ztune.errors import FormatError
from ztune.experiments.protocols import PROTOCOLS
from ztune.io.schema import AtLeastOne, Record, convert
from ztune.io.toml import parse_toml
from ztune.methods.registry import METHODS

AVERAGE = "average of 11"
AVERAGED = (
    "caltech101", "oxfordpets", "flowers102", "food101", "fgvcaircraft", "sun397", "dtd",
    "eurosat", "ucf101", "stanfordcars", "imagenet",
)  # fmt: skip
"""CoOp's data sets, for published averages."""
_FILE = "published.toml"


@dataclass(frozen=True)
class Published:
    """One figure that a paper prints."""

    method: str | None
    """Name of the method; None: not implemented."""
    title: str
    """Name in the papers."""
    paper: str
    """The paper that introduced the method, with its arXiv number."""
    source: str
    """The paper that prints the figure, and its table."""
    protocol: str
    model: str
    shots: int
    budget: str
    """Queries or steps; empty if none or unknown."""
    data: str
    """A name of data/named.py, or AVERAGE."""
    accuracy: float
    """In per cent, as printed."""


def published() -> tuple[Published, ...]:
    """Return all published figures, in the file's order.

    Raises: FormatError naming the series and the field.
    """
    text = resources.files("ztune.experiments").joinpath(_FILE).read_text(encoding="utf-8")
    return published_in(text)


def published_in(text: str) -> tuple[Published, ...]:
    """Return the figures of a text in the format of published.toml.

    Raises: FormatError naming the series and the field; ConfigError for invalid TOML.
    """
    file = convert(parse_toml(text, _FILE), _File, _FILE)
    return tuple(figure for i, one in enumerate(file.series) for figure in _figures(file, one, i))


_ArXiv = Annotated[str, Meta(pattern=r"^\d{4}\.\d{5}\Z")]


class _Source(Record, frozen=True):
    """A table that prints figures."""

    paper: str
    arxiv: _ArXiv
    table: Annotated[str, Meta(pattern=r"^[Tt]able \S")]


class _Series(Record, frozen=True, kw_only=True):
    """Figures of one method in one table."""

    method: str | None = None
    title: str
    paper: str
    arxiv: _ArXiv
    source: str
    queries: AtLeastOne | None = None
    steps: AtLeastOne | None = None
    accuracy: Mapping[str, Annotated[float, Meta(ge=0, le=100)]]
    """In per cent, by data set."""


class _File(Record, frozen=True):
    protocol: str
    model: str
    shots: AtLeastOne
    sources: Mapping[str, _Source]
    series: tuple[_Series, ...]


def _figures(file: _File, series: _Series, number: int) -> list[Published]:
    where = f"{_FILE}: $.series[{number}]"
    if series.queries and series.steps:
        raise FormatError(f"{where}: give queries or steps, not both")
    for what, name, known in (
        ("protocol", file.protocol, PROTOCOLS),
        ("method", series.method, (None, *METHODS)),
        ("source", series.source, file.sources),
        *(("data set", data, (AVERAGE, *NAMED)) for data in series.accuracy),
    ):
        if name not in known:
            raise FormatError(f'{where}: unknown {what} "{name}"')
    source = file.sources[series.source]
    budget = [f"{n:,} {what}" for what in ("queries", "steps") if (n := getattr(series, what))]
    return [
        Published(
            method=series.method,
            title=series.title,
            paper=f"{series.paper} (arXiv {series.arxiv})",
            source=f"{source.paper} (arXiv {source.arxiv}), {source.table}",
            protocol=file.protocol,
            model=file.model,
            shots=file.shots,
            budget="".join(budget),
            data=data,
            accuracy=accuracy,
        )
        for data, accuracy in series.accuracy.items()
    ]
