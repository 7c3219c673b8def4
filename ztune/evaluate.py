"""Pictures to score: encoded once as they are, and anew under each visual prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ztune.artifact import Artifact, VisualArtifact
from ztune.data.features import Features
from ztune.errors import ConfigError
from ztune.io.files import sha256
from ztune.model import Workbench
from ztune.task import open_program
from ztune.types import F32

# Pictures whose pixels are in memory at once.
_AT_ONCE = 32


@dataclass(frozen=True)
class Gallery:
    """Pictures, as (file, SHA-256), and a bundle to score them with."""

    bench: Workbench
    items: Sequence[tuple[Path, str]]
    cache: Path
    what: str
    skip_broken: bool
    plain: Features
    """What the image tower says of them as they are."""
    extractor: Path | None = None

    def logits(self, artifact: Artifact) -> F32:
        """Return f32[n, C] of the pictures that can be read.

        Raises: ConfigError when the artifact was tuned with another extractor.
        """
        classifier = artifact.classifier()
        if not isinstance(artifact, VisualArtifact):
            return classifier.logits(self.plain.values[0])
        extracted = self._extracted(artifact)
        width = extracted.shape[-1]
        images = open_program(self.bench, artifact.program, width, artifact.statistics)
        parts = []
        with self.bench.progress.activity(f"{self.what}, changed", len(extracted)) as ticker:
            for first, pixels in self._pixels():
                seen = extracted[first : first + len(pixels)]
                parts.append(images.encode(artifact.visual[None], pixels, seen)[0])
                ticker.update(first + len(pixels))
        return classifier.logits(np.concatenate(parts))

    def _extracted(self, artifact: VisualArtifact) -> F32:
        if not artifact.extractor:
            return self.plain.values[0]
        extractor = required_extractor(artifact, self.extractor)
        return self.bench.features(
            self.items,
            self.cache,
            what=f"{self.what} for the extractor",
            skip_broken=self.skip_broken,
            extractor=extractor,
        ).values[0]

    def _pixels(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield u8[n, S, S, 3] and the place of its first picture."""
        encoder = self.bench.runtime.images()
        kept = [item for item, keep in zip(self.items, self.plain.kept, strict=True) if keep]
        for first in range(0, len(kept), _AT_ONCE):
            paths = [path for path, _ in kept[first : first + _AT_ONCE]]
            yield first, np.stack([encoder.read(path, None) for path in paths])


def open_gallery(
    bench: Workbench,
    items: Sequence[tuple[Path, str]],
    cache: Path,
    *,
    what: str,
    skip_broken: bool,
    extractor: Path | None = None,
) -> Gallery:
    """Encode the pictures as they are."""
    plain = bench.features(items, cache, what=what, skip_broken=skip_broken)
    return Gallery(bench, items, cache, what, skip_broken, plain, extractor)


def extractor_for(artifact: Artifact | None, named: Path | None, known: str | None) -> Path | None:
    """Return the checked extractor that the artifact needs: as --extractor named it, else its run.

    Raises: ConfigError, also when one was named and none is needed.
    """
    if isinstance(artifact, VisualArtifact) and artifact.extractor:
        return required_extractor(artifact, named or (Path(known) if known else None))
    if named is not None:
        what = "templates need no" if artifact is None else "the result was tuned without an"
        raise ConfigError(f"{what} extractor; leave out --extractor")
    return None


def required_extractor(artifact: VisualArtifact, path: Path | None) -> Path:
    """Return the extractor's file, checked to be the one that the artifact was tuned with.

    Raises: ConfigError.
    """
    if path is None:
        raise ConfigError(
            "the visual prompt was tuned with a feature extractor of its own: name it with "
            "--extractor FILE"
        )
    if not path.is_file():
        state = "is no file" if path.exists() else "does not exist"
        raise ConfigError(
            f'the feature extractor "{path}" of the visual prompt {state}; put it back, or '
            "name where it is now with --extractor FILE"
        )
    if sha256(path) != artifact.extractor:
        raise ConfigError(
            f'--extractor "{path}" is not the one that the visual prompt was tuned with '
            f"(SHA-256 {artifact.extractor[:12]}… expected)"
        )
    return path
