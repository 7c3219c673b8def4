"""The client half of a served bundle: downloaded from the server once, or copied by hand."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from runtimes.bundle import MANIFEST, Bundle, load_bundle
from runtimes.remote.contract import CLIENT, Tensor
from runtimes.remote.service import ModelRequest, Service
from ztune.errors import ConfigError, FormatError, ServerError
from ztune.io.files import new_folder, user_cache

_N_FILES = 4
_SLICE = 4_000_000
_LARGEST_MANIFEST = 1_000_000
_LARGEST = 4_000_000_000
Progress = Callable[[int, int], None]


def load_client_half(service: Service, shipped: Path | None, progress: Progress) -> Bundle:
    """Return the client half of the served bundle with all files checked.

    `shipped` is its folder; None: download it from the server, or use the cached copy.

    Raises: ServerError when the server offers none or serves a different bundle than the folder's;
        FormatError for a damaged file.
    """
    if shipped is not None:
        bundle = load_bundle(shipped)
        if CLIENT in service.offers:
            _, digest = _fetch_sizes(service)
            if digest is not None and digest.hex() != bundle.digest:
                raise ServerError(
                    f"{service.location} serves bundle {digest.hex()[:12]}…, expected "
                    f'{bundle.digest[:12]}… of `client` "{shipped}"'
                )
    elif CLIENT not in service.offers:
        raise ServerError(
            f'{service.location} has no model "{service.model(CLIENT)}" to download '
            "tokenizer and manifest from (give a folder with them: `client=FOLDER`, made with "
            "ztune export --client)"
        )
    else:
        bundle = _fetch(service, progress)
    bundle.check_client_files()
    return bundle


def _fetch(service: Service, progress: Progress) -> Bundle:
    sizes, digest = _fetch_sizes(service)
    if digest is None:
        raise ServerError(
            f'{service.location}: model "{service.model(CLIENT)}" has no output "digest"'
        )
    folder = user_cache("clients") / digest.hex()
    if folder.exists():
        return _load_cached(folder, digest.hex())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as work:
            _download(work, service, sizes, digest, progress)
    except (OSError, ConfigError) as error:
        if (folder / MANIFEST).exists():  # another process was faster
            return _load_cached(folder, digest.hex())
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f'the client half cannot be cached in "{folder.parent}": {reason} (set '
            "XDG_CACHE_HOME to a writable folder)"
        ) from None
    return load_bundle(folder)


def _download(
    work: Path, service: Service, sizes: list[int], digest: bytes, progress: Progress
) -> None:
    """Download the files into a folder and check them."""
    total, start = sum(sizes), 0
    names: Sequence[str] = [MANIFEST]
    for number, size in enumerate(sizes):
        with (work / names[number]).open("wb") as file:
            for first in range(start, start + size, _SLICE):
                length = min(_SLICE, start + size - first)
                file.write(_fetch_slice(service, first, length))
                progress(first + length, total)
        start += size
        if number == 0:
            found = hashlib.sha256((work / MANIFEST).read_bytes()).digest()
            if found != digest:
                raise ServerError(
                    f"{service.location}: the downloaded manifest has SHA-256 {found.hex()[:12]}…, "
                    f"expected {digest.hex()[:12]}… (export the repository again)"
                )
            names = load_bundle(work).client_files
    load_bundle(work).check_client_files()


def _load_cached(folder: Path, digest: str) -> Bundle:
    """Return the cached client half.

    Raises: ServerError when it is damaged.
    """
    with contextlib.suppress(FormatError):
        bundle = load_bundle(folder)
        bundle.check_client_files()
        if bundle.digest == digest:
            return bundle
    raise ServerError(f'"{folder}" is damaged (remove it; the next command downloads it again)')


def _fetch_sizes(service: Service) -> tuple[list[int], bytes | None]:
    """Return the files' sizes in bytes and the digest of the served bundle."""
    wanted = {
        "sizes": Tensor("INT64", (_N_FILES,)),
        "bytes": Tensor("UINT8", (1,)),
    }
    has_digest = service.offers[CLIENT].reports_digest
    if has_digest:
        wanted["digest"] = Tensor("UINT8", (32,))
    answer = service.infer([ModelRequest(CLIENT, {"slice": np.array([0, 1])}, wanted)])[0]
    sizes = [int(size) for size in answer["sizes"]]
    if min(sizes) < 1 or sizes[0] > _LARGEST_MANIFEST or sum(sizes) > _LARGEST:
        raise ServerError(
            f"{service.location}: invalid sizes of the client half's files: {sizes} bytes"
        )
    return sizes, answer["digest"].tobytes() if has_digest else None


def _fetch_slice(service: Service, start: int, length: int) -> bytes:
    asked = {"slice": np.array([start, length], dtype=np.int64)}
    (answer,) = service.infer([ModelRequest(CLIENT, asked, {"bytes": Tensor("UINT8", (length,))})])
    return answer["bytes"].tobytes()
