"""Files of older versions, brought up to date: the one place that knows the keys they had."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ztune.types import Json

Document = dict[str, Json]


def _renamed(document: Document, names: Mapping[str, str]) -> Document:
    return {names.get(key, key): value for key, value in document.items()}


UPGRADES: dict[str, tuple[Callable[[Document], Document], ...]] = {}
"""By format: what makes version 2 of version 1, version 3 of version 2, and so on."""
