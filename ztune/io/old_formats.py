"""Renames of keys and arrays in files of older versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ztune.types import Json

T = TypeVar("T")
Document = dict[str, Json]
IMAGES_IN_KEYS = "pictures"
"""Used in the digests that find a bench's results; a change would lose earlier results."""
PARQUET_FOLDER = "parquet-pictures"
"""Earlier folder of images extracted from parquet files."""
_ARRAYS = {"tuning_pictures": "tuning_images", "sampler.pictures": "sampler.images"}


def rename_arrays(arrays: Mapping[str, T]) -> dict[str, T]:
    """Return the arrays of an artifact or a run's state by their current names."""
    return _renamed(arrays, _ARRAYS)


def _renamed(values: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    return {names.get(key, key): value for key, value in values.items()}


def _inside(document: Document, key: str, names: Mapping[str, str]) -> Document:
    """Rename the keys of an object in a document; another type is an error where it is read."""
    part: Any = document.get(key)
    return {**document, key: _renamed(part, names)} if isinstance(part, dict) else document


def _classifier(document: Document) -> Document:
    return _renamed(document, {"tuning_pictures": "tuning_images"})


def _run(document: Document) -> Document:
    document = _inside(document, "server", {"gives": "capabilities"})
    return _renamed(document, {"request": "run_config", "broken_pictures": "broken_images"})


def _move_extractor(document: Document) -> Document:
    """Move the extractor of a run's settings to those of its method."""
    run_config: Any = document.get("run_config")
    if not isinstance(run_config, dict) or "extractor" not in run_config:
        return document
    kept = {key: value for key, value in run_config.items() if key != "extractor"}
    settings = kept.get("settings", {})
    if run_config["extractor"] is not None and isinstance(settings, dict):
        kept["settings"] = {**settings, "extractor": run_config["extractor"]}
    return {**document, "run_config": kept}


UPGRADES: dict[str, tuple[Callable[[Document], Document], ...]] = {
    "ztune-artifact": (dict, dict),
    "ztune-bundle": (dict,),
    "ztune-classifier": (_classifier, dict, dict),
    "ztune-run": (_run, _move_extractor),
}
"""By format: the upgrades from version 1 to 2, 2 to 3, and so on."""
