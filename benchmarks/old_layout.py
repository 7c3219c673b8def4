"""Write a bundle in format version 1, where each graph has its own weights: for comparisons."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from export.weights import read_graph, write_graph
from runtimes.bundle import MANIFEST, Bundle, list_files, load_bundle
from runtimes.prompts import token_table
from runtimes.weights import WEIGHTS
from ztune.io.files import new_folder, write_json
from ztune.io.schema import plain

_NEW = ("token_table", "weight_blocks", "store", "rounding")


def write_version_1(bundle: Bundle, out: Path, threshold: int = 0) -> Bundle:
    """Write the same graphs, tokenizer and token table to the new folder `out`.

    `threshold` is that of `write_graph`.
    """
    with new_folder(out) as work:
        for name in bundle.files:
            if name.endswith(".onnx"):
                write_graph(read_graph(bundle.file(name)), work / name, threshold)
            elif name != WEIGHTS:
                shutil.copyfile(bundle.file(name), work / name)
        np.save(work / "token_table.npy", np.asarray(token_table(bundle), np.float32))
        kept = {key: value for key, value in bundle.manifest.items() if key not in _NEW}
        write_json(work / MANIFEST, {**kept, "version": 1, "files": plain(list_files(work))})
    return load_bundle(out)
