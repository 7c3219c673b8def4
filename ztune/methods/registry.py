"""The table of methods: tuned methods (map and optimizer) and closed-form heads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ztune.capabilities import FEATURES, TEXTS, describe
from ztune.errors import ConfigError
from ztune.io.config import as_json, configured, nearest
from ztune.io.files import sha256
from ztune.methods import (
    auto,
    bar,
    blackvip,
    bptvlm,
    cma,
    gda,
    linear_probe,
    lp_plus,
    ogn,
    ogn_context,
    proker,
    rgf,
    sharpzo,
    spsa,
    spsa_gc,
    tip_adapter,
    zero_shot,
)
from ztune.methods import zip as zip_method
from ztune.methods.base import HeadMethod, Method, Preset, TunedConfig, TunedMethod
from ztune.methods.plugins import entry_points, load, package_of
from ztune.types import Json

PRESETS = ("default", "published", "published-code", "tuned")
"""default: the published optimizer on centre crops. published: also the published random crops and
counts. published-code: the published code where it differs from the paper, else as published.
tuned: settings that were better in ztune's measurements, if any (docs/methods.md)."""

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD
    for module in (
        *(
            auto,
            ogn,
            ogn_context,
            zip_method,
            sharpzo,
            bptvlm,
            cma,
            spsa,
            spsa_gc,
            rgf,
            blackvip,
            bar,
        ),
        *(gda, tip_adapter, lp_plus, proker, linear_probe, zero_shot),
    )
}
"""ztune's own methods; those of other packages are found by name (`plugins.py`)."""


def method_names() -> list[str]:
    """Return the names of all methods, ztune's own first, without loading them."""
    return [*METHODS, *(name for name in entry_points() if name not in METHODS)]


def find_method(name: str) -> Method:
    """Return a method, of ztune or of another package.

    Raises: ConfigError listing the known names, or the reason why a method is unusable.
    """
    if name in METHODS and (package := package_of(name)):
        raise ConfigError(
            f'package {package} registers the name of ztune\'s own method "{name}" '
            "(uninstall that package, or rename its method)"
        )
    if name in METHODS:
        return METHODS[name]
    if name in entry_points():
        return load(name)
    known = method_names()
    raise ConfigError(f'unknown method "{name}"{nearest(name, known)}; known: {", ".join(known)}')


def usable_methods() -> tuple[dict[str, Method], dict[str, ConfigError]]:
    """Return all usable methods by name, and the errors of the others by name."""
    found: dict[str, Method] = {}
    failed: dict[str, ConfigError] = {}
    for name in method_names():
        try:
            found[name] = find_method(name)
        except ConfigError as error:
            failed[name] = error
    return found, failed


def possible_method(name: str, given: frozenset[str]) -> str:
    """Return `name`, or for `auto` the best of its parts that the capabilities allow."""
    if name != auto.METHOD.name:
        return name
    parts = (auto.METHOD, ogn.METHOD, zip_method.METHOD)
    possible = [one.name for one in parts if needs_of(one, one.config()) <= given]
    return possible[0] if possible else name


def preset_of(method: Method, name: str) -> Preset:
    """Return what a preset changes."""
    if name == "published-code" and name not in method.presets:
        name = "published"
    return method.presets.get(name, Preset())


def views_of(name: str, preset: str) -> int:
    """Return a preset's number of cached views per image."""
    return preset_of(find_method(name), preset).views


def method_config(method: Method, settings: Mapping[str, Json], preset: str = "default") -> Any:
    """Return the method's configuration: its preset overridden by `settings`.

    Raises: ConfigError for an unknown setting or an invalid value.
    """
    chosen = preset_of(method, preset).settings
    return configured(method.config, {**chosen, **settings}, f'method "{method.name}"')


def tuned_config(method: Method, config: Any) -> TunedConfig | None:
    """Return a tuned method's configuration, or None for a head."""
    if not isinstance(method, TunedMethod):
        return None
    tuned: TunedConfig = config.in_effect
    return tuned


def settings_of_result(method: Method, config: Any) -> dict[str, Json]:
    """Return the settings that a result depends on: an extractor by its SHA-256, not its path.

    Raises: ConfigError for an extractor that cannot be read.
    """
    settings, tuned = as_json(config), tuned_config(method, config)
    if tuned is not None and "extractor" in settings:
        del settings["extractor"]
        if tuned.extractor is not None:
            try:
                settings["extractor"] = sha256(Path(tuned.extractor))
            except OSError as error:
                raise ConfigError(
                    f'extractor "{tuned.extractor}" cannot be read: {error.strerror or error}'
                ) from None
    return settings


def uses_views(method: Method, config: Any) -> bool:
    """Return whether a configured method can use several views of an image."""
    if isinstance(method, HeadMethod):
        return method.uses_images
    tuned = tuned_config(method, config)
    return tuned is not None and not tuned.keeps_batch


def needs_of(method: Method, config: Any) -> frozenset[str]:
    """Return the capabilities that a configured method needs."""
    tuned = tuned_config(method, config)
    return frozenset((FEATURES, TEXTS)) if tuned is None else tuned.needs


def needs_of_all() -> dict[str, frozenset[str]]:
    """Return the capabilities that every method needs with its defaults."""
    return {name: needs_of(method, method.config()) for name, method in usable_methods()[0].items()}


def preset_changes(method: Method) -> dict[str, dict[str, Json]]:
    """Return the settings of each preset, without empty ones."""
    default = as_json(method_config(method, {}))
    changes: dict[str, dict[str, Json]] = {}
    for name, preset in method.presets.items():
        config = as_json(method_config(method, {}, name))
        changed = {key: value for key, value in config.items() if value != default[key]}
        changes[name] = {"augment": preset.views, **changed} if preset.views else changed
    return {name: changed for name, changed in changes.items() if changed}


def method_to_json(method: Method) -> dict[str, Json]:
    """Return a method's description and default settings."""
    config = method.config()
    needs = needs_of(method, config)
    document: dict[str, Json] = {
        "name": method.name,
        "title": method.title,
        "paper": method.paper,
        "package": package_of(method.name),
        "needs": [*sorted(needs)],
        "capabilities": describe(needs),
        "serves_new_classes": method.serves_new_classes(),
        "settings": as_json(config),
        "presets": {name: dict(changes) for name, changes in preset_changes(method).items()},
    }
    if isinstance(method, TunedMethod):
        document["first_step_queries"] = config.step_queries()
        document["encodes_images_every_query"] = config.program is not None
    return document
