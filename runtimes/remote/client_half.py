"""The light half of a served bundle: fetched from the server once, or shipped by hand."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from runtimes.bundle import CLIENT_FILES, MANIFEST, Bundle, load_bundle
from runtimes.remote.contract import CLIENT, Tensor
from runtimes.remote.service import Question, Service
from ztune.errors import ConfigError, FormatError, ServerError
from ztune.io.files import new_folder, user_cache

_SLICE = 4_000_000
_LARGEST_MANIFEST = 1_000_000
_LARGEST = 4_000_000_000
Progress = Callable[[int, int], None]


def client_half(service: Service, shipped: Path | None, progress: Progress) -> Bundle:
    """Return the client half of the served bundle, all its files checked.

    `shipped` is a folder with it; None: what the server has of it, from the cache where it was
    fetched before.

    Raises: ServerError when the server offers none, or serves another bundle than the folder's;
        FormatError for a damaged file.
    """
    if shipped is not None:
        bundle = load_bundle(shipped)
        if CLIENT in service.offers:
            _, digest = _sizes(service)
            if digest is not None and digest.hex() != bundle.digest:
                raise ServerError(
                    f'{service.location} serves another bundle than `client` "{shipped}" '
                    f"({digest.hex()[:12]}…, not {bundle.digest[:12]}…)"
                )
    elif CLIENT not in service.offers:
        raise ServerError(
            f'{service.location} has no model "{service.model(CLIENT)}" to fetch tokenizer and '
            "manifest from (name a folder with them: `client=FOLDER`, made with ztune export "
            "--client)"
        )
    else:
        bundle = _fetched(service, progress)
    for name in CLIENT_FILES[1:]:
        bundle.file(name)
    return bundle


def _fetched(service: Service, progress: Progress) -> Bundle:
    sizes, digest = _sizes(service)
    if digest is None:
        raise ServerError(f'{service.location}: model "{service.model(CLIENT)}" tells no digest')
    folder = user_cache("clients") / digest.hex()
    if folder.exists():
        return _kept(folder, digest.hex())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as work:
            _fill(work, service, sizes, digest, progress)
    except (OSError, ConfigError) as error:
        if (folder / MANIFEST).exists():  # another process was faster
            return _kept(folder, digest.hex())
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f'"{folder.parent}" cannot keep the client half ({reason}; set XDG_CACHE_HOME to a '
            "folder that can be written)"
        ) from None
    return load_bundle(folder)


def _fill(
    work: Path, service: Service, sizes: list[int], digest: bytes, progress: Progress
) -> None:
    """Fetch the half's files into a folder and check them."""
    total, start = sum(sizes), 0
    for name, size in zip(CLIENT_FILES, sizes, strict=True):
        with (work / name).open("wb") as file:
            for first in range(start, start + size, _SLICE):
                length = min(_SLICE, start + size - first)
                file.write(_slice(service, first, length))
                progress(first + length, total)
        start += size
        if name == MANIFEST:
            found = hashlib.sha256((work / name).read_bytes()).digest()
            if found != digest:
                raise ServerError(f"{service.location}: the manifest's SHA-256 is another")
    bundle = load_bundle(work)
    for name in CLIENT_FILES[1:]:
        bundle.file(name)


def _kept(folder: Path, digest: str) -> Bundle:
    """Return the half that was fetched before.

    Raises: ServerError when it is no longer whole.
    """
    with contextlib.suppress(FormatError):
        bundle = load_bundle(folder)
        for name in CLIENT_FILES[1:]:
            bundle.file(name)
        if bundle.digest == digest:
            return bundle
    raise ServerError(f'"{folder}" is damaged (remove it, and it is fetched again)')


def _sizes(service: Service) -> tuple[list[int], bytes | None]:
    """Return the files' sizes in bytes, and the digest of the bundle that is served."""
    wanted = {
        "sizes": Tensor("INT64", (len(CLIENT_FILES),)),
        "bytes": Tensor("UINT8", (1,)),
    }
    tells = service.offers[CLIENT].tells_digest
    if tells:
        wanted["digest"] = Tensor("UINT8", (32,))
    answer = service.ask([Question(CLIENT, {"slice": np.array([0, 1])}, wanted)])[0]
    sizes = [int(size) for size in answer["sizes"]]
    if min(sizes) < 1 or sizes[0] > _LARGEST_MANIFEST or sum(sizes) > _LARGEST:
        raise ServerError(f"{service.location}: a client half of {sizes} bytes")
    return sizes, answer["digest"].tobytes() if tells else None


def _slice(service: Service, start: int, length: int) -> bytes:
    asked = {"slice": np.array([start, length], dtype=np.int64)}
    (answer,) = service.ask([Question(CLIENT, asked, {"bytes": Tensor("UINT8", (length,))})])
    return answer["bytes"].tobytes()
