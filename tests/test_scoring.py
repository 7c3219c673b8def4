"""What `ztune eval` refuses to score, each in one line."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtimes.bundle import load_bundle
from tests.conftest import DIGITS, MINI, Command
from ztune.artifact import HeadArtifact, Provenance, VisualArtifact, write_artifact
from ztune.errors import ZtuneError
from ztune.statistics import score

BUNDLE = load_bundle(MINI)
CLASSES = tuple("0123456789")
PROVENANCE = Provenance(BUNDLE.model_id, BUNDLE.digest, "gda", 1, 0, "closed form")
HEAD = HeadArtifact(
    CLASSES, PROVENANCE, np.ones((10, BUNDLE.embed_dim), np.float32), np.zeros(10, np.float32)
)
DECODER = VisualArtifact(
    CLASSES,
    PROVENANCE,
    "decoder",
    np.ones(7, np.float32),
    np.eye(10, BUNDLE.embed_dim, dtype=np.float32),
    10.0,
    0.0,
    templates=("{}",),
    statistics=np.ones((2, 144), np.float32),
    extractor="ff" * 32,
)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_no_prediction(value: float) -> None:
    logits = np.eye(4, 3, dtype=np.float32)
    logits[2:, 1] = value
    with pytest.raises(ZtuneError, match=r"logits are not finite for image 3 of 4 \(2 such"):
        score(logits, np.zeros(4, np.int64), ("a", "b", "c"))
    assert score(logits[:2], np.arange(2), ("a", "b", "c")).accuracy == 1


def refused(ztune: Command, *words: object) -> str:
    """Return the one line in which eval refuses to score the digits."""
    result = ztune("eval", MINI, "--data", DIGITS, "--split", "all", "--quiet", *words)
    assert result.code == 1
    (line,) = result.err.splitlines()
    return line


def test_a_head_of_another_width_is_refused(ztune: Command, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.safetensors"
    write_artifact(prompt, replace(HEAD, weight=np.ones((10, 7), np.float32)))
    line = refused(ztune, "--prompt", prompt)
    assert "the artifact has features of 7 values" in line
    assert f"has {BUNDLE.embed_dim} (use the bundle it was tuned on)" in line


def test_an_extractor_needs_a_run(ztune: Command, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.safetensors"
    write_artifact(prompt, DECODER)
    assert f'no run.json next to "{prompt}", which names the feature' in refused(
        ztune, "--prompt", prompt
    )
