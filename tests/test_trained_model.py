"""On a small trained CLIP and real photographs, where they are at hand (ZTUNE_BENCH_DATA)."""

import statistics
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


@pytest.mark.parametrize(
    ("method", "name", "gain"),
    [
        ("zip", "pacs-sketch", 0.05),
        ("zip", "cifar10-negative", 0.02),
        ("ogn", "pacs-sketch", 0.2),
        ("ogn", "cifar10-negative", 0.05),
    ],
)
def test_prompts_gain_on_domains_the_model_never_saw(
    method: str,
    name: str,
    gain: float,
    bundle: Path,
    bench_data: Path,
    ztune: Command,
    tmp_path: Path,
) -> None:
    def tune(seed: int, out: Path, *more: object) -> None:
        where = ("--data", bench_data / name, "--cache", tmp_path / "cache", "--out", out)
        done = ztune("tune", bundle, *where, "--method", method, "--seed", seed, *more)
        assert done.code == 0, done.err

    gains = []
    for seed in (1, 2, 3):
        out = tmp_path / f"run-{seed}"
        tune(seed, out)
        measured = ztune("eval", out, "--json").json
        gains.append(measured["accuracy"] - measured["zero_shot_accuracy"])
    assert statistics.mean(gains) >= gain, gains

    outs = [tmp_path / name for name in ("first", "again")]
    for out in outs:
        tune(1, out, "--queries", 200)
    first, again = ((out / "prompt.safetensors").read_bytes() for out in outs)
    assert first == again
