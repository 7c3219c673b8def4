"""Caches of text features: in memory for one run, and on disk for all."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from ztune.data.cache import FeatureCache, key_of, mark_used, trim
from ztune.errors import DataError, StorageError
from ztune.progress import warn
from ztune.types import F32, I64, PromptEncoder

_MOST_BYTES = 256_000_000
MOST_LOG_BYTES = 4_000_000
"""Bytes of a class's log, which is started again when it is larger."""
MOST_FOLDER_BYTES = 256_000_000
"""Bytes of the logs that are kept, the last used ones."""


class CachedTextEncoder:
    """Caches an encoder's results by whole calls, within a memory limit (a PromptEncoder).

    Equal calls give equal bytes with or without it.
    """

    def __init__(self, encoder: PromptEncoder):
        self._encoder = encoder
        self._known: dict[bytes, F32] = {}
        self._bytes = 0

    def encode(self, contexts: F32) -> F32:
        key = hashlib.sha256(contexts.tobytes()).digest()
        if key in self._known:
            return np.array(self._known[key])
        features = self._encoder.encode(contexts)
        if self._bytes + features.nbytes <= _MOST_BYTES:
            self._known[key] = features.copy()
            self._bytes += features.nbytes
        return features


class PartialEncoder(PromptEncoder, Protocol):
    """An encoder of contexts that can leave out classes."""

    @property
    def embed_dim(self) -> int:
        """The size of a feature."""

    @property
    def class_keys(self) -> tuple[str, ...]:
        """What a feature depends on, for each class, besides the context and the bundle."""

    @property
    def whole_calls(self) -> bool:
        """Whether the bytes of a feature depend on all of its call."""

    def part(self, classes: I64) -> PromptEncoder:
        """Return the encoder of some classes i64[k], with the bytes that they have here."""


@dataclass
class TextStore:
    """Text features on disk, for all runs with a bundle on a machine: a log for each class name.

    Several processes may use it. Damaged records are encoded again, and so are those of logs that
    were removed to bound its size. A folder that cannot be written or read is not used, with a
    warning.
    """

    folder: Path
    identity: tuple[str, ...]
    """All that features depend on besides class and context: bundle, provider, version, machine."""
    _failed: bool = field(default=False, init=False)

    def read(self, class_key: str, embed_dim: int) -> dict[bytes, F32]:
        """Return the features f32[e] of a class by the digest of their context."""
        if self._failed:
            return {}
        try:
            log = FeatureCache(self.folder).log(*self.identity, class_key)
            with contextlib.suppress(OSError):  # read-only, or not there yet
                if log.path.stat().st_size > MOST_LOG_BYTES:
                    log.path.unlink()
            mark_used(log.path)
            return {key: row for key, row in log.read().items() if row.size == embed_dim}
        except DataError as error:
            self._fail(error)
            return {}

    def append(self, class_key: str, records: Mapping[bytes, F32]) -> None:
        if self._failed:
            return
        try:
            FeatureCache(self.folder).log(*self.identity, class_key).append(records)
        except (DataError, StorageError) as error:
            self._fail(error)

    def trim(self) -> None:
        """Remove the logs that were not used for longest, if there are too many bytes."""
        trim(self.folder, MOST_FOLDER_BYTES)

    def _fail(self, error: Exception) -> None:
        self._failed = True
        warn(f"{error} (text features are not kept)")


class StoredTextEncoder:
    """Encodes only the classes of a call that are not on disk (a PromptEncoder).

    Equal calls give equal bytes with or without it.
    """

    def __init__(self, encoder: PartialEncoder, store: TextStore):
        self._encoder, self._store = encoder, store
        self._class_keys = encoder.class_keys
        self._known: list[dict[bytes, F32]] | None = None
        self._parts: dict[tuple[int, ...], PromptEncoder] = {}
        self._n_bytes = 0
        self._n_found = 0

    def take_n_found(self) -> int:
        """Return the number of class prompts found on disk since the last time it was asked."""
        n, self._n_found = self._n_found, 0
        return n

    def encode(self, contexts: F32) -> F32:
        keys = _keys_of(contexts, together=self._encoder.whole_calls)
        if self._known is None:
            size = self._encoder.embed_dim
            self._known = [self._store.read(key, size) for key in self._class_keys]
        known, n_classes = self._known, len(self._class_keys)
        missing = [c for c in range(n_classes) if not known[c].keys() >= set(keys)]
        if missing and self._encoder.whole_calls:
            missing = list(range(n_classes))
        features = np.empty((len(keys), n_classes, self._encoder.embed_dim), dtype=np.float32)
        if missing:
            features[:, missing] = self._part(tuple(missing)).encode(contexts)
        for c in range(n_classes):
            if c in missing:
                self._keep(self._class_keys[c], keys, features[:, c])
            else:
                features[:, c] = [known[c][key] for key in keys]
        self._n_found += len(keys) * (n_classes - len(missing))
        return features

    def _part(self, classes: tuple[int, ...]) -> PromptEncoder:
        if len(classes) == len(self._class_keys):
            return self._encoder
        if classes not in self._parts:
            self._parts[classes] = self._encoder.part(np.array(classes, dtype=np.int64))
        return self._parts[classes]

    def _keep(self, class_key: str, keys: list[bytes], rows: F32) -> None:
        """Add the features f32[P, e] of a class to the store while there is room."""
        self._n_bytes += rows.nbytes
        if self._n_bytes <= _MOST_BYTES and np.isfinite(rows).all():
            self._store.append(class_key, dict(zip(keys, rows, strict=True)))


def _keys_of(contexts: F32, *, together: bool) -> list[bytes]:
    """Return the key of each context f32[m, d]; `together`: which depends on all of them."""
    own = [_digest(context) for context in contexts]
    if not together:
        return [key_of(one) for one in own]
    return [key_of(str(number), *own) for number in range(len(own))]


def _digest(values: F32) -> str:
    return hashlib.sha256(repr(values.shape).encode() + values.tobytes()).hexdigest()
