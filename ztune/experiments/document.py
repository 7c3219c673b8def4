"""A plan as the file of results holds it: what it asks for, and what was found of its data.

`Plan.to_json` writes it. What was found of a data set is null until somebody asked for it.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from ztune.experiments.plan import Found
from ztune.io.schema import plain
from ztune.types import Json


class DataDocument(Struct, frozen=True):
    """What a report should know of a data set."""

    title: str | None = None
    found: Found | None = None


class MethodDocument(Struct, frozen=True):
    """What a report should know of a method."""

    uses: str | None = None


class ModelDocument(Struct, frozen=True):
    """What a report should know of a model."""

    digest: str | None = None


class PlanDocument(Struct, frozen=True):
    """What a report should know of a plan; the rest of its document is ignored."""

    title: str
    data: Mapping[str, DataDocument] = {}
    methods: Mapping[str, MethodDocument] = {}
    models: Mapping[str, ModelDocument] = {}

    @property
    def found(self) -> dict[str, Found]:
        """What is known of the data sets that were read, by name."""
        return {name: one.found for name, one in self.data.items() if one.found is not None}


def _data(document: Mapping[str, Json]) -> dict[str, dict[str, Json]]:
    entries = document.get("data")
    named = entries.items() if isinstance(entries, dict) else ()
    return {name: entry for name, entry in named if isinstance(entry, dict)}


def asked(document: Mapping[str, Json]) -> Json:
    """Return what a plan's document asks for, without its title and what was found of its data."""
    data: dict[str, Json] = {
        name: {key: value for key, value in entry.items() if key != "found"}
        for name, entry in _data(document).items()
    }
    return plain({**document, "title": "", "data": data})


def with_found(document: Mapping[str, Json], earlier: Mapping[str, Json]) -> dict[str, Json]:
    """Return a document in which what was not found now is what was found earlier."""
    before = _data(earlier)
    data: dict[str, Json] = {
        name: entry
        if entry.get("found") is not None
        else {**entry, "found": before.get(name, {}).get("found")}
        for name, entry in _data(document).items()
    }
    return {**document, "data": data} if data else dict(document)
