"""What a run was asked to do, as it stands in run.json and is taken up again on resume."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ztune.config import configured, settings_from_words
from ztune.data.split import SplitSettings
from ztune.errors import ConfigError
from ztune.methods import PRESETS, find_method
from ztune.types import Json


@dataclass(frozen=True)
class Request:
    """The settings of one run; paths are absolute, so that it resumes from any folder."""

    bundle: str
    data: str
    method: str = "zip"
    shots: int = 16
    queries: int = 5000
    seed: int = 1
    template: str = "a photo of a {}."
    """The hand-written prompt that zero-shot figures use."""
    preset: str = "default"
    provider: str = "auto"
    threads: int | None = None
    memory_limit: int | None = None
    val: int | None = None
    test_fraction: str = "auto"
    split_seed: int = 0
    test_data: str | None = None
    names: str | None = None
    cache: str | None = None
    """None: the run's own folder."""
    augment: int = 0
    skip_broken: bool = False
    force: bool = False
    """Go on below the signal gate's limit."""
    reference: str | None = None
    """Bundle to measure the signal against; None: the bundle's own graph in higher precision."""
    settings: Mapping[str, Json] = field(default_factory=dict)
    """The method's settings that differ from its preset."""

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ConfigError(f"--queries is {self.queries}, expected at least 1")
        if self.preset not in PRESETS:
            raise ConfigError(f'unknown preset "{self.preset}"; known: {", ".join(PRESETS)}')
        if self.augment < 0:
            raise ConfigError(f"--augment is {self.augment}, expected 0 or more views")
        if self.template.count("{}") != 1:
            raise ConfigError(f'--template "{self.template}" must hold {{}} once')

    def split_settings(self) -> SplitSettings:
        """Return what the split is made by.

        Raises: ConfigError for impossible numbers.
        """
        fraction = self.test_fraction
        if fraction != "auto":
            try:
                share = float(fraction)
            except ValueError:
                raise ConfigError(
                    f'--test-fraction is "{fraction}", expected auto or a number in [0, 1)'
                ) from None
            return SplitSettings(self.shots, self.val, share, self.split_seed, self.seed)
        return SplitSettings(self.shots, self.val, "auto", self.split_seed, self.seed)

    def cache_folder(self, run: Path) -> Path:
        return Path(self.cache) if self.cache else run / "cache"


def request_from_arguments(arguments: argparse.Namespace, asked: Sequence[str]) -> Request:
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
    request = Request(**values, settings=settings)
    if "augment" not in values:
        views = find_method(request.method).augment.get(request.preset, 0)
        request = replace(request, augment=views)
    return request


def request_from_json(values: Mapping[str, Json], where: str) -> Request:
    """Return a saved request.

    Raises: ConfigError for fields that this version does not know.
    """
    plain = {key: value for key, value in values.items() if key != "settings"}
    settings = values.get("settings")
    request = configured(Request, plain, where)
    if not isinstance(settings, dict):
        raise ConfigError(f'{where}: "settings" is {settings!r}, expected an object')
    return Request(**{**request.__dict__, "settings": settings})
