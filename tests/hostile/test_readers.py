"""Damaged files of every kind that is read: an error in one line, or a value; nothing else."""

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from msgspec import structs

from runtimes.bundle import BundleFile, load_bundle
from runtimes.ort import parity_inputs
from runtimes.prompts import token_table
from runtimes.remote.contract import parse_offer
from runtimes.remote.settings import parse_settings
from runtimes.tokenizer import Tokenizer
from tests.conftest import DIGITS, MINI, ROOT
from tests.hostile.mutations import DAMAGES, EDITS, PLACE, VALUES, Edit, damage, edited, mutate
from tests.hostile.test_restore import failure
from tests.ztune.test_artifact import BORDER, CONTEXT, ENSEMBLE, HEAD, KERNEL, MIXTURE
from tests.ztune.test_data_named import parquet_file
from ztune.artifact import artifact_bytes, read_artifact
from ztune.budget import Budget
from ztune.cli.main import main
from ztune.data import parquet
from ztune.data.cache import FeatureLog
from ztune.data.coop import read_split
from ztune.data.manifests import read_class_list, read_manifest, read_names
from ztune.data.split import Split
from ztune.experiments.plan import read_plan
from ztune.experiments.store import Store
from ztune.io.files import read_json
from ztune.io.kinds import kind_of
from ztune.io.tensors import read_tensors, tensor_bytes
from ztune.journal import Journal
from ztune.run import RunFolder
from ztune.run_document import run_start

# The same inputs in every run; others with ZTUNE_FUZZ set.
fuzz = settings(max_examples=300, database=None, derandomize="ZTUNE_FUZZ" not in os.environ)
COOP = {role: [["a/1.jpg", 0, "cat"], ["b/2.jpg", 1, "dog"]] for role in ("train", "val", "test")}
BUNDLE = load_bundle(MINI)
NARROW = structs.replace(BUNDLE, text=replace(BUNDLE.text, width=2))


def read_table(path: Path) -> object:
    """Read a token table that has its manifest's digest."""
    content = path.read_bytes()
    entry = BundleFile(hashlib.sha256(content).hexdigest(), len(content))
    bundle = structs.replace(NARROW, path=path.parent, files={path.name: entry})
    return np.array(token_table(bundle))


def read_run(path: Path) -> object:
    folder = RunFolder(path.parent)
    return kind_of(path.parent), run_start(folder.read(), "x")


READERS: dict[str, Callable[[Path], object]] = {
    "run.json": read_run,
    "split.json": lambda path: Split.from_json(read_json(path, "x"), "x"),
    "history.jsonl": lambda path: RunFolder(path.parent).read_history(),
    "sent.jsonl": lambda path: Journal(path, Budget(9)),
    "log.features": lambda path: FeatureLog(path).read(),
    "bundle.json": lambda path: load_bundle(path.parent),
    "tokenizer.json": lambda path: Tokenizer.from_json(
        path.read_bytes().decode(errors="replace"), BUNDLE.text
    ),
    "token_table.npy": read_table,
    "parity.safetensors": lambda path: parity_inputs(path, "text"),
    "context.safetensors": read_artifact,
    "mixture.safetensors": read_artifact,
    "ensemble.safetensors": read_artifact,
    "head.safetensors": read_artifact,
    "kernel.safetensors": read_artifact,
    "border.safetensors": read_artifact,
    "plan.toml": read_plan,
    "manifest.csv": read_manifest,
    "manifest.jsonl": read_manifest,
    "names.tsv": read_names,
    "classes.txt": read_class_list,
    "coop.json": read_split,
    "results.sqlite": lambda path: Store.existing(path),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one valid file for each reader."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    for name in ("one", "two"):
        (folder.parent / "data" / name).mkdir(parents=True)
        for image in sorted((DIGITS / name).iterdir())[:3]:
            shutil.copy(image, folder.parent / "data" / name)
    data = folder.parent / "data"
    words = (
        "tune",
        MINI,
        "--data",
        data,
        "--shots",
        1,
        "--val",
        0,
        "--method",
        "zip",
        "--queries",
        20,
    )
    assert main([str(word) for word in (*words, "--quiet", "--out", folder)]) == 0
    (folder / "sent.jsonl").write_bytes(b"[0, 0, 10]\n[10, 1, 3]\n[null, 0, 2]\n")
    FeatureLog(folder / "log.features").append({bytes([n]) * 32: np.ones(4, "f4") for n in (1, 2)})
    for name in ("bundle.json", "tokenizer.json", "parity.safetensors"):
        shutil.copy(MINI / name, folder)
    np.save(folder / "token_table.npy", np.ones((900, 2), np.float32))
    for name, artifact in (
        ("context", CONTEXT), ("mixture", MIXTURE), ("ensemble", ENSEMBLE), ("head", HEAD),
        ("kernel", KERNEL), ("border", BORDER),
    ):  # fmt: skip
        (folder / f"{name}.safetensors").write_bytes(artifact_bytes(artifact))
    shutil.copy(ROOT / "plans" / "smoke.toml", folder / "plan.toml")
    for name in ("1.jpg", "2.jpg"):
        (folder / name).touch()
    (folder / "manifest.csv").write_text("path,label,split\n1.jpg,cat,train\n2.jpg,dog,test\n")
    rows = [{"path": "1.jpg", "label": "cat"}, {"path": "2.jpg", "label": "dog"}]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "names.tsv").write_text("n01\tcat\nn02\tdog\n")
    (folder / "classes.txt").write_text("cat\ndog\n")
    (folder / "coop.json").write_text(json.dumps(COOP))
    Store(folder / "results.sqlite")
    for name, read in READERS.items():
        read(folder / name)
    return folder


@functools.cache
def working(whole: Path) -> Path:
    """Return a copy in which files are damaged."""
    return Path(shutil.copytree(whole, whole.parent / "damaged"))


@functools.cache
def content_of(path: Path) -> bytes:
    return path.read_bytes()


def damaged(whole: Path, name: str, content: bytes) -> str | None:
    """Read a file with another content; return the message of the error, if any."""
    path = working(whole) / name
    path.write_bytes(content)
    try:
        return failure(lambda: READERS[name](path))
    finally:
        path.write_bytes(content_of(whole / name))


def files(ending: str = "") -> Iterator[str]:
    """Yield the files of an ending, all to be damaged by the same drawn input.

    To draw one takes longer than to read a file.
    """
    for name in READERS:
        if name.endswith(ending):
            note(name)
            yield name


@fuzz
@given(EDITS)
def test_other_bytes(whole: Path, edits: list[Edit]) -> None:
    for name in files():
        damaged(whole, name, edited(content_of(whole / name), edits))


@fuzz
@given(PLACE, VALUES)
def test_other_values(whole: Path, place: int, value: Any) -> None:
    for name in files(".json"):
        document = mutate(json.loads(content_of(whole / name)), place, value)
        damaged(whole, name, json.dumps(document).encode())


@fuzz
@given(st.sampled_from(sorted(DAMAGES)), PLACE, VALUES, st.booleans())
def test_other_tensors(whole: Path, kind: str, place: int, value: Any, of_document: bool) -> None:
    if kind == "half":  # safetensors reads it, and no file of ours has it
        return
    for name in files(".safetensors"):
        arrays, document = read_tensors(whole / name, "x")
        if of_document:
            document = mutate(document, place, value)
        else:
            arrays = damage(arrays, kind, place)
        said = damaged(whole, name, tensor_bytes(arrays, document))
        if not of_document and kind in ("NaN", "infinity", "another axis") and "parity" not in name:
            assert said is not None


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a parquet file with images."""
    path = tmp_path_factory.mktemp("packed") / "train.parquet"
    images = [image.read_bytes() for image in sorted((DIGITS / "one").iterdir())[:4]]
    parquet_file(path, [(content, n % 2) for n, content in enumerate(images)])
    return path


@fuzz
@given(EDITS)
def test_other_bytes_of_a_parquet_file(packed: Path, edits: list[Edit]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.parquet")
        path.write_bytes(edited(packed.read_bytes(), edits))
        failure(lambda: parquet.extract([path], Path(folder, "out")))


OFFER: Mapping[str, Any] = {
    "inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [-1, 3]}],
    "outputs": [{"name": "features", "datatype": "FP32", "shape": ["-1", 4]}],
}


@fuzz
@given(PLACE, VALUES)
def test_a_servers_metadata(place: int, value: Any) -> None:
    changed = mutate(OFFER, place, value)
    failure(lambda: parse_offer(changed, "x"))


@fuzz
@given(PLACE, VALUES)
def test_a_servers_settings(place: int, value: Any) -> None:
    changed = mutate({"deadline": 3.0, "images": "local", "give_up": 9, "loss": "client"},
                     place, value)  # fmt: skip
    failure(lambda: parse_settings(changed))
