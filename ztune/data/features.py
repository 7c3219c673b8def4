"""Encode every image once and cache its features.

A feature's bytes depend only on the image, its view and the encoder. Therefore batches always have
the same size (the last one is padded with its first image), because a matrix product of another
shape may round differently; and a random view is drawn from (augmentation seed, image's digest,
number of the view), independently of other images.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ztune.data.cache import FeatureStore, key_of
from ztune.data.split import Progress
from ztune.errors import DataError, ImageSizeError
from ztune.printing import broken_images
from ztune.types import F32, LEAST_AREA, U8, ImageEncoder, RandomView

_READERS = 2
"""Threads that read images while the encoder works."""


@dataclass(frozen=True)
class Views:
    """The views of each image."""

    n: int = 0
    """Random ones; 0: the centre crop."""
    seed: int = 0
    least_area: float = LEAST_AREA
    """The smallest share of an image's area in a random crop."""

    def __len__(self) -> int:
        return max(1, self.n)

    @property
    def kind(self) -> tuple[str, ...]:
        """All but the number, for cache keys."""
        if self.n == 0:
            return ("centre",)
        area = () if self.least_area == LEAST_AREA else (f"area {self.least_area}",)
        return ("random", str(self.seed), *area)


CENTRE = Views()


@dataclass(frozen=True)
class Features:
    """Features of images."""

    values: F32
    """Unit features f32[V, N, e] of the N images that could be read, in order."""
    kept: NDArray[np.bool_]
    """bool[images requested]: False for a broken image, which is skipped."""
    n_encoded: int
    """Views encoded now; the others came from the cache."""
    conversions: Mapping[str, int] = field(default_factory=dict)
    """How many images each rule changed (runtimes.conversions)."""


@dataclass(frozen=True)
class _Job:
    """One image and its views that are not cached."""

    path: Path
    sha256: str
    views: tuple[int, ...]
    keys: tuple[bytes, ...]


def encode_files(
    encoder: ImageEncoder,
    items: Sequence[tuple[Path, str]],
    cache: FeatureStore,
    views: Views = CENTRE,
    batch_size: int = 8,
    at_once: int = 1,
    progress: Progress | None = None,
    skip_broken: bool = False,
) -> Features:
    """Return the features of images given as (file, SHA-256 of its content).

    The encoder gets `at_once` batches per call, which hides a server's latency and does not change
    features. `progress` counts views. `encoder.read` is called from several threads.

    Raises: DataError naming all images that cannot be read, unless `skip_broken` (then when none
        can), or an image with features that are not finite.
    """
    # The batch size is part of the key: it may change the last bits.
    identity = (encoder.identity, f"batch {batch_size}", *views.kind)
    log = cache.log(*identity)
    keys = [
        [key_of(*identity, str(view), digest) for view in range(len(views))] for _, digest in items
    ]
    known = log.read({key for row in keys for key in row})
    n_views_all, n_encoded = len(items) * len(views), 0
    broken: dict[str, str] = {}

    def read(job: _Job) -> tuple[_Job, U8 | DataError]:
        try:
            pixels = [read_view(encoder, job.path, job.sha256, view, views) for view in job.views]
            return job, np.stack(pixels)
        except DataError as error:
            return job, error

    def flush(batch: list[tuple[bytes, Path, U8]]) -> None:
        rows = [pixels for _, _, pixels in batch]
        rows += rows[:1] * (-len(rows) % batch_size)
        features = encoder.encode(np.stack(rows))[: len(batch)]
        for (_, path, _), feature in zip(batch, features, strict=True):
            if not np.isfinite(feature).all():
                raise DataError(f'image "{path}": its features are not finite')
        new = {key: np.array(f, np.float32) for (key, _, _), f in zip(batch, features, strict=True)}
        log.append(new)
        known.update(new)

    jobs = _missing(items, keys, known)
    n_done = n_views_all - sum(len(job.keys) for job in jobs)
    batch: list[tuple[bytes, Path, U8]] = []
    with contextlib.closing(_prefetch(read, jobs)) as images:
        for job, pixels in images:
            if isinstance(pixels, DataError):
                if isinstance(pixels, ImageSizeError) and not skip_broken:
                    raise pixels
                broken[job.sha256] = str(pixels)
                continue
            if broken and not skip_broken:
                continue  # only the names of other broken images are wanted
            for key, image in zip(job.keys, pixels, strict=True):
                batch.append((key, job.path, image))
                if len(batch) == batch_size * at_once:
                    flush(batch)
                    n_encoded += len(batch)
                    batch = []
                    if progress:
                        progress(n_done + n_encoded, n_views_all)
    if broken and not skip_broken:
        unread = [str(path) for path, digest in items if digest in broken]
        raise DataError(broken_images(next(iter(broken.values())), unread))
    if batch:
        flush(batch)
        n_encoded += len(batch)
    if progress:
        progress(n_views_all, n_views_all)
    kept = np.array([digest not in broken for _, digest in items], np.bool_)
    if not kept.any():
        raise DataError(f"none of {len(items)} image(s) can be read")
    rows = [row for row, keep in zip(keys, kept, strict=True) if keep]
    values = np.stack([np.stack([known[row[view]] for row in rows]) for view in range(len(views))])
    return Features(values, kept, n_encoded)


def read_view(encoder: ImageEncoder, path: Path, sha256: str, view: int, views: Views) -> U8:
    """Return u8[S, S, 3]: view number `view` of `views`."""
    if views.n == 0:
        return encoder.read(path, None)
    rng = np.random.default_rng([views.seed, view, int(sha256, 16)])
    return encoder.read(path, RandomView(rng, views.least_area))


def _missing(
    items: Iterable[tuple[Path, str]], keys: Iterable[list[bytes]], known: Iterable[bytes]
) -> list[_Job]:
    """Return the views that are not cached, in order, each image once."""
    seen = set(known)
    jobs = []
    for (path, digest), row in zip(items, keys, strict=True):
        views = tuple(view for view, key in enumerate(row) if key not in seen)
        if views:
            jobs.append(_Job(path, digest, views, tuple(row[view] for view in views)))
            seen.update(row)
    return jobs


def _prefetch(
    read: Callable[[_Job], tuple[_Job, U8 | DataError]], jobs: Iterable[_Job]
) -> Generator[tuple[_Job, U8 | DataError], None, None]:
    """Yield the images of all jobs in order, with a bounded number of reads ahead."""
    pending: deque[Future[tuple[_Job, U8 | DataError]]] = deque()
    with ThreadPoolExecutor(_READERS) as readers:
        try:
            for job in jobs:
                pending.append(readers.submit(read, job))
                if len(pending) > 2 * _READERS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            readers.shutdown(cancel_futures=True)
