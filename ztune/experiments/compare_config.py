"""The configuration of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ztune.errors import ConfigError
from ztune.io.config import as_json
from ztune.io.schema import plain
from ztune.methods.registry import find_method, method_config, tuned_config, views_of
from ztune.run_config import RunConfig
from ztune.types import Json


@dataclass(frozen=True)
class CompareConfig:
    """The methods and seeds to compare, and their common settings."""

    base: RunConfig
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    pixel_queries: int
    """The budget of methods that encode images with every query."""
    settings: Mapping[str, Mapping[str, Json]]
    """By method."""

    def check(self) -> None:
        """Check names and values without opening any file.

        Raises: ConfigError.
        """
        if self.pixel_queries < 1:
            raise ConfigError(f"`pixel_queries` is {self.pixel_queries}, expected at least 1")
        self.base.split_settings()
        for method in (*self.methods, *self.settings):
            self.run_config(method, self.seeds[0])
        unused = [name for name in self.settings if name not in self.methods]
        if unused:
            raise ConfigError(f"`settings` {unused[0]}.…: {unused[0]} is not among `methods`")

    def run_config(self, method: str, seed: int) -> RunConfig:
        """Return one cell's RunConfig."""
        settings = self.settings.get(method, {})
        found = find_method(method)
        config = tuned_config(found, method_config(found, settings, self.base.preset))
        run_config = replace(self.base, method=method, seed=seed, settings=settings)
        if config is None:
            return replace(run_config, snapshots=0, force=False)
        return replace(
            run_config,
            force=run_config.force
            and config.perturbation_setting is not None,  # else there is no signal check
            queries=run_config.queries if config.program is None else self.pixel_queries,
            augment=views_of(method, run_config.preset),
        )

    def to_json(self, bundle_digest: str, images: str) -> dict[str, Json]:
        """Return the settings that all cells of a table must share."""
        own = ("method", "seed", "cache", "settings")
        common = {k: v for k, v in as_json(self.base).items() if k not in own}
        return {
            **plain(common),
            "pixel_queries": self.pixel_queries,
            "settings": plain(self.settings),
            "bundle_digest": bundle_digest,
            "images": images,
        }
