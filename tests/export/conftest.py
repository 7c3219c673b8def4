"""Bundles that several files test: each is exported once per run."""

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch.onnx._internal.exporter import _registration

from export.bundle import export_bundle
from export.clip import load_clip
from export.loaded import LoadedClip
from export.shared import SharedWeights
from runtimes.bundle import Bundle, load_bundle
from runtimes.weights import WEIGHTS
from tests.conftest import Once
from tests.export.small_models import small_model, write_tiny

Exported = tuple[LoadedClip, Bundle]
# One of either kind of prompt graph has a first text layer that is not the last.
DEEP = ("ViT-B-32-quickgelu", "ViT-B-16-SigLIP")


@pytest.fixture(scope="session", autouse=True)
def _operators_once() -> Iterator[None]:
    """Let torch's exporter read its library of operators once, not for every graph (2 s)."""
    apis = _registration.onnxscript_apis
    with mock.patch.object(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops)):
        yield


@pytest.fixture(scope="session")
def small(once: Once, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Return a function that returns the small form of an architecture, and its bundle."""

    @functools.cache
    def get(name: str) -> Exported:
        folder = tmp_path_factory.mktemp("small")
        loaded = small_model(name, folder, text_layers=2 if name in DEEP else 1)
        return loaded, load_bundle(once(name, lambda out: export_bundle(loaded, out)))

    return get


@pytest.fixture(scope="session")
def tiny(once: Once, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return a ViT with one layer in either tower, and its bundle with image tokens."""
    loaded = load_clip(write_tiny(tmp_path_factory.mktemp("tiny")))
    out = once("tiny", lambda out: export_bundle(loaded, out, image_tokens=True))
    return loaded, load_bundle(out)


@pytest.fixture
def traced_before(tiny: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an export of the tiny model take its graphs from its bundle instead of tracing."""

    def copy(_module: Any, _inputs: Any, path: Path, weights: SharedWeights, **_: bool) -> None:
        shutil.copy(tiny[1].file(path.name), path)
        shutil.copy(tiny[1].path / WEIGHTS, weights.path)

    monkeypatch.setattr("export.bundle.export_onnx", copy)
