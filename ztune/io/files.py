"""Files written whole or not at all, read where they are files, and names that stay inside."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ztune.errors import ConfigError, FormatError
from ztune.io.schema import decoded
from ztune.types import Json

_LONGEST_NAME = 255  # bytes, of most file systems


@contextlib.contextmanager
def naming(path: Path, others: Path | None = None) -> Iterator[None]:
    """Have the system's errors name `path`: those of a write name no file, or the one `others`."""
    try:
        yield
    except OSError as error:
        if error.filename is None or (others and str(error.filename) == str(others)):
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success flush it and rename it to `path`.

    Whoever reads `path` sees the old file or the whole new one, also after a kill or a power cut.

    Raises: OSError naming `path`.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    temporary = Path(name)
    try:
        with naming(path, temporary):
            os.close(handle)
            yield temporary
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            # mkstemp makes files private to the user; what we leave behind follows the umask.
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
            flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` on success, all or nothing.

    Raises: ConfigError when `path` exists and is not an empty folder, cannot be made, or is made by
        another process meanwhile.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(
            f'output "{path}" exists and is not empty (remove it, or name another `out`)'
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ConfigError(f'output "{path}" cannot be written ({error.strerror})') from None
    try:
        yield work
        work.chmod(0o777 & ~_umask())
        _move_to(work, path)
        flush_folder(path.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _move_to(work: Path, path: Path) -> None:
    """Rename a folder to `path`, where there is nothing or an empty folder.

    Raises: ConfigError when another process has put something there.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()
        work.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise ConfigError(
            f'output "{path}" has just been made by another process (try again, or name another '
            "`out`)"
        ) from None


def flush_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system lets a folder be flushed."""
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
    """Return this user's cache folder of that name, below XDG_CACHE_HOME where it is absolute."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "ztune" / name


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

    What a file or a folder names may be a pipe, which is waited for, or a device without an end.

    Raises: OSError when it is neither.
    """
    # Looked at once it is open, so that nothing else can take its place in between.
    file = io.FileIO(path, opener=_without_waiting)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return io.BufferedReader(file)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_bytes(path: Path, *, pipe: bool = False) -> bytes:
    """Return the content of a regular file, or, with `pipe`, of whatever a person has named.

    Raises: OSError.
    """
    with path.open("rb") if pipe else open_regular(path) as file:
        return file.read()


def read_json(path: Path, what: str, *, pipe: bool = False) -> dict[str, Json]:
    """Read a JSON object; `pipe` as for `read_bytes`.

    Raises: FormatError naming `what` when the file is absent, or as `decoded`.
    """
    try:
        content = read_bytes(path, pipe=pipe)
    except FileNotFoundError:
        raise FormatError(f"{what}: {path} does not exist") from None
    except OSError as error:
        raise FormatError(f"{what}: {path} cannot be read ({error})") from None
    return decoded(content, f"{what}: {path}")


def inside(folder: Path, name: str, where: str) -> Path:
    """Return the path of `name` in `folder`: a name that a file gives leads nowhere else.

    Raises: FormatError naming `where` for what is no plain name, on any system, or is a link that
        leaves the folder.
    """
    if not is_plain_name(name):
        raise FormatError(
            f"{where}: {name[:80]!r} names no file, expected a name without slash or backslash, at "
            f"most {_LONGEST_NAME} bytes long"
        )
    if not resolves_inside(folder.resolve(), name):
        raise FormatError(f'{where}: "{folder / name}" is a link that leaves its folder')
    return folder / name


def is_plain_name(name: str) -> bool:
    """Tell whether a text can name a file of a folder, and nothing outside of it."""
    forbidden = "/\\\0:" if os.name == "nt" else "/\\\0"
    try:
        n_bytes = len(name.encode())
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return 0 < n_bytes <= _LONGEST_NAME and name not in (".", "..") and not {*forbidden} & {*name}


def resolves_inside(root: Path, path: str) -> bool:
    """Tell whether a path, links followed, stays below `root`, which is resolved already."""
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
