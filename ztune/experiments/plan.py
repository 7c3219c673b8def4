"""A plan: which models, data sets, protocols and methods make the cells of a bench; a TOML file.

    title = "ZIP, few-shot"
    seeds = [1, 2, 3]                       # of everything; so are the next three
    queries = 5000
    preset = "published"
    curve = 12                              # points of accuracy on the way; 0: the result alone

    [models]                                # name = bundle; `models` given take their place
    clip = "../bundles/vit-b-16"

    [data]
    caltech101 = {}                         # known by name, below `root`
    photos = { path = "../photos", template = "a photo of a {}." }

    [methods]
    zip = {}
    sharpzo-long = { uses = "sharpzo", queries = 100000, settings = { warmup_steps = 50 } }

    [[protocols]]
    kind = "few-shot"                       # or base-to-new; cross-data-set and
    shots = [1, 2, 4, 8, 16]                # out-of-distribution have source and targets

Paths are relative to the plan's folder. Every key is checked; an unknown one is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ztune.data.manifests import read_text
from ztune.data.named import find_spec
from ztune.errors import ConfigError
from ztune.experiments.cells import Cell, key_of
from ztune.experiments.protocols import PROTOCOLS, TRANSFERS
from ztune.io.config import T, as_json, configured
from ztune.io.files import is_plain_name
from ztune.io.toml import parse_toml
from ztune.methods.registry import PRESETS, find_method, method_config, views_of
from ztune.types import Json


@dataclass(frozen=True)
class DataPlan:
    """A data set, by a known name or a path."""

    path: str | None = None
    """Folder or manifest; None: the entry's name is a known one, below the common root."""
    template: str | None = None
    """Hand-written prompt; None: the published one of a known name."""
    names: str | None = None
    """File with lines of folder<TAB>class name."""

    def __post_init__(self) -> None:
        if self.template is not None and self.template.count("{}") != 1:
            raise ConfigError(f'template "{self.template}" must hold {{}} once')
        if self.names is not None and self.path is None:
            raise ConfigError("names go with a path: a known data set brings its class names")


@dataclass(frozen=True)
class Found:
    """What is known of a data set that was read."""

    known_as: str | None
    """Its name in data/named.py, where the images are those that papers use; else None."""
    remarks: Sequence[str]
    """What is unusual about it, a line each."""


@dataclass(frozen=True)
class MethodPlan:
    """A method with its settings."""

    uses: str
    """Its name in the table of methods."""
    queries: int
    preset: str
    curve: int
    augment: int | None = None
    """Random views per image; None: those of the preset."""
    settings: Mapping[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        method = find_method(self.uses)
        if self.preset not in PRESETS:
            raise ConfigError(f'unknown preset "{self.preset}"; known: {", ".join(PRESETS)}')
        for name, least in (("queries", 1), ("curve", 0), ("augment", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}, expected at least {least}")
        method_config(method, self.settings, self.preset)

    @property
    def views(self) -> int:
        """Cached random views per training image."""
        return views_of(self.uses, self.preset) if self.augment is None else self.augment


@dataclass(frozen=True)
class ProtocolPlan:
    """A protocol on data sets of the plan."""

    kind: str
    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    data: tuple[str, ...] = ()
    """What is tuned on, and tested; of a transfer empty."""
    source: str | None = None
    """What a transfer tunes on."""
    targets: tuple[str, ...] = ()
    """What a transfer tests on."""

    def __post_init__(self) -> None:
        if self.kind not in PROTOCOLS:
            raise ConfigError(f'kind is "{self.kind}", expected {" or ".join(PROTOCOLS)}')
        if self.kind in TRANSFERS:
            if self.source is None or not self.targets or self.data:
                raise ConfigError(f"{self.kind} takes source and targets, and no data")
            if self.source in self.targets:
                raise ConfigError(f'the source "{self.source}" is among the targets')
        elif self.source is not None or self.targets:
            raise ConfigError(f"{self.kind} takes data, and neither source nor targets")
        for name in ("shots", "seeds", "methods", "data", "targets"):
            values: Sequence[Any] = getattr(self, name)
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} has an entry twice")
        if not self.methods or not self.seeds or not self.shots or not (self.data or self.targets):
            raise ConfigError("shots, seeds, methods and data must not be empty")
        if min(self.shots) < 1 or min(self.seeds) < 0:
            raise ConfigError("shots are at least 1 and seeds at least 0")

    @property
    def sources(self) -> tuple[str, ...]:
        """The data sets that are tuned on."""
        return self.data if self.source is None else (self.source,)


@dataclass(frozen=True)
class ExecutionPlan:
    """How cells run; a result's last bits depend on it."""

    provider: str = "auto"
    threads: int = 1
    """Of one worker."""
    memory_limit: int | None = None
    force: bool = False
    """Tune below the signal-to-noise limit."""

    def __post_init__(self) -> None:
        for name in ("threads", "memory_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, expected at least 1")


@dataclass(frozen=True)
class Draw:
    """Images of one data set, drawn for a protocol with a seed."""

    protocol: ProtocolPlan
    source: str
    shots: int
    seed: int


@dataclass(frozen=True)
class Plan:
    """All that a bench is to carry out."""

    path: Path
    title: str
    models: Mapping[str, str]
    """Bundles by name."""
    data: Mapping[str, DataPlan]
    methods: Mapping[str, MethodPlan]
    protocols: tuple[ProtocolPlan, ...]
    execution: ExecutionPlan

    def draws(self) -> Iterator[Draw]:
        """Yield what images are drawn for, in order: seed by seed, so that a bench that is
        stopped has something of everything.
        """
        for protocol in self.protocols:
            for seed in protocol.seeds:
                for source in protocol.sources:
                    for shots in protocol.shots:
                        yield Draw(protocol, source, shots, seed)

    def cells_of(self, draw: Draw) -> Iterator[Cell]:
        """Yield the cells of a draw: each model with each method."""
        for model in self.models:
            for method in draw.protocol.methods:
                yield Cell(draw.protocol.kind, model, draw.source, method, draw.shots, draw.seed)

    def resolved(self, path: str) -> Path:
        """Return what a path of the plan means.

        Raises: ConfigError for what is no path here.
        """
        try:
            return (self.path.parent / Path(path).expanduser()).resolve()
        except (RuntimeError, ValueError) as error:  # a home of nobody; a character of no path
            raise ConfigError(f'plan "{self.path}": {path!r} is no path ({error})') from None

    @property
    def name(self) -> str:
        """What its results and report go by: the file's name."""
        return self.path.stem

    def to_json(self, bundles: Mapping[str, str], found: Mapping[str, Found]) -> dict[str, Json]:
        """Return what a report should know of it; folders of data and models are left out.

        `bundles` are the digests of its models, `found` what is known of the data sets that were
        read.
        """
        return {
            "plan": self.path.name,
            "title": self.title,
            "models": {
                name: {"bundle": Path(path).name, "digest": bundles[name]}
                for name, path in self.models.items()
            },
            "data": {
                name: {
                    "title": find_spec(name).title if one.path is None else name,
                    "template": one.template,
                    "place": key_of({"path": one.path, "names": one.names}),
                    "found": as_json(found[name]) if name in found else None,
                }
                for name, one in self.data.items()
            },
            "methods": {name: as_json(one) for name, one in self.methods.items()},
            "protocols": [as_json(one) for one in self.protocols],
            "execution": as_json(self.execution),
        }


@dataclass(frozen=True, kw_only=True)
class _File:
    """A plan's file; what stands there for all methods or protocols is read with each of them."""

    title: str | None = None
    seeds: Any = (1, 2, 3)
    queries: Any = 5000
    preset: Any = "default"
    curve: Any = 0
    execution: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Any]
    methods: Mapping[str, Any]
    protocols: tuple[Mapping[str, Any], ...]


def read_plan(path: Path) -> Plan:
    """Read and check a plan; bundles and images are not looked for yet.

    Raises: ConfigError naming the key, method or setting that is wrong, and those there are;
        DataError for a file that is no text.
    """
    where = f'plan "{path}"'
    if not path.is_file():
        state = "is no file" if path.exists() else "does not exist"
        raise ConfigError(f"{where} {state}")
    file = configured(_File, parse_toml(read_text(path, where), where), where)
    for key in ("methods", "protocols", "data"):
        if not getattr(file, key):
            raise ConfigError(f'{where} lacks "{key}"')
    data = {
        name: _data(name, entry, _place(where, "data", name))
        for name, entry in _tables(file.data, "data", where)
    }
    methods = {
        label: _method(label, entry, file, _place(where, "methods", label))
        for label, entry in _tables(file.methods, "methods", where)
    }
    protocols = [
        _protocol(entry, file, data, methods, f"{where}: protocols[{i}]")
        for i, entry in enumerate(file.protocols)
    ]
    _check_transfers(protocols, where)
    for name in file.models:
        check_name(name, _place(where, "models", name))
    execution = _configured(ExecutionPlan, file.execution, f"{where}: execution")
    title = path.stem if file.title is None else file.title
    return Plan(path, title, file.models, data, methods, tuple(protocols), execution)


def _place(where: str, key: str, name: str) -> str:
    return f'{where}: {key} "{name}"'


def _tables(
    entries: Mapping[str, Any], key: str, where: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise ConfigError(f"{_place(where, key, name)} is {entry!r}, expected a table")
        check_name(name, _place(where, key, name))
        yield name, entry


def check_name(name: str, where: str) -> None:
    """Refuse what cannot name a folder of OUT, or stand in a list like `zip,gda`.

    Raises: ConfigError naming `where`.
    """
    if not is_plain_name(name) or name != name.strip() or "," in name:
        raise ConfigError(
            f"{where}: a name has no slash, comma or blank at its ends, and is neither empty nor "
            "longer than a file's name"
        )


def _data(name: str, entry: Mapping[str, Any], where: str) -> DataPlan:
    data = _configured(DataPlan, entry, where)
    if data.path is None:
        try:
            find_spec(name)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}, and no path is given") from None
    return data


def _method(label: str, entry: Mapping[str, Any], file: _File, where: str) -> MethodPlan:
    given = {"uses": label, **{key: getattr(file, key) for key in ("queries", "preset", "curve")}}
    return _configured(MethodPlan, {**given, **entry}, where)


def _protocol(
    entry: Mapping[str, Any],
    file: _File,
    data: Mapping[str, DataPlan],
    methods: Mapping[str, MethodPlan],
    where: str,
) -> ProtocolPlan:
    given: dict[str, Any] = {"seeds": file.seeds, "shots": [16], "methods": list(methods)}
    if entry.get("kind") not in TRANSFERS:
        given["data"] = list(data)
    protocol = _configured(ProtocolPlan, {**given, **entry}, where)
    named = (*protocol.sources, *protocol.targets)
    for kind, names, known in (("data", named, data), ("methods", protocol.methods, methods)):
        for name in names:
            if name not in known:
                listed = ", ".join(known)
                raise ConfigError(f'{where}: "{name}" is not among [{kind}] ({listed})')
    return protocol


def _check_transfers(protocols: Sequence[ProtocolPlan], where: str) -> None:
    """Refuse transfers whose cells are called alike: in tables one would hide the other."""
    for i, one in enumerate(protocols):
        for j, other in enumerate(protocols[:i]):
            if (
                one.kind in TRANSFERS
                and (one.kind, one.source) == (other.kind, other.source)
                and one.targets != other.targets
                and all(
                    set(getattr(one, name)) & set(getattr(other, name))
                    for name in ("shots", "seeds", "methods")
                )
            ):
                raise ConfigError(
                    f"{where}: protocols[{j}] and protocols[{i}] share cells of {one.kind} from "
                    f'"{one.source}" and have other targets (name all targets in one of them)'
                )


def _configured(kind: type[T], entry: Mapping[str, Any], where: str) -> T:
    with _located(where):
        return configured(kind, entry, where)


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    """Say with an error where in the plan it is, once."""
    try:
        yield
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(where) else f"{where}: {message}") from None
