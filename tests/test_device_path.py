"""The path of a run on a device, with the CPU standing in for it: captures and device scores."""

import json
from pathlib import Path

import numpy as np
import pytest

from runtimes import binding, providers
from tests.conftest import DIGITS, MINI, Command
from ztune.artifact import ContextArtifact, read_artifact

CPU = providers.NAMES["cpu"]


@pytest.fixture
def _cuda_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(providers.NAMES, "cuda", CPU)
    monkeypatch.setitem(providers._OPTIONS, "cuda", {})
    monkeypatch.setitem(binding.DEVICES, "cuda", "cpu")


def tuned(ztune: Command, out: Path, *more: object) -> dict[str, object]:
    words = ("--data", DIGITS, "--shots", 4, "--method", "zip", "--queries", 200)
    done = ztune("tune", MINI, *words, "--out", out, "--json", *more)
    assert done.code == 0, done.err
    return done.json


@pytest.mark.usefixtures("_cuda_is_the_cpu")
def test_a_run_on_a_device_comes_to_the_same_losses(ztune: Command, tmp_path: Path) -> None:
    on_cpu = tuned(ztune, tmp_path / "cpu", "--provider", "cpu")
    on_device = tuned(ztune, tmp_path / "cuda", "--provider", "cuda")
    assert on_cpu["cuda_graph"] is None
    assert on_device["cuda_graph"] == "captured"
    assert on_device["train_loss"] == pytest.approx(on_cpu["train_loss"], abs=1e-4)
    histories = [
        [json.loads(line) for line in (tmp_path / run / "history.jsonl").read_text().splitlines()]
        for run in ("cpu", "cuda")
    ]
    assert len(histories[0]) == len(histories[1]) == 20
    for one, other in zip(*histories, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, float) and "seconds" not in key:
                assert other[key] == pytest.approx(value, abs=1e-3), key
    prompts = [read_artifact(tmp_path / run / "prompt.safetensors") for run in ("cpu", "cuda")]
    for prompt in prompts:
        assert isinstance(prompt, ContextArtifact)
    one, other = (prompt.classifier().weight for prompt in prompts)
    np.testing.assert_allclose(one, other, atol=1e-2)


@pytest.mark.usefixtures("_cuda_is_the_cpu")
def test_one_capture_serves_every_call_of_a_round(ztune: Command, tmp_path: Path) -> None:
    document = tuned(ztune, tmp_path / "run", "--provider", "cuda", "--memory-limit", 1)
    calls = document["calls"]
    assert isinstance(calls, dict)
    assert (calls["candidates"], calls["class_groups"]) == (2, [10])
    assert document["cuda_graph"] == "captured"
