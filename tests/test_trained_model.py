"""On a small trained CLIP and real photographs, where they are at hand (ZTUNE_BENCH_DATA)."""

import statistics
from pathlib import Path
from typing import Any

import pytest

import ztune


@pytest.mark.parametrize(
    ("method", "queries", "name", "gain"),
    [
        ("zip", 1000, "pacs-sketch", 0.05),
        ("ogn", 200, "cifar10-negative", 0.05),
    ],
)
def test_prompts_gain_on_domains_the_model_never_saw(
    method: str,
    queries: int,
    name: str,
    gain: float,
    trained: Path,
    bench_data: Path,
    tmp_path: Path,
) -> None:
    data = ztune.Dataset.from_folder(bench_data / name)
    with ztune.load(trained, provider="cpu", threads=1) as model:

        def fit(seed: int, shots: int = 16, **settings: Any) -> ztune.FewShotClassifier:
            train, _ = data.split(shots=shots, seed=seed)
            return ztune.FewShotClassifier(model, seed=seed, **settings).fit(train)

        _, test = data.split(shots=16, seed=1)
        X = model.encode_images([path for path, _ in test.items])
        y = [test.classes[label] for label in test.labels]
        zero_shot = fit(1, method="zero-shot").score(X, y)
        tuned = [fit(seed, method=method, queries=queries).score(X, y) for seed in (1, 2, 3)]
        assert statistics.mean(tuned) - zero_shot >= gain, (zero_shot, tuned)

        files = [tmp_path / name for name in ("first", "again")]
        for file in files:
            fit(1, shots=2, method=method, queries=200).save(file)
    first, again = (file.read_bytes() for file in files)
    assert first == again
