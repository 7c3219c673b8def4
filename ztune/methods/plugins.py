"""Methods of other packages: entry points of the group `ztune.methods`.

An entry point has the method's name and loads a TunedMethod or a HeadMethod. Looking up a method
reads the names and imports only that method's package.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata

from ztune.errors import ConfigError
from ztune.io.config import configured
from ztune.methods.base import HeadMethod, Method, TunedMethod
from ztune.printing import one_line

GROUP = "ztune.methods"


@cache
def entry_points() -> dict[str, list[metadata.EntryPoint]]:
    """Return the entry points by name, in order of name and package."""
    found: dict[str, list[metadata.EntryPoint]] = {}
    for one in sorted(metadata.entry_points(group=GROUP), key=lambda p: (p.name, _package(p))):
        found.setdefault(one.name, []).append(one)
    return found


def package_of(name: str) -> str | None:
    """Return name and version of a method's package; None for ztune itself."""
    found = entry_points().get(name)
    return " and ".join(map(_package, found)) if found else None


def _package(point: metadata.EntryPoint) -> str:
    dist = point.dist
    return "unknown package" if dist is None else f"{dist.name} {dist.version}"


@cache
def load(name: str) -> Method:
    """Return the method of an entry point.

    Raises: ConfigError naming the package and what to do.
    """
    point, *others = entry_points()[name]
    what = f'method "{name}" of package {_package(point)}'
    if others:
        raise ConfigError(
            f'method "{name}" is in several packages, {package_of(name)} (uninstall all but one)'
        )
    try:
        method = point.load()
        if isinstance(method, TunedMethod | HeadMethod):
            configured(method.config, {}, "")  # checks its defaults
    except (Exception, SystemExit) as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise ConfigError(
            f"{what} cannot be loaded from {point.value}: {reason} (repair or uninstall it)"
        ) from error
    if not isinstance(method, TunedMethod | HeadMethod):
        raise ConfigError(
            f"{what}: {point.value} is {type(method).__name__}, expected a TunedMethod or "
            "HeadMethod of ztune.methods.base"
        )
    if method.name != name:
        raise ConfigError(
            f'{what}: {point.value} is named "{method.name}", expected the entry point\'s name'
        )
    return method
