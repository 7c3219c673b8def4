"""The settings of a run, saved in run.json and restored on resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ztune.data.features import Views
from ztune.data.named import find_spec
from ztune.data.sources import find_named
from ztune.data.split import ALL, MOST_VAL, Shots, SplitSettings, parse_test_fraction
from ztune.errors import ConfigError
from ztune.methods.base import TunedConfig
from ztune.methods.registry import (
    PRESETS,
    find_method,
    method_config,
    preset_of,
    tuned_config,
    uses_views,
)
from ztune.types import Json

UNIFORM, DATA = "uniform", "data"
PRIORS = (UNIFORM, DATA)
_MOST_REFUSED = 0.5


@dataclass(frozen=True)
class RunConfig:
    """The settings of one run, with absolute paths."""

    bundle: str
    data: str
    """A path, or with `root` a data set's name."""
    method: str = "auto"
    shots: Shots = ALL
    queries: int = 5000
    seed: int = 1
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Templates for zero-shot, heads and visual prompts; their text features are averaged."""
    preset: str = "default"
    provider: str = "auto"
    threads: int | None = None
    memory_limit: int | None = None
    val: int | None = None
    test_fraction: str = "auto"
    split_seed: int = 0
    test_data: str | None = None
    names: str | None = None
    nested: str | None = None
    """Which of nested folders are classes: data/folders.py."""
    cache: str | None = None
    """None: the folder that all runs share."""
    augment: int = 0
    skip_broken: bool = False
    skip_conflicts: bool = False
    """Leave out images with two classes or roles."""
    force: bool = False
    """Continue below the signal check's limit."""
    keep: str = "last"
    """The last point, as published, or the best on validation."""
    validate_every: int | None = None
    """Queries between validation passes; None: a fiftieth of the budget."""
    patience: int | None = None
    """Validation passes without gain before stopping; None: never stop."""
    snapshots: int | str = 0
    """Intermediate artifacts: their number, or query counts as in `25,50,100`."""
    reference: str | None = None
    """Reference bundle of the signal; None: the bundle's own graph in higher precision."""
    settings: Mapping[str, Json] = field(default_factory=dict)
    """The method's settings that differ from its preset; `extractor` becomes an absolute path."""
    server: Mapping[str, Json] = field(default_factory=dict)
    """Server settings if `bundle` is a URL, without secrets: runtimes/remote/."""
    root: str | None = None
    """The folder of all named data sets."""
    priors: str = UNIFORM
    """Of the classes: the same, or `data`, their shares of the training images."""
    reject: float | None = None
    """The share of images of the classes that may be refused as none of them; None: no refusal."""

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ConfigError(f"`queries` is {self.queries}, expected at least 1")
        if self.preset not in PRESETS:
            raise ConfigError(f'unknown preset "{self.preset}"; known: {", ".join(PRESETS)}')
        if self.priors not in PRIORS:
            raise ConfigError(f'`priors` is "{self.priors}", expected {" or ".join(PRIORS)}')
        if self.augment < 0:
            raise ConfigError(f"`augment` is {self.augment}, expected 0 or more views")
        for template in self.templates:
            if template.count("{}") != 1:
                raise ConfigError(
                    f'`templates` "{template}" has {template.count("{}")} {{}}, expected one'
                )
        if self.keep not in ("last", "best"):
            raise ConfigError(f'`keep` is "{self.keep}", expected last or best')
        for name in ("validate_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"`{name}` is {value}, expected at least 1")
        if self.validate_every is not None and not self.validates:
            raise ConfigError("`validate_every` requires `keep=best` or `patience`")
        if isinstance(self.snapshots, int) and self.snapshots < 0:
            raise ConfigError(f"`snapshots` is {self.snapshots}, expected 0 or more")
        if isinstance(self.snapshots, str):
            _counts(self.snapshots)
        share = self.reject
        if share is not None and not (isinstance(share, int | float) and 0 < share < _MOST_REFUSED):
            raise ConfigError(
                f"`reject` is {share!r}, expected a share of own images between 0 and "
                f"{_MOST_REFUSED:g}, such as 0.05"
            )
        if self.validates and self.val == 0:
            raise ConfigError("`keep=best` and `patience` need validation images (`val`)")
        object.__setattr__(self, "settings", absolute_paths(self.settings))

    @cached_property
    def method_config(self) -> Any:
        """The method's configuration: its preset overridden by the settings.

        Raises: ConfigError, also if the budget is less than one step.
        """
        method = find_method(self.method)
        config = method_config(method, self.settings, self.preset)
        tuned = tuned_config(method, config)
        if self.priors != UNIFORM and tuned is not None and not tuned.ensembles:
            raise ConfigError(
                f"{self.method} tunes prompts, which have one bias for all classes: leave out "
                "`priors`, or use auto or a head"
            )
        if self.augment and not uses_views(method, config):
            why = "uses the same images in all rounds, with one view each"
            if tuned is None:
                why = "uses no training images"
            raise ConfigError(f"{self.method} {why}: leave out `augment`")
        if tuned is None:
            for name in ("keep", "patience", "snapshots"):
                if getattr(self, name) != getattr(RunConfig, name):
                    raise ConfigError(f"{self.method} has no steps: leave out `{name}`")
            return config
        least = tuned.step_queries()
        if self.queries < least:
            what = "one step" if least <= tuned.round_size else "its first step"
            raise ConfigError(
                f"`queries` {self.queries} is less than {what} of {self.method}, which costs "
                f"{least}"
            )
        return config

    @property
    def views(self) -> Views:
        """The views of each training image."""
        preset = preset_of(find_method(self.method), self.preset)
        return Views(self.augment, self.seed, preset.least_area)

    def check_budget(self, n_images: int) -> None:
        """Check that the budget is enough with `n_images` training images.

        Raises: ConfigError.
        """
        tuned = self.tuned_config
        if tuned is not None and self.queries < (least := tuned.least_queries(n_images)):
            raise ConfigError(
                f"`queries` {self.queries} is less than one candidate of {self.method} on all "
                f"batches of {n_images} images, which costs {least}"
            )

    def check_method(self) -> None:
        """Check method, preset, settings and budget; raises as `method_config`."""
        assert self.method_config is not None

    @property
    def tuned_config(self) -> TunedConfig | None:
        """The configuration of a method with steps; None for a closed form."""
        return tuned_config(find_method(self.method), self.method_config)

    @property
    def extractor(self) -> Path | None:
        """The decoder's feature extractor; None: the bundle's image tower."""
        tuned = self.tuned_config
        return None if tuned is None or tuned.extractor is None else Path(tuned.extractor)

    @property
    def validates(self) -> bool:
        """Whether validation passes affect the run, so that they are charged."""
        return self.keep == "best" or self.patience is not None

    @property
    def queries_between_validations(self) -> int:
        return self.validate_every or max(1, self.queries // 50)

    def snapshot_marks(self, spent: int) -> list[int]:
        """Return the snapshots' query counts: those given, or denser at first, up to `spent`."""
        n = self.snapshots
        if isinstance(n, str):
            return _counts(n)
        return sorted({max(1, round(spent * (i / n) ** 2)) for i in range(1, n)})

    def split_settings(self) -> SplitSettings:
        """Return the settings of the split.

        Raises: ConfigError for invalid numbers.
        """
        share = parse_test_fraction(self.test_fraction)
        n_val = self.val
        if n_val is None and self.shots == ALL and self._needs_validation:
            n_val = MOST_VAL
        return SplitSettings(self.shots, n_val, share, self.split_seed, self.seed)

    @property
    def _needs_validation(self) -> bool:
        """Whether the method has steps and predicts no training image without having seen it."""
        tuned = self.tuned_config
        return tuned is not None and not tuned.mixes

    @property
    def shots_shown(self) -> str:
        """The shots as in `16 shots`."""
        return "all images" if self.shots == ALL else f"{self.shots} shots"


def _counts(listed: str) -> list[int]:
    """Return the sorted, distinct query counts of a list like `25,50`.

    Raises: ConfigError.
    """
    parts = [part.strip() for part in listed.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(
            f'`snapshots` is "{listed}", expected a number, or query counts as in 25,50,100'
        )
    return sorted({int(part) for part in parts})


def absolute_paths(settings: Mapping[str, Json], folder: Path = Path()) -> Mapping[str, Json]:
    """Return a method's settings; a path of `extractor` is taken relative to `folder`.

    Raises: ConfigError for an invalid path.
    """
    path = settings.get("extractor")
    if not isinstance(path, str) or path in ("none", "null"):
        return settings
    try:
        place = (folder / Path(path).expanduser()).resolve()
    except (RuntimeError, ValueError) as error:  # an unknown home folder; an invalid character
        raise ConfigError(f"`extractor`: invalid path {path!r} ({error})") from None
    return {**settings, "extractor": str(place)}


def place_of(data: str, root: Path | None) -> str:
    """Return `data` for run.json: a known name, else an absolute path.

    Raises: ConfigError for a name without `root`, or `root` without a name; DataError for a value
        that is neither name nor path.
    """
    if spec := find_named(data, root):
        return spec.name
    if root is not None:
        raise ConfigError(
            f'`root` requires a data set\'s name, but `data` "{data}" is a path (leave out '
            "`root`, or list the names: ztune data list)"
        )
    return str(Path(data).resolve())


def remarks_on(run_config: RunConfig) -> list[str]:
    """Return remarks on unusual settings, one line each."""
    if run_config.root is None:
        return []
    spec = find_spec(run_config.data)
    if run_config.templates == (spec.template,):
        return []
    mine = ", ".join(f'"{template}"' for template in run_config.templates)
    return [f'{spec.title}: the papers use `templates` "{spec.template}", this run {mine}']
