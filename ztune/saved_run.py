"""A started run, read from its folder: what it was started with, and how it goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ztune.data.relocate import relocate
from ztune.data.split import Split
from ztune.encoded import EncodedSplit
from ztune.errors import ConfigError, FormatError
from ztune.io.files import read_json, write_json
from ztune.io.schema import plain
from ztune.methods.plugins import package_of
from ztune.model import Model
from ztune.progress import warn
from ztune.run import RunFolder
from ztune.run_config import RunConfig
from ztune.run_document import RunReport, RunStart, run_start, unfinished
from ztune.system import machine, versions
from ztune.training import TrainingRun, draw_curve, has_curve

# Keys of run.json that affect the last bits of a result.
_ARITHMETIC = (
    "ztune", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "processor", "cores",
)  # fmt: skip


@dataclass(frozen=True)
class SavedRun:
    """A started run, read from its folder."""

    folder: RunFolder
    head: RunStart
    """The content of run.json; a RunReport for a finished run."""

    @classmethod
    @contextlib.contextmanager
    def locked(cls, path: Path) -> Iterator[SavedRun]:
        """Yield a folder's run, locked against other processes.

        Raises: FormatError for a folder without a run; ConfigError if another process has it.
        """
        folder = RunFolder(path)
        folder.read()
        with folder.locked():
            yield cls(folder, run_start(folder.read(), f'run "{path}": run.json'))

    @cached_property
    def run_config(self) -> RunConfig:
        """The run's settings, with the method's settings as of its start."""
        own, settings = self.head.run_config, self.head.config
        if isinstance(self.head, RunReport) and own.tuned_config is None:
            return own  # its head has the settings that were chosen
        if "extractor" in own.settings:  # config has its SHA-256
            settings = {**settings, "extractor": own.settings["extractor"]}
        return replace(own, settings=settings)

    def require_same(self, run_config: RunConfig, split: Split, model: Model) -> None:
        """Check that the run was started with the same model, method, settings and images.

        Raises: ConfigError naming the differences.
        """
        where, then = f'run "{self.folder.path}"', self.head.run_config
        own = (
            "method", "queries", "seed", "templates", "keep", "patience", "reject", "force",
            "priors",
        )  # fmt: skip
        differ = [name for name in own if getattr(run_config, name) != getattr(then, name)]
        if not differ and plain(run_config.method_config) != plain(then.method_config):
            differ.append("settings")
        if run_config.views != then.views:
            differ.append("views")
        if self.head.package != package_of(run_config.method):
            differ.append("package of the method")
        if model.bundle.digest != self.head.bundle_digest:
            differ.append("model")
        if read_json(self.folder.split, where).get("entries") != split.to_json()["entries"]:
            differ.append("images (or by a ztune version that splits them differently)")
        if differ:
            raise ConfigError(
                f'run "{self.folder.path}" was started with other {", ".join(differ)} (use the '
                "same, name another `run_dir`, or remove that folder)"
            )

    def report(self) -> RunReport | None:
        """Return the report of a finished run; None for one that has to be resumed.

        A missing curve is drawn again; a run without its result has to be resumed.

        Raises: FormatError if the curve is missing, and the history missing or damaged.
        """
        if not isinstance(self.head, RunReport) or not self.folder.prompt.is_file():
            return None
        if has_curve(self.run_config) and not self.folder.curve.is_file():
            draw_curve(self.folder, self.head)
        return self.head

    def resume(
        self,
        model: Model,
        encoded: EncodedSplit | None = None,
        *,
        files: bool = True,
        roots: Mapping[str, Path] | None = None,
    ) -> RunReport:
        """Finish the run; return run.json's content.

        `encoded` are the split's features, if known; without `files` its images are in memory.
        `roots` are the new folders of moved images (`resolve_roots`), which the run keeps.

        Raises: FormatError for another model, or a damaged folder; ZtuneError for changed images.
        """
        if model.bundle.digest != self.head.bundle_digest:
            raise FormatError(
                f"{model.where} is not the one that the run was started with (put it back, or "
                "start a new run)"
            )
        if self.head.package != (now := package_of(self.run_config.method)):
            raise ConfigError(
                f'run "{self.folder.path}" was started with {self.run_config.method} of '
                f"{self.head.package or 'ztune'}, but {now or 'no such package'} is installed "
                "(install that version, or start a new run)"
            )
        self._warn_of_changes()
        where = f'run "{self.folder.path}"'
        split = Split.from_json(read_json(self.folder.split, where), f"{where}: split.json")
        if roots:
            split = relocate(split, roots)
        if files:
            split.check_unchanged()
        if roots:
            write_json(self.folder.split, split.to_json())
        run = TrainingRun(self.run_config, split, self.folder, model, encoded)
        run.check()
        return run.finish(unfinished(self.head))

    def _warn_of_changes(self) -> None:
        then = {**self.head.versions, **self.head.machine}
        now = {**versions(), **machine()}
        changed = [
            f"{k} {then.get(k)}, now {now.get(k)}" for k in _ARITHMETIC if then.get(k) != now.get(k)
        ]
        if changed:
            warn(f"results may differ, changed since the run started: {'; '.join(changed)}")
