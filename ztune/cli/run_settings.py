"""A RunConfig and method settings from command-line arguments."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ztune.data.split import PUBLISHED_SHOTS
from ztune.errors import ConfigError
from ztune.run_config import RunConfig, place_of
from ztune.types import Json


def run_config_of(
    arguments: argparse.Namespace,
    settings: Mapping[str, Json],
    server: Mapping[str, Json] | None = None,
) -> RunConfig:
    """Return the requested run: an option sets the field of its name, others keep their default."""
    values: dict[str, Any] = {"settings": settings, "server": server or {}}
    for field in fields(RunConfig):
        value = getattr(arguments, field.name, None)
        if value is not None and field.name not in values:
            values[field.name] = str(value.resolve()) if isinstance(value, Path) else value
    if isinstance(arguments.data, str):
        values["data"] = place_of(arguments.data, getattr(arguments, "root", None))
    if "root" in values:
        values.setdefault("shots", PUBLISHED_SHOTS)
    if "templates" in values:
        values["templates"] = tuple(values["templates"])
    return RunConfig(**values)


def settings_of(arguments: argparse.Namespace) -> dict[str, Json]:
    """Return the method settings of --set and --init."""
    settings = settings_from_words(arguments.settings or ())
    return settings if arguments.init is None else {**settings, "init": arguments.init}


def settings_from_words(words: Iterable[str]) -> dict[str, Json]:
    """Return {key: text} of words `key=value`.

    Raises: ConfigError for a word without `=`.
    """
    settings: dict[str, Json] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f'--set is "{word}", expected KEY=VALUE')
        settings[key.strip().replace("-", "_")] = value
    return settings
