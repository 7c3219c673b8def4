"""Bundles whose files have the digests of their manifest and contents that no export writes."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from runtimes.bundle import BundleFile, load_bundle
from runtimes.ort import row_parity
from tests.conftest import FEW_DIGITS, MINI, Command
from ztune.errors import FormatError
from ztune.io.files import sha256
from ztune.io.schema import plain
from ztune.io.tensors import read_tensors, write_tensors

pytestmark = pytest.mark.usefixtures("quick_figures")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MINI, tmp_path / "bundle"))


def forge(bundle: Path, name: str) -> None:
    """Give the manifest the digest of a replaced file."""
    path = bundle / "bundle.json"
    document = json.loads(path.read_text())
    file = bundle / name
    document["files"][name] = plain(BundleFile(sha256(file), file.stat().st_size))
    path.write_text(json.dumps(document))


def shorten(bundle: Path, n_rows: int) -> None:
    file = io.BytesIO()
    np.save(file, np.load(bundle / "token_table.npy")[:n_rows])
    (bundle / "token_table.npy").write_bytes(file.getvalue())
    forge(bundle, "token_table.npy")


@pytest.mark.parametrize("n_rows", [0, 1, 300, -1])
@pytest.mark.parametrize("method", ["ogn", "zip", "gda"])
def test_a_token_table_that_is_too_short(
    n_rows: int, method: str, bundle: Path, ztune: Command, tmp_path: Path
) -> None:
    shorten(bundle, n_rows)
    words = ("--data", FEW_DIGITS, "--shots", 1, "--method", method, "--queries", 20)
    done = ztune("tune", bundle, *words, "--out", tmp_path / "run", "--quiet")
    assert done.code == 1
    assert done.err.startswith("error: the token table has ")
    assert done.err.count("\n") == 1


Changes = Callable[[dict[str, Any]], None]
PARITY: dict[str, tuple[str, Changes]] = {
    "no pixels": ("image", lambda a: a.pop("image.pixels")),
    "no tokens": ("text", lambda a: a.pop("text.tokens")),
    "no contexts": ("prompt", lambda a: a.pop("prompt.contexts")),
    "no images": ("image", lambda a: a.update({"image.pixels": a["image.pixels"][:0]})),
    "narrow features": (
        "image",
        lambda a: a.update({"image.features": a["image.features"][:, :-1].copy()}),
    ),
    "flat features": ("text", lambda a: a.update({"text.features": a["text.features"].ravel()})),
    "wide features": (
        "prompt",
        lambda a: a.update({"prompt.features": np.repeat(a["prompt.features"], 2, -1)}),
    ),
    "fewer features": ("text", lambda a: a.update({"text.features": a["text.features"][:1]})),
    "small pixels": (
        "image",
        lambda a: a.update({"image.pixels": a["image.pixels"][..., :-1].copy()}),
    ),
    "integer features": (
        "image",
        lambda a: a.update({"image.features": a["image.features"].astype(np.int64)}),
    ),
}


@pytest.mark.parametrize("name", PARITY)
def test_a_parity_file_with_other_shapes(name: str, bundle: Path, ztune: Command) -> None:
    graph, change = PARITY[name]
    path = bundle / "parity.safetensors"
    arrays, document = read_tensors(path, "x")
    change(arrays)
    write_tensors(path, arrays, document)
    forge(bundle, path.name)
    done = ztune("doctor", bundle, "--json")
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    if graph != "prompt":  # and a server's client compares row by row
        with pytest.raises(FormatError, match=r"parity"):
            row_parity(load_bundle(bundle), graph)


def damaged(kind: str, content: bytes) -> bytes:
    if kind == "cut":
        return content[: len(content) // 2]
    if kind == "noise":
        return bytes(range(256)) + content[256:]
    model = onnx.load_from_string(content)
    graph = model.graph
    if kind == "no outputs":
        del graph.output[:]
    elif kind == "no inputs":
        del graph.input[:]
    elif kind == "other names":
        graph.output[0].name = graph.node[-1].output[0] = "other"
    elif kind == "unknown operator":
        graph.node[0].op_type = "Conw"
    elif kind == "short weights":
        largest = max(graph.initializer, key=lambda weight: len(weight.raw_data))
        largest.raw_data = largest.raw_data[:-4]
    elif kind == "no weights":
        del graph.initializer[:]
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "kind",
    ["cut", "noise", "no outputs", "no inputs", "other names", "unknown operator",
     "short weights", "no weights"],
)  # fmt: skip
def test_a_damaged_image_graph_is_not_packed(
    kind: str, bundle: Path, ztune: Command, tmp_path: Path
) -> None:
    path, out = bundle / "image.onnx", tmp_path / "classifier.onnx"
    words = ("--data", FEW_DIGITS, "--shots", 1, "--method", "gda", "--quiet")
    assert ztune("tune", bundle, *words, "--out", tmp_path / "run").code == 0
    path.write_bytes(damaged(kind, path.read_bytes()))
    forge(bundle, path.name)
    done = ztune("pack", bundle, "--prompt", tmp_path / "run", "--out", out, "--quiet")
    assert done.code == 1, done
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert not out.exists()
