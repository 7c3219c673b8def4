"""The tasks on which queries are counted: which images, which classes, how many shots.

`cifar10`, `cifar10-negative`, `pacs-photo`, `pacs-sketch` are folders of class folders, and
`caltech-101` one in CoOp's layout, below a folder that the command names; the digits are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.measure import ROOT
from benchmarks.query_images import changed, of_coop_layout
from ztune.errors import ConfigError

_CALTECH = "caltech-101"
_BASE, _NEW = slice(0, 50), slice(50, 100)
"""CoOp's halves of Caltech101's classes, in the order of its split file."""


@dataclass(frozen=True)
class Task:
    """A few-shot task."""

    name: str
    source: str
    """Folder of the images, below the one that is named."""
    change: str | None = None
    """One of CHANGES."""
    shots: int = 16
    classes: slice | None = None
    """Of a set in CoOp's layout."""
    new_classes: slice | None = None
    """What else its prompts are tried on."""
    shipped: bool = False
    """Images and model come with the repository."""
    template: str = "a photo of a {}."

    def data(self, images: Path | None, work: Path) -> Path:
        """Return the folder of its images, written below `work` where it is a derived one.

        Raises: DataError; ConfigError where images are needed and were not named.
        """
        if self.shipped:
            return ROOT / self.source
        if images is None:
            raise ConfigError(f"task {self.name} needs --images DIR")
        found, name = images / self.source, self.source
        if self.classes is not None:
            name = f"{name}-{self.classes.start}-{self.classes.stop}"
            found = of_coop_layout(found, self.classes, work / name)
        if self.change is not None:
            found = changed(found, self.change, work / f"{name}-{self.change}")
        return found

    @property
    def of_new_classes(self) -> Task | None:
        """The same with the classes that its prompts are also tried on."""
        if self.new_classes is None:
            return None
        return replace(self, classes=self.new_classes, new_classes=None)

    def bundle(self, given: Path | None) -> Path:
        """Return the model.

        Raises: ConfigError where it is not ours and none was named.
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
        # The largest last: what is cut short has most of the others.
        Task("caltech-base-edges", _CALTECH, "edges", classes=_BASE),
        Task("caltech-base", _CALTECH, classes=_BASE, new_classes=_NEW),
    )
}
