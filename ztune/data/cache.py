"""Cache features on disk: one append-only file per encoder and kind of view.

Each record has a mark, a 32-byte key, the number of values, f32 values (little-endian) and the
CRC-32 of everything before. A batch of records is appended in one write. The reader skips corrupted
bytes, left by a kill, a full disk or concurrent writers, to the next valid mark. So files need no
locks, and are never truncated or rewritten; a lost record is encoded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import zlib
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ztune.errors import DataError, StorageError
from ztune.io.files import read_bytes, user_cache
from ztune.progress import warn
from ztune.types import F32

_MARK = b"zft1"
_HEAD = struct.Struct("<4s32sI")
_CRC = struct.Struct("<I")
_MOST_VALUES = 1 << 16


@dataclass(frozen=True)
class FeatureCache:
    """A folder of feature logs that several processes may use concurrently."""

    folder: Path

    def log(self, *identity: str) -> FeatureLog:
        """Return the log for features identified by the given texts.

        Raises: DataError when the folder cannot be created.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f'cache "{self.folder}" cannot be created: {error.strerror}') from None
        return FeatureLog(self.folder / f"{key_of(*identity).hex()[:32]}.features")


@dataclass(frozen=True)
class FeatureLog:
    """One file of records; see the module for its format."""

    path: Path

    def read(self, wanted: Set[bytes] | None = None) -> dict[bytes, F32]:
        """Return every valid record's f32[e] by key; a missing file is empty.

        Records of keys that are not `wanted` are skipped without a check, which is much faster.

        Raises: DataError when the file exists and cannot be read.
        """
        try:
            content = read_bytes(self.path)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise DataError(f'cache "{self.path}" cannot be read: {error.strerror}') from None
        records = {}
        start = content.find(_MARK)
        while start >= 0:
            if wanted is not None and (other := _skipped(content, start, wanted)):
                start = other if other < len(content) else -1
                continue
            record = _record_at(content, start)
            if record:
                key, values, end = record
                if wanted is None:
                    records[key] = values
                elif key in wanted:
                    records[key] = values.copy()  # else a few records keep the file's content
            start = content.find(_MARK, end if record else start + 1)
        return records

    def append(self, records: Mapping[bytes, F32]) -> None:
        """Add records f32[e] by their 32-byte keys.

        The file is not flushed to disk: a kill loses nothing, and records that a power failure
        corrupts are detected by CRC and encoded again.

        Raises: StorageError when the file cannot be written, a full disk included.
        """
        block = b"".join(_record(key, values) for key, values in records.items())
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        flags |= getattr(os, "O_NOFOLLOW", 0)  # a cache may come from another user's run
        try:
            file = os.open(self.path, flags, 0o666)
            try:
                written = os.write(file, block)
            finally:
                os.close(file)
        except OSError as error:
            raise StorageError(f'cache "{self.path}" cannot be written: {error.strerror}') from None
        if written < len(block):
            raise StorageError(f'cache "{self.path}" cannot be written: the disk is full')


@dataclass(frozen=True)
class OptionalCache:
    """A folder of feature logs that may be on a read-only disk: new features are then not kept."""

    folder: Path

    def log(self, *identity: str) -> FeatureRecords:
        try:
            return OptionalLog(FeatureCache(self.folder).log(*identity))
        except DataError as error:
            warn(f"{error} (features are not kept)")
            return MemoryRecords()


@dataclass
class OptionalLog:
    """A feature log that warns once if it cannot be read or written."""

    log: FeatureLog
    is_writable: bool = True

    def read(self, wanted: Set[bytes] | None = None) -> dict[bytes, F32]:
        mark_used(self.log.path)
        try:
            return self.log.read(wanted)
        except DataError as error:
            self.is_writable = False
            warn(f"{error} (features are not kept)")
            return {}

    def append(self, records: Mapping[bytes, F32]) -> None:
        if not self.is_writable:
            return
        try:
            self.log.append(records)
        except StorageError as error:
            self.is_writable = False
            warn(f"{error} (features are not kept)")


class FeatureStore(Protocol):
    """Stores features by identity."""

    def log(self, *identity: str) -> FeatureRecords:
        """Return the records of features identified by the given texts."""


class FeatureRecords(Protocol):
    """Features f32[e] by their 32-byte keys."""

    def read(self, wanted: Set[bytes] | None = None) -> dict[bytes, F32]: ...

    def append(self, records: Mapping[bytes, F32]) -> None: ...


class MemoryRecords:
    """Records in memory."""

    def __init__(self) -> None:
        self._records: dict[bytes, F32] = {}

    def read(self, wanted: Set[bytes] | None = None) -> dict[bytes, F32]:
        known = self._records
        return {key: row for key, row in known.items() if wanted is None or key in wanted}

    def append(self, records: Mapping[bytes, F32]) -> None:
        self._records.update(records)


class MemoryCache:
    """A FeatureStore in memory."""

    def __init__(self) -> None:
        self._logs: dict[bytes, MemoryRecords] = {}

    def log(self, *identity: str) -> MemoryRecords:
        return self._logs.setdefault(key_of(*identity), MemoryRecords())


MOST_BYTES = 512_000_000
"""Bytes of image features that the user's runs share; the last used logs are kept."""


def shared_cache() -> Path:
    """Return the folder of features that this user's runs share."""
    return user_cache("features")


def mark_used(path: Path) -> None:
    """Note that a log was used now, for `trim`."""
    with contextlib.suppress(OSError):  # read-only, or not there yet
        os.utime(path)


def trim(folder: Path, most_bytes: int) -> None:
    """Remove the logs of a folder that were not used for longest, down to `most_bytes`.

    Errors are ignored: another process may remove the same, and a folder may be read-only.
    """
    logs = []
    with contextlib.suppress(OSError):
        for path in folder.glob("*.features"):
            with contextlib.suppress(OSError):
                logs.append((path.stat(), path))
    total = sum(found.st_size for found, _ in logs)
    for found, path in sorted(logs, key=lambda log: log[0].st_mtime):
        if total <= most_bytes:
            return
        with contextlib.suppress(OSError):
            path.unlink()
            total -= found.st_size


def key_of(*parts: str) -> bytes:
    """Return a 32-byte hash of these texts in this order."""
    return hashlib.sha256(
        b"".join(hashlib.sha256(part.encode()).digest() for part in parts)
    ).digest()


def _record(key: bytes, values: F32) -> bytes:
    body = _HEAD.pack(_MARK, key, values.size) + np.ascontiguousarray(values, "<f4").tobytes()
    return body + _CRC.pack(zlib.crc32(body))


def _skipped(content: bytes, start: int, wanted: Set[bytes]) -> int | None:
    """Return where the record of another key at `start` ends, if there is a mark or the end."""
    if start + _HEAD.size > len(content):
        return None
    _, key, n_values = _HEAD.unpack_from(content, start)
    end: int = start + _HEAD.size + 4 * n_values + _CRC.size
    ends = end == len(content) or content.startswith(_MARK, end)
    return end if ends and key not in wanted else None


def _record_at(content: bytes, start: int) -> tuple[bytes, F32, int] | None:
    """Return key, values and end of the record that starts at `start`, or None if it is invalid."""
    first = start + _HEAD.size
    if first > len(content):
        return None
    _, key, n_values = _HEAD.unpack_from(content, start)
    last = first + 4 * n_values
    if not 0 < n_values <= _MOST_VALUES or last + _CRC.size > len(content):
        return None
    if zlib.crc32(memoryview(content)[start:last]) != _CRC.unpack_from(content, last)[0]:
        return None
    values = np.frombuffer(content, "<f4", n_values, first).astype(np.float32, copy=False)
    return (key, values, last + _CRC.size) if np.isfinite(values).all() else None
