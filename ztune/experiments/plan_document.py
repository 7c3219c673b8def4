"""A plan in the file of results: its configuration, and findings on its data.

`Plan.to_json` writes it. The findings on a data set are null until it is read.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from ztune.experiments.plan import Found
from ztune.io.schema import plain
from ztune.types import Json


class DataDocument(Struct, frozen=True):
    """A data set, as reports use it."""

    title: str | None = None
    found: Found | None = None


class MethodDocument(Struct, frozen=True):
    """A method, as reports use it."""

    uses: str | None = None


class ModelDocument(Struct, frozen=True):
    """A model, as reports use it."""

    digest: str | None = None


class PlanDocument(Struct, frozen=True):
    """A plan, as reports use it; other fields are ignored."""

    title: str
    data: Mapping[str, DataDocument] = {}
    methods: Mapping[str, MethodDocument] = {}
    models: Mapping[str, ModelDocument] = {}

    @property
    def found(self) -> dict[str, Found]:
        """Findings on the data sets that were read, by name."""
        return {name: one.found for name, one in self.data.items() if one.found is not None}


def _data(document: Mapping[str, Json]) -> dict[str, dict[str, Json]]:
    entries = document.get("data")
    named = entries.items() if isinstance(entries, dict) else ()
    return {name: entry for name, entry in named if isinstance(entry, dict)}


def without_findings(document: Mapping[str, Json]) -> Json:
    """Return a plan's document without its title and the findings on its data."""
    data: dict[str, Json] = {
        name: {key: value for key, value in entry.items() if key != "found"}
        for name, entry in _data(document).items()
    }
    return plain({**document, "title": "", "data": data})


def with_findings(document: Mapping[str, Json], earlier: Mapping[str, Json]) -> dict[str, Json]:
    """Return a document with its missing findings taken from an earlier one."""
    before = _data(earlier)
    data: dict[str, Json] = {
        name: entry
        if entry.get("found") is not None
        else {**entry, "found": before.get(name, {}).get("found")}
        for name, entry in _data(document).items()
    }
    return {**document, "data": data} if data else dict(document)
