"""A plan: the models, data sets, protocols and methods of a bench, in a TOML file.

    title = "ZIP, few-shot"
    seeds = [1, 2, 3]                       # default of all, as are the next three
    queries = 5000
    preset = "published"
    curve = 12                              # points of the accuracy curve; 0: only the result;
                                            # or a list of query counts

    [models]                                # name = bundle
    clip = "../bundles/vit-b-16"

    [data]
    caltech101 = {}                         # a named data set, below `root`
    dtd = { settings = { sharpzo = { sigma = 0.2 } } }  # of a method that is tuned on it
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ztune.data.manifests import read_text
from ztune.data.named import find_spec
from ztune.data.split import NOTHING, LeftOut, SplitSettings, parse_test_fraction
from ztune.errors import ConfigError
from ztune.experiments.cells import Cell, key_of
from ztune.experiments.protocols import PROTOCOLS, TRANSFERS
from ztune.io.config import T, as_json, configured
from ztune.io.files import is_plain_name
from ztune.io.schema import plain
from ztune.io.toml import parse_toml
from ztune.methods.registry import PRESETS, find_method, method_config, views_of
from ztune.types import Json


@dataclass(frozen=True)
class DataPlan:
    """A data set, by name or path."""

    path: str | None = None
    """Folder or manifest; None: a named data set below the root."""
    template: str | tuple[str, ...] | None = None
    """Templates, averaged; None: the published template of a named data set."""
    names: str | None = None
    """File with lines of folder<TAB>class name."""
    nested: str | None = None
    """Which of nested folders are classes: data/folders.py."""
    test_data: str | None = None
    """Folder or manifest of the test images; None: those of the data set, or drawn from it."""
    test_fraction: float | str = "auto"
    split_seed: int = 0
    val: int | None = None
    """Validation images per class, as are the two above: settings of data/splitter.py."""
    skip_broken: bool = False
    """Leave out images that cannot be read; else they are an error."""
    skip_conflicts: bool = False
    """Leave out images with two classes or roles; else they are an error."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings by method where it is tuned on this data set, below those of its entry."""

    def __post_init__(self) -> None:
        for template in self.templates or ():
            if template.count("{}") != 1:
                raise ConfigError(f'template "{template}": expected {{}} exactly once')
        if self.names is not None and self.path is None:
            raise ConfigError(
                "names applies only with path: a named data set has its class names (omit `names`)"
            )
        self.split_settings(1, 0)
        for method, settings in self.settings.items():
            assert method_config(find_method(method), settings) is not None

    @property
    def templates(self) -> tuple[str, ...] | None:
        return (self.template,) if isinstance(self.template, str) else self.template

    def split_settings(self, shots: int, seed: int) -> SplitSettings:
        """Return the settings of the splitter.

        Raises: ConfigError.
        """
        share = parse_test_fraction(self.test_fraction)
        return SplitSettings(shots, self.val, share, self.split_seed, seed)

    @property
    def place(self) -> str:
        """A digest of the fields that determine the images, without the folder's content."""
        fields = as_json(self)
        defaults = as_json(DataPlan(self.path, names=self.names))
        changed = {
            key: value
            for key, value in fields.items()
            if value != defaults[key] and key not in ("template", "skip_broken", "settings")
        }
        return key_of({"path": self.path, "names": self.names, **changed})


@dataclass(frozen=True)
class Found:
    """Findings on a data set that was read."""

    known_as: str | None
    """Name in data/named.py if the images are the published ones, else None."""
    remarks: Sequence[str]
    """Anomalies, a line each."""
    left_out: LeftOut = NOTHING
    """Files that are not used."""


@dataclass(frozen=True)
class MethodPlan:
    """A method with its settings."""

    uses: str
    """Name of the method."""
    queries: int
    preset: str
    curve: int | tuple[int, ...]
    """Points of the accuracy curve, or their query counts."""
    augment: int | None = None
    """Random views per image; None: as in the preset."""
    settings: Mapping[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        find_method(self.uses)
        if self.preset not in PRESETS:
            raise ConfigError(f'unknown preset "{self.preset}" (expected {", ".join(PRESETS)})')
        for name, least in (("queries", 1), ("curve", 0), ("augment", 0)):
            value = getattr(self, name)
            if isinstance(value, int) and value < least:
                raise ConfigError(f"{name} is {value}, expected at least {least}")
        if isinstance(self.curve, tuple) and min(self.curve, default=0) < 1:
            listed = list(self.curve)
            raise ConfigError(f"curve is {listed}, expected a number, or query counts from 1 on")
        assert self.config is not None  # reports an invalid setting

    def on(self, data: DataPlan) -> MethodPlan:
        """Return the method as it is tuned on a data set."""
        return replace(self, settings={**data.settings.get(self.uses, {}), **self.settings})

    @property
    def config(self) -> Any:
        """The method's configuration."""
        return method_config(find_method(self.uses), self.settings, self.preset)

    @property
    def views(self) -> int:
        """Cached random views per training image."""
        return views_of(self.uses, self.preset) if self.augment is None else self.augment

    @property
    def snapshots(self) -> int | str:
        """The curve's points as in RunConfig."""
        return (
            self.curve
            if isinstance(self.curve, int)
            else ",".join(map(str, sorted(set(self.curve))))
        )


@dataclass(frozen=True)
class ProtocolPlan:
    """A protocol and its data sets, shots, seeds and methods."""

    kind: str
    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    data: tuple[str, ...] = ()
    """Data sets to tune and test on; empty for a transfer."""
    source: str | None = None
    """The data set that a transfer tunes on."""
    targets: tuple[str, ...] = ()
    """The data sets that a transfer tests on."""

    def __post_init__(self) -> None:
        if self.kind not in PROTOCOLS:
            raise ConfigError(f'kind is "{self.kind}", expected {" or ".join(PROTOCOLS)}')
        if self.kind in TRANSFERS:
            if self.source is None or not self.targets or self.data:
                raise ConfigError(f"{self.kind} takes source and targets, not data")
            if self.source in self.targets:
                raise ConfigError(f'the source "{self.source}" is among the targets')
        elif self.source is not None or self.targets:
            raise ConfigError(f"{self.kind} takes data, not source and targets")
        for name in ("shots", "seeds", "methods", "data", "targets"):
            values: Sequence[Any] = getattr(self, name)
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} has a duplicate entry")
        if not self.methods or not self.seeds or not self.shots or not (self.data or self.targets):
            raise ConfigError("shots, seeds, methods and data must not be empty")
        if min(self.shots) < 1 or min(self.seeds) < 0:
            raise ConfigError("expected shots of at least 1 and seeds of at least 0")

    @property
    def sources(self) -> tuple[str, ...]:
        """The data sets to tune on."""
        return self.data if self.source is None else (self.source,)


@dataclass(frozen=True)
class ExecutionPlan:
    """How cells run; the last bits of a result depend on it."""

    provider: str = "auto"
    threads: int | None = 1
    """Per worker; None: all cores."""
    memory_limit: int | None = None
    force: bool = False
    """Tune below the signal-to-noise limit."""
    isolate: bool = False
    """Run each cell in its own process, which measures its peak memory."""

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
    """The configuration of a bench."""

    path: Path
    title: str
    models: Mapping[str, str]
    """Bundles by name."""
    data: Mapping[str, DataPlan]
    methods: Mapping[str, MethodPlan]
    protocols: tuple[ProtocolPlan, ...]
    execution: ExecutionPlan

    def draws(self) -> Iterator[Draw]:
        """Yield all draws, seed by seed: a stopped bench then has results of everything."""
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
        """Return the absolute path of a path in the plan.

        Raises: ConfigError for an invalid path.
        """
        try:
            return (self.path.parent / Path(path).expanduser()).resolve()
        except (RuntimeError, ValueError) as error:  # an unknown home folder; an invalid character
            raise ConfigError(f'plan "{self.path}": invalid path {path!r} ({error})') from None

    @property
    def name(self) -> str:
        """The file's name, which names results and report."""
        return self.path.stem

    def to_json(self, bundles: Mapping[str, str], found: Mapping[str, Found]) -> dict[str, Json]:
        """Return the plan for reports, without folders of data and models.

        `bundles` has the digests of its models, `found` the findings on the data sets read.
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
                    "template": as_json(one)["template"],
                    "place": one.place,
                    "found": plain(found[name]) if name in found else None,
                }
                for name, one in self.data.items()
            },
            "methods": {name: as_json(one) for name, one in self.methods.items()},
            "protocols": [as_json(one) for one in self.protocols],
            # Without what does not change results.
            "execution": {k: v for k, v in as_json(self.execution).items() if k != "isolate"},
        }


@dataclass(frozen=True, kw_only=True)
class _File:
    """A plan's file; defaults of methods and protocols are checked with each of them."""

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
    """Read and check a plan, without its bundles and images.

    Raises: ConfigError naming the invalid key, method or setting, and the valid ones; DataError
        for a file that is not text.
    """
    where = f'plan "{path}"'
    if not path.is_file():
        state = "is not a file" if path.exists() else "does not exist"
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
    """Refuse names that cannot be a folder of OUT or part of a list like `zip,gda`.

    Raises: ConfigError naming `where`.
    """
    if not is_plain_name(name) or name != name.strip() or "," in name:
        raise ConfigError(
            f"{where}: invalid name (expected a file name without comma and outer blanks)"
        )


def _data(name: str, entry: Mapping[str, Any], where: str) -> DataPlan:
    data = _configured(DataPlan, entry, where)
    if data.path is None:
        try:
            find_spec(name)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error} (or give a path)") from None
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
                raise ConfigError(f'{where}: "{name}" is not in [{kind}] (expected {listed})')
    for name in protocol.targets:
        if data[name].test_data is not None:
            raise ConfigError(
                f'{where}: the target "{name}" has test_data (make it a separate data set)'
            )
    return protocol


def _check_transfers(protocols: Sequence[ProtocolPlan], where: str) -> None:
    """Refuse transfers whose cells have the same names, which tables could not distinguish."""
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
                    f'"{one.source}" with different targets (list all targets in one of them)'
                )


def _configured(kind: type[T], entry: Mapping[str, Any], where: str) -> T:
    with _located(where):
        return configured(kind, entry, where)


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    """Prefix an error with its place in the plan, once."""
    try:
        yield
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(where) else f"{where}: {message}") from None
