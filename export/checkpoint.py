"""Read the weights of a checkpoint file as they come, without running code from it."""

from __future__ import annotations

import pickletools
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from ztune.errors import ConfigError
from ztune.io.files import open_regular
from ztune.printing import first_few, one_line, reason_of

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "weights")
_EMA = re.compile(r"(^|[._])ema([._]|$)", re.IGNORECASE)
# Written into archives by tracing: no weights, or not the model's.
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
# The parts of a TorchScript archive that hold its tensors.
_TENSOR_PARTS = ("data.pkl", "byteorder", "version", ".data/version")
_LEAST_HEADER = 9  # bytes of a safetensors file: the header's length, and its brace
_FOREIGN = {
    b"\x89HDF": "an HDF5 file (Keras)",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip archive (unpack it)",
    b"7z": "a 7z archive (unpack it)",
    b"Rar!": "a RAR archive (unpack it)",
}
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a checkpoint, by their names in it."""

    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def read_checkpoint(path: Path, ema: bool = False) -> Checkpoint:
    """Return the weights in a file of torch, TorchScript or safetensors, found in any wrapper.

    `ema` takes the moving averages of the weights instead of the weights.

    Raises: ConfigError for a file that is none of these, is damaged, could run code, or has no
        (moving averages of) weights.
    """
    where = f'checkpoint "{path}"'
    kind = file_kind(path)
    if kind == "safetensors":
        found: Any = _read_safetensors(path, where)
    elif kind == "torchscript":
        found = _read_torchscript(path, where)
    else:
        found = _read_torch(path, where, mmap=kind == "torch")
    return _unwrap(found, ema, where)


def file_kind(path: Path) -> str:
    """Return torch, legacy, torchscript or safetensors by a file's first bytes.

    Raises: ConfigError for any other file, saying what it is.
    """
    where = f'checkpoint "{path}"'
    try:
        with open_regular(path) as file:
            start = file.read(512)
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror or error}") from None
    text = start.lstrip().lower()
    what = next((name for magic, name in _FOREIGN.items() if start.startswith(magic)), "")
    if not start:
        what = "an empty file (0 bytes): download or copy it again"
    elif start.startswith(b"version https://git-lfs"):
        what = "a Git LFS pointer, not the weights: run `git lfs pull`, or download the file"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        what = "a web page (HTML), not the weights: download the file itself"
    elif text.startswith(b"{"):
        what = "a JSON file, not the weights"
    if what:
        raise ConfigError(f"{where} is {what}")
    if start.startswith(b"PK\x03\x04"):
        return _zip_kind(path, where)
    if len(start) >= _LEAST_HEADER and start[8:9] == b"{":
        return "safetensors"
    if path.suffix == ".safetensors":
        raise ConfigError(
            f"{where} has no safetensors header (first bytes {start[:12]!r}): it is truncated, or "
            "another kind of file"
        )
    if start.startswith(b"\x80"):
        return "legacy"
    raise ConfigError(
        f"{where} is not a checkpoint of torch or safetensors (first bytes {start[:12]!r})"
    )


def _zip_kind(path: Path, where: str) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        raise ConfigError(
            f"{where} is a truncated archive (its table of contents is missing): download or copy "
            "it again"
        ) from None
    if not any(name.endswith("/data.pkl") for name in names):
        raise ConfigError(
            f"{where} is a zip archive without weights of torch (it has {first_few(names, 3)}): "
            "unpack it, or pass another file"
        )
    return "torchscript" if any(name.endswith("/constants.pkl") for name in names) else "torch"


def _read_safetensors(path: Path, where: str) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ConfigError(
            f"{where} is a damaged safetensors file ({reason_of(error)}): download or copy it again"
        ) from None
    return found


class _Unread:
    """Stands for a value of a training checkpoint other than a weight, which is not built."""

    def __new__(cls, *_: Any) -> _Unread:
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# What a training checkpoint may hold besides what torch itself allows: numpy's numbers and arrays,
# by their names in numpy 1 and 2, and parsed arguments.
_UNREAD = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core")
      for name in ("scalar", "_reconstruct")),
    "numpy.ndarray", "numpy.dtype", "argparse.Namespace",
)  # fmt: skip


def _read_torch(
    file: Path | IO[bytes], where: str, mmap: bool = False, also: tuple[Any, ...] = ()
) -> Any:
    try:
        unread = [(_Unread, name) for name in _UNREAD]
        with torch.serialization.safe_globals([*unread, *also]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises nearly anything on a damaged file
        if "Weights only load failed" not in str(error):
            raise ConfigError(
                f"{where} is damaged or truncated ({reason_of(error)}): download or copy it again"
            ) from None
        found = _GLOBAL.search(str(error))
        what = f'a "{found[1]}" object' if found else "objects"
        raise ConfigError(
            f"{where} cannot be loaded: it contains {what}, more than tensors, and could run code; "
            "save its state_dict as safetensors"
        ) from None


def _read_torchscript(path: Path, where: str) -> dict[str, Tensor]:
    """Return the tensors of a TorchScript archive.

    `torch.jit.load` compiles the archive's code and may run it. So torch reads a copy without
    code, in which the classes of modules are records of attributes.
    """

    class Module:
        def __setstate__(self, state: Any) -> None:
            if isinstance(state, dict):
                vars(self).update(state)

    def same(value: Any, *_: Any) -> Any:
        return value

    with zipfile.ZipFile(path) as archive, tempfile.TemporaryFile() as copy:
        try:
            with zipfile.ZipFile(copy, "w") as plain:
                for entry in archive.infolist():
                    inside = entry.filename.partition("/")[2]
                    if not (inside.startswith("data/") or inside in _TENSOR_PARTS):
                        continue
                    if entry.compress_type != zipfile.ZIP_STORED:
                        raise ValueError("its parts are compressed, which torch never does")
                    with archive.open(entry) as part, plain.open(entry.filename, "w") as kept:
                        shutil.copyfileobj(part, kept)
                    if inside == "data.pkl":
                        names = set(_global_names(archive.read(entry)))
        except Exception as error:  # zlib, zipfile and pickletools on damaged archives
            raise ConfigError(
                f"{where} is damaged ({reason_of(error)}): download it again"
            ) from None
        copy.seek(0)
        records = [(Module, name) for name in names if name.startswith("__torch__.")]
        lists = [(same, name) for name in names if name.startswith("torch.jit._pickle.")]
        root = _read_torch(copy, where, also=(*records, *lists))
    try:
        found = dict(_attributes(root, "", Module))
    except RecursionError:
        raise ConfigError(f"{where} is damaged (a module is part of itself)") from None
    return {name: found[name] for name in found if name.rpartition(".")[2] != "attn_mask"}


def _global_names(content: bytes) -> Iterator[str]:
    for operation, value, _ in pickletools.genops(content):
        if operation.name == "GLOBAL":
            yield str(value).replace(" ", ".")


def _attributes(owner: Any, prefix: str, module: type) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(owner).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, module):
            yield from _attributes(value, f"{prefix}{name}.", module)


def _unwrap(found: Any, ema: bool, where: str) -> Checkpoint:
    """Return the weights in a checkpoint's dictionaries."""
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where} holds one {type(found).__name__}, expected weights by name")
    averaged, plain = _find_averages(found), _find_weights(found)
    if ema:
        if not averaged:
            raise ConfigError(
                f"{where} has no EMA weights (it has {_shown(found)}): leave out `ema`"
            )
        return Checkpoint(averaged)
    if not plain:
        raise ConfigError(
            f"{where} has only EMA weights: pass `ema` to take them"
            if averaged
            else f"{where} has no weights (it has {_shown(found)})"
        )
    note = "the checkpoint has EMA weights too: its plain weights are taken (`ema` takes them)"
    return Checkpoint(plain, (note,) if averaged else ())


def _shown(found: Mapping[Any, Any]) -> str:
    return one_line(first_few([str(key) for key in found])) or "nothing"


def _tensors(found: Mapping[Any, Any], averages: bool) -> dict[str, Tensor]:
    return {
        name: value.detach()
        for name, value in found.items()
        if isinstance(name, str)
        and isinstance(value, Tensor)
        and name not in _NOT_WEIGHTS
        and bool(_EMA.search(name)) == averages
    }


def _find_weights(found: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the tensors of the first wrapper that has some, else of the dictionary itself."""
    for key in _WRAPPERS:
        if isinstance(inner := found.get(key), Mapping) and (weights := _find_weights(inner)):
            return weights
    return _tensors(found, averages=False)


def _find_averages(found: Mapping[Any, Any]) -> dict[str, Tensor]:
    for key, inner in found.items():
        if not (isinstance(key, str) and _EMA.search(key) and isinstance(inner, Mapping)):
            continue
        if weights := {**_find_weights(inner), **_tensors(inner, averages=True)}:
            return weights
    for key in _WRAPPERS:
        if isinstance(inner := found.get(key), Mapping) and (weights := _find_averages(inner)):
            return weights
    return _tensors(found, averages=True)
