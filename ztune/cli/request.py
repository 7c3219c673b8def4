"""What a run was asked to do, as it stands in run.json and is taken up again on resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ztune.config import configured
from ztune.data.split import SplitSettings
from ztune.errors import ConfigError
from ztune.methods import PRESETS
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
