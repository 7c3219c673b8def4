"""Export the client half of a bundle: the files that a server's client needs, without graphs."""

from __future__ import annotations

import shutil
from pathlib import Path

from runtimes.bundle import CLIENT_FILES, MANIFEST, Bundle, load_bundle
from ztune.io.files import new_folder


def export_client(bundle: Bundle, out: Path) -> Bundle:
    """Write the client half of a bundle, with the same digest, to the new folder `out`.

    Raises: ConfigError when `out` is not empty, FormatError for a corrupted file.
    """
    with new_folder(out) as work:
        for name in CLIENT_FILES:
            path = bundle.path / MANIFEST if name == MANIFEST else bundle.file(name)
            shutil.copyfile(path, work / name)
    return load_bundle(out)
