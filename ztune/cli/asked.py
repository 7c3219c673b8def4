"""What a comparison is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ztune.io.config import as_json
from ztune.methods import find_method, method_config, tuned_config
from ztune.run_config import RunConfig
from ztune.types import Json


@dataclass(frozen=True)
class Asked:
    """What is to be compared."""

    base: RunConfig
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    pixel_queries: int
    settings: Mapping[str, Mapping[str, Json]]
    """Of each method that has any."""

    def run_config(self, method: str, seed: int) -> RunConfig:
        """Return what one cell's run is asked for."""
        settings = self.settings.get(method, {})
        found = find_method(method)
        config = tuned_config(found, method_config(found, settings, self.base.preset))
        run_config = replace(self.base, method=method, seed=seed, settings=settings)
        if config is None:
            return replace(run_config, snapshots=0, force=False)
        if config.finest is None:
            run_config = replace(run_config, force=False)  # there is no gate to force
        return (
            run_config
            if config.program is None
            else replace(run_config, queries=self.pixel_queries)
        )

    def to_json(self, bundle_digest: str, pictures: str) -> dict[str, Json]:
        """Return what must be the same for cells to stand in one table."""
        own = ("method", "seed", "cache", "settings")
        common = {k: v for k, v in as_json(self.base).items() if k not in own}
        document: dict[str, Json] = json.loads(json.dumps(common))
        settings: dict[str, Json] = {name: dict(own) for name, own in self.settings.items()}
        return {
            **document,
            "pixel_queries": self.pixel_queries,
            "settings": settings,
            "bundle_digest": bundle_digest,
            "pictures": pictures,
        }
