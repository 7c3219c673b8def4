"""Options that several verbs have, and what they make of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtimes.remote.settings import to_save
from ztune.cli.server import server_settings
from ztune.errors import ConfigError
from ztune.methods import TunedMethod, find_method
from ztune.run_config import RunConfig, place_of
from ztune.types import Json


def add_execution_arguments(parser: argparse.ArgumentParser, default: str | None = "auto") -> None:
    """Add --provider, where None leaves the default to the verb, and --threads."""
    parser.add_argument(
        "--provider",
        default=default,
        help=f"auto, cpu, cuda or tensorrt (default: {default or 'auto'})",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="use N cores and never spin (default: all, fast)"
    )


def add_root_argument(parser: argparse.ArgumentParser) -> None:
    """Add --root, which makes of --data the name of a data set."""
    parser.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="the folder that holds the data set which --data names (see: ztune data list)",
    )


def snapshots_of_word(word: str) -> int | str:
    """Return what the word behind --snapshots asks for; a request checks it."""
    return int(word) if word.lstrip("-").isdecimal() else word


def run_config_from_arguments(arguments: argparse.Namespace, asked: Sequence[str]) -> RunConfig:
    """Return what was asked for; what was not keeps the request's own defaults.

    `asked` names the options that are fields of a request; `set` and `init` are its settings.
    """
    settings = settings_from_words(arguments.set or [])
    if arguments.init is not None:
        settings["init"] = arguments.init
    given = {name: getattr(arguments, name) for name in ("bundle", *asked)}
    values: dict[str, Any] = {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in given.items()
        if value is not None and name not in ("out", "set", "init")
    }
    if isinstance(given.get("data"), str):
        values["data"] = place_of(given["data"], given.get("root"))
    if "template" in values:
        values["templates"] = tuple(values.pop("template"))
    run_config = RunConfig(**values, settings=settings, server=to_save(server_settings(arguments)))
    method = find_method(run_config.method)
    if "augment" not in values and run_config.preset == "published":
        views = method.augment if isinstance(method, TunedMethod) else 0
        run_config = replace(run_config, augment=views)
    return run_config


def settings_from_words(words: list[str]) -> dict[str, Json]:
    """Return {key: text} of words `key=value`.

    Raises: ConfigError for a word without `=`.
    """
    settings: dict[str, Json] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f'--set takes key=value, got "{word}"')
        settings[key.strip().replace("-", "_")] = value
    return settings
