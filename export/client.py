"""Export the client half of a bundle: the files that a server's client needs, without graphs."""

from __future__ import annotations

from pathlib import Path

from runtimes.bundle import MANIFEST, Bundle, load_bundle
from runtimes.weights import TABLE
from ztune.io.files import new_folder, read_bytes


def export_client(bundle: Bundle, out: Path) -> Bundle:
    """Write the client half of a bundle, with the same digest, to the new folder `out`.

    Raises: ConfigError when `out` is not empty, FormatError for a corrupted file.
    """
    with new_folder(out) as work:
        for name in bundle.client_files:
            (work / name).write_bytes(read_client_file(bundle, name))
        load_bundle(work).check_client_files()
    return load_bundle(out)


def read_client_file(bundle: Bundle, name: str) -> bytes:
    """Return the content of one file of the client half.

    Raises: FormatError for a corrupted file.
    """
    if name == TABLE and (table := bundle.map_table()) is not None:
        return table.tobytes()
    return read_bytes(bundle.path / MANIFEST if name == MANIFEST else bundle.file(name))
