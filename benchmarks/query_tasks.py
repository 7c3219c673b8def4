"""The tasks of the measurement: images, classes and shots.

`cifar10`, `cifar10-negative`, `pacs-photo`, `pacs-sketch` are folders of class folders, and
`caltech-101` is in CoOp's layout, all in `--images`; the digits are in the repository.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.measure import ROOT
from benchmarks.query_images import change_images, select_coop_classes
from ztune.errors import ConfigError

_CALTECH = "caltech-101"
_BASE, _NEW = slice(0, 50), slice(50, 100)
"""CoOp's halves of Caltech101's classes, in the order of its split file."""


@dataclass(frozen=True)
class Task:
    """A few-shot task."""

    name: str
    source: str
    """Its folder in the folder of images."""
    change: str | None = None
    """One of CHANGES."""
    shots: int = 16
    classes: slice | None = None
    """Indices of classes of a set in CoOp's layout."""
    new_classes: slice | None = None
    """Classes on which its prompts are also evaluated."""
    shipped: bool = False
    """Whether images and model are in the repository."""
    template: str = "a photo of a {}."

    def data(self, images: Path | None, work: Path) -> Path:
        """Return the folder of its images, which is below `work` for a derived set.

        Raises: DataError; ConfigError when `images` is needed and missing.
        """
        if self.shipped:
            return ROOT / self.source
        if images is None:
            raise ConfigError(f"task {self.name} needs --images DIR")
        found, name = images / self.source, self.source
        if self.classes is not None:
            name = f"{name}-{self.classes.start}-{self.classes.stop}"
            found = select_coop_classes(found, self.classes, work / name)
        if self.change is not None:
            found = change_images(found, self.change, work / f"{name}-{self.change}")
        return found

    @property
    def of_new_classes(self) -> Task | None:
        """The same task with the new classes."""
        if self.new_classes is None:
            return None
        return replace(self, classes=self.new_classes, new_classes=None)

    def bundle(self, given: Path | None) -> Path:
        """Return the model.

        Raises: ConfigError when `given` is needed and missing.
        """
        if self.shipped:
            return ROOT / "models" / "mini"
        if given is None:
            raise ConfigError(f"task {self.name} needs a BUNDLE")
        return given


TASKS = {
    task.name: task
    for task in (
        Task("cifar10", "cifar10"),
        Task("cifar10-negative", "cifar10-negative"),
        Task("cifar10-grey", "cifar10", "grey"),
        Task("cifar10-rotated", "cifar10", "rotated"),
        Task("cifar10-noise", "cifar10", "noise"),
        Task("cifar10-blur", "cifar10", "blur"),
        Task("pacs-photo", "pacs-photo"),
        Task("pacs-photo-negative", "pacs-photo", "negative"),
        Task("pacs-photo-edges", "pacs-photo", "edges"),
        Task("pacs-sketch", "pacs-sketch"),
        Task("pacs-sketch-rotated", "pacs-sketch", "rotated"),
        Task("cifar10-negative-8shot", "cifar10-negative", shots=8),
        Task("pacs-photo-negative-4shot", "pacs-photo", "negative", shots=4),
        Task("pacs-sketch-2shot", "pacs-sketch", shots=2),
        Task("pacs-sketch-1shot", "pacs-sketch", shots=1),
        Task("cifar10-4shot", "cifar10", shots=4),
        Task("caltech-20", _CALTECH, classes=slice(0, 20)),
        Task(
            "digits",
            "examples/digits",
            shipped=True,
            template="a photo of the digit {}.",
        ),
        # The largest last, so that an interrupted measurement has most of the others.
        Task("caltech-base-edges", _CALTECH, "edges", classes=_BASE),
        Task("caltech-base", _CALTECH, classes=_BASE, new_classes=_NEW),
    )
}
