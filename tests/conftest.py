"""What many tests share: the embedded bundle, the digits, and the command line in this process."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runtimes.providers import onnxruntime
from ztune.cli.main import main

ROOT = Path(__file__).parent.parent
MINI = ROOT / "models" / "mini"
DIGITS = ROOT / "examples" / "digits"


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output as the one JSON document it must be."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


# Some tests import ONNX Runtime themselves; its telemetry is off before the first of them does.
onnxruntime()

Command = Callable[..., Result]


@pytest.fixture
def ztune(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `ztune` with these words in this process."""

    def command(*words: object) -> Result:
        capfd.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse: wrong usage, or --help
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return command


@pytest.fixture(scope="session")
def bench_data() -> Path:
    """Return the folder of measuring material, which is not part of the project."""
    named = os.environ.get("ZTUNE_BENCH_DATA")
    if not named or not Path(named).is_dir():
        pytest.skip("ZTUNE_BENCH_DATA names no folder with a trained CLIP and real photographs")
    return Path(named)
