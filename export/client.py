"""The light half of a bundle: all that a client of a server needs of it, without the graphs."""

from __future__ import annotations

import shutil
from pathlib import Path

from runtimes.bundle import CLIENT_FILES, MANIFEST, Bundle, load_bundle
from ztune.io.files import new_folder


def export_client(bundle: Bundle, out: Path) -> Bundle:
    """Write the client half of a bundle to the new folder `out`; its digest is the bundle's.

    Raises: ConfigError for an `out` that holds something, FormatError for a damaged file.
    """
    with new_folder(out) as work:
        for name in CLIENT_FILES:
            path = bundle.path / MANIFEST if name == MANIFEST else bundle.file(name)
            shutil.copyfile(path, work / name)
    return load_bundle(out)
