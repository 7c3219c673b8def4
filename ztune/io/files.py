"""Atomic writes, reads of regular files only, and names confined to a folder."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ztune.errors import ConfigError, FormatError
from ztune.io.schema import decoded
from ztune.types import Json

_LONGEST_NAME = 255  # bytes, on most file systems


@contextlib.contextmanager
def naming(path: Path, others: Path | None = None) -> Iterator[None]:
    """Add `path` to OS errors that name no file, or the file `others`."""
    try:
        yield
    except OSError as error:
        if error.filename is None or (others and str(error.filename) == str(others)):
            error.filename = str(path)
        raise


def temporary_name(name: str) -> str:
    """Return the start of names of temporary files that become `name`; 8 characters follow."""
    return f".{name}.ztune-"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success flush it and rename it to `path`.

    A reader of `path` sees the old or the complete new file, even after a kill or power loss.

    Raises: OSError naming `path`.
    """

    def make() -> str:
        handle, name = tempfile.mkstemp(prefix=temporary_name(path.name), dir=path.parent)
        os.close(handle)
        return name

    with contextlib.ExitStack() as stack:
        try:
            temporary = stack.enter_context(_owned(make))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        with naming(path, temporary):
            yield temporary
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            # mkstemp makes files private to the user; the result follows the umask.
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
            flush_folder(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` on success, all or nothing.

    Raises: ConfigError if `path` exists and is not an empty folder, cannot be created, or is
        created by another process in between.
    """
    check_new(path)
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            work = stack.enter_context(temporary_folder(temporary_name(path.name), path.parent))
        except OSError as error:
            raise ConfigError(f'output "{path}" cannot be written ({error.strerror})') from None
        yield work
        work.chmod(0o777 & ~_umask())
        _move_to(work, path)
        flush_folder(path.parent)


def check_new(path: Path) -> None:
    """Refuse a path for a new folder that exists and is not an empty folder.

    Raises: ConfigError.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(
            f'output "{path}" exists and is not empty (remove it, or name another `out`)'
        )


@contextlib.contextmanager
def temporary_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder, which `remove_leftovers` finds after a kill.

    Raises: OSError.
    """
    with _owned(lambda: tempfile.mkdtemp(prefix=prefix, dir=parent)) as folder:
        yield folder


@contextlib.contextmanager
def _owned(make: Callable[[], str]) -> Iterator[Path]:
    """Yield a new temporary file or folder, locked against `remove_leftovers`; remove it."""
    path = Path(make())
    while (lock := _lock(path, wait=True)) is None:  # removed before it was locked
        path = Path(make())
    try:
        yield path
    finally:
        _remove(path)
        os.close(lock)


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Remove temporary files and folders of killed processes; what is in use or cannot be, stays.

    On Windows all stay: an open file cannot be renamed there, so none is locked.
    """
    for path in paths:
        if os.name == "posix" and (lock := _lock(path, wait=False)) is not None:
            with contextlib.suppress(OSError):
                _remove(path)
            os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lock(path: Path, *, wait: bool) -> int | None:
    """Return the handle of a temporary file's lock, which ends with this process.

    None if the file is gone, or if it is locked and this process does not `wait`.
    """
    if sys.platform == "win32":
        return os.open(os.devnull, os.O_RDONLY)
    import fcntl

    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError:
        if wait:
            raise
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if not wait:
            os.close(handle)
            return None
        # A file system without locks: a leftover would stay.
    if wait and not path.exists():
        os.close(handle)
        return None
    return handle


def _move_to(work: Path, path: Path) -> None:
    """Rename a folder to `path`, which is missing or an empty folder.

    Raises: ConfigError if another process has created it.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()
        work.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise ConfigError(
            f'output "{path}" was just created by another process (try again, or name another '
            "`out`)"
        ) from None


def flush_folder(folder: Path) -> None:
    """Flush a folder, so that a rename survives power loss, if the system supports it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def user_cache(name: str) -> Path:
    """Return this user's cache folder of that name, in XDG_CACHE_HOME if it is absolute.

    If the home folder is missing or cannot be written, it is in a private temporary folder.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given / "ztune" / name
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home folder is known
        cache = Path.home() / ".cache" / "ztune"
        if cache.is_absolute() and os.environ.get("HOME") != "":  # "" would be the root
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(cache, os.W_OK | os.X_OK):
                return cache / name
    return _private_folder() / name


def _private_folder() -> Path:
    """Return this user's folder for temporary files, which no other user can write."""
    if not hasattr(os, "getuid"):
        return Path(tempfile.gettempdir()) / "ztune"
    folder = Path(tempfile.gettempdir()) / f"ztune-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return folder
    return _new_private_folder()


@functools.cache
def _new_private_folder() -> Path:
    """Return a new folder, one for each process."""
    return Path(tempfile.mkdtemp(prefix="ztune-"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Json) -> None:
    """Write `value` as indented JSON with a final newline, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file, or a link to one, to read its bytes.

    An untrusted name may be a pipe, which blocks, or an endless device.

    Raises: OSError for another kind of file.
    """
    # Checked after opening, so that it cannot be replaced in between.
    file = io.FileIO(path, opener=_without_waiting)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return io.BufferedReader(file)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_bytes(path: Path, *, pipe: bool = False) -> bytes:
    """Return the content of a regular file, or of any file with `pipe`.

    Raises: OSError.
    """
    with path.open("rb") if pipe else open_regular(path) as file:
        return file.read()


def read_json(path: Path, what: str, *, pipe: bool = False) -> dict[str, Json]:
    """Read a JSON object; `pipe` as for `read_bytes`.

    Raises: FormatError naming `what` if the file is missing, or as `decoded`.
    """
    try:
        content = read_bytes(path, pipe=pipe)
    except FileNotFoundError:
        raise FormatError(f"{what}: {path} does not exist") from None
    except OSError as error:
        raise FormatError(f"{what}: {path} cannot be read ({error})") from None
    return decoded(content, f"{what}: {path}")


def inside(folder: Path, name: str, where: str) -> Path:
    """Return the path of an untrusted `name` in `folder`.

    Raises: FormatError naming `where` for a name that is not plain on every system, or a link that
        leaves the folder.
    """
    if not is_plain_name(name):
        raise FormatError(
            f"{where}: invalid file name {name[:80]!r}, expected no slash or backslash, at "
            f"most {_LONGEST_NAME} bytes"
        )
    if not resolves_inside(folder.resolve(), name):
        raise FormatError(f'{where}: "{folder / name}" is a link that leaves its folder')
    return folder / name


def is_plain_name(name: str) -> bool:
    """Return whether a text is a file name without a path."""
    forbidden = "/\\\0:" if os.name == "nt" else "/\\\0"
    try:
        n_bytes = len(name.encode())
    except UnicodeEncodeError:  # an unpaired surrogate
        return False
    return 0 < n_bytes <= _LONGEST_NAME and name not in (".", "..") and not {*forbidden} & {*name}


def resolves_inside(root: Path, path: str) -> bool:
    """Return whether a path, with links resolved, is inside `root`, which is resolved."""
    try:
        return (root / path).resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # links in a circle
        return False


def sha256(path: Path) -> str:
    """Return the SHA-256 of a regular file's content in hexadecimal.

    Raises: OSError.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
