"""On a small trained CLIP and real photographs, where they are at hand (ZTUNE_BENCH_DATA)."""

from pathlib import Path

import pytest

from tests.conftest import Command


@pytest.fixture(scope="module")
def bundle(bench_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from export.bundle import export_bundle
    from export.clip import load_clip

    out = tmp_path_factory.mktemp("bundles") / "bench"
    loaded = load_clip(f"local-dir:{bench_data / 'bench-clip'}")
    return export_bundle(loaded, out).path


@pytest.mark.parametrize(("name", "gain"), [("pacs-sketch", 0.05), ("cifar10-negative", 0.02)])
def test_zip_gains_on_domains_the_model_never_saw(
    name: str, gain: float, bundle: Path, bench_data: Path, ztune: Command, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = ztune("tune", bundle, "--data", bench_data / name, "--seed", 1, "--out", out, "--json")
    assert done.code == 0, done.err
    measured = ztune("eval", out, "--json").json
    assert measured["accuracy"] >= measured["zero_shot_accuracy"] + gain
