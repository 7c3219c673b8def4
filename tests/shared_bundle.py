"""The embedded bundle, whose graphs have their own weights, with all of them in one file."""

import shutil
from pathlib import Path

from export.shared import SharedWeights
from export.weights import read_graph
from runtimes.bundle import MANIFEST, VERSION, Bundle, list_files, load_bundle
from runtimes.prompts import token_table
from runtimes.weights import WEIGHTS
from ztune.io.files import new_folder, write_json
from ztune.io.schema import plain


def share_weights(bundle: Bundle, out: Path) -> Bundle:
    """Write a bundle of version 1 in the current version, with the same graphs."""
    with new_folder(out) as work:
        weights = SharedWeights(work / WEIGHTS)
        for name in bundle.files:
            if name.endswith(".onnx"):
                model = read_graph(bundle.file(name))
                weights.move(model)
                (work / name).write_bytes(model.SerializeToString())
            elif name != "token_table.npy":
                shutil.copyfile(bundle.file(name), work / name)
        stored = weights.finish(token_table(bundle))
        described = {**stored, "version": VERSION, "files": plain(list_files(work))}
        write_json(work / MANIFEST, {**bundle.manifest, **described})
    return load_bundle(out)
