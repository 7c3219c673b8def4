"""What many tests share: the embedded bundle, the digits, and the command line in this process."""

import atexit
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from filelock import FileLock
from PIL import Image

from runtimes.preprocess import FORMATS
from runtimes.providers import onnxruntime
from ztune.cli.main import main
from ztune.experiments.executors import Serial

ROOT = Path(__file__).parent.parent
MINI = ROOT / "models" / "mini"
DIGITS = ROOT / "examples" / "digits"
DIGIT_NAMES = tuple(sorted(path.name for path in DIGITS.iterdir() if path.is_dir()))


def copy_digits(folder: Path, n: int, names: Sequence[str] = DIGIT_NAMES) -> Path:
    """Copy the first `n` images of some digits, or of all, into a folder; return it."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for image in sorted((DIGITS / name).iterdir())[:n]:
            shutil.copy(image, folder / name)
    return folder


# For a few shots and as many images to validate on, without reading all 1,797 digits.
FEW_DIGITS = copy_digits(Path(tempfile.mkdtemp(prefix="digits-")), 32)
atexit.register(shutil.rmtree, FEW_DIGITS, ignore_errors=True)


# Runs share features in the user's cache folder. A test finds none there, and leaves none.
_CACHES = tempfile.mkdtemp(prefix="caches-")
atexit.register(shutil.rmtree, _CACHES, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = _CACHES


@pytest.fixture(autouse=True)
def no_shared_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", tempfile.mkdtemp(dir=_CACHES))


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


# No test hangs on how fast a machine is.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Some tests import ONNX Runtime themselves; its telemetry is off before the first of them does.
_ort = onnxruntime()
SESSION_OPTIONS = _ort.SessionOptions

# Ray's workers would wait while anything else runs.
os.environ.update(RAY_worker_niceness="0")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several files run at once: sessions that take every core, with threads that spin while they
    # wait, would spend most of their time on each other. What a run asks for itself still counts.
    def _one_thread() -> Any:
        options = SESSION_OPTIONS()
        options.intra_op_num_threads = 1
        return options

    _ort.SessionOptions = _one_thread

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


@pytest.fixture
def cells_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `ztune compare` run its cells in this process, which starts faster than one for each."""
    monkeypatch.setattr("ztune.experiments.bench.Isolated", Serial)


def save_quickly(figure: Any, path: Path, **_: object) -> None:
    """Write what a figure shows instead of drawing it, which takes longer than a small run."""
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

    lines = [line.get_xydata().tolist() for line in figure.findobj(Line2D)]
    path.write_text(f"{lines} {[text.get_text() for text in figure.findobj(Text)]}")


@pytest.fixture
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no figures; some test in each file and those of reports draw them."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save_quickly)


@pytest.fixture(scope="session", autouse=True)
def _nothing_outlives_a_power_cut() -> Iterator[None]:
    """Leave it to the system when files reach the disk, since each wait takes milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def in_time() -> Iterator[None]:
    """Fail a test that waits for ever; a thread of its own or C code in a loop it cannot end."""
    if not hasattr(signal, "setitimer"):
        pytest.skip("this system has no timer that would end the test")

    def late(_number: int, _frame: object) -> None:
        pytest.fail("it waits for what never comes")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 30)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def listed_decoders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that asks a decoder of Pillow's beyond the list, or starts a program."""
    Image.init()
    asked: list[str] = []

    def refuse(*_words: object, **_options: object) -> None:
        asked.append("a program")
        raise OSError("no program is started here")

    def spy(name: str) -> tuple[Any, Any]:
        def accept(_prefix: bytes) -> bool:
            asked.append(name)
            return False

        return Image.OPEN[name][0], accept

    spies = {name: spy(name) for name in Image.OPEN if name not in FORMATS}
    monkeypatch.setattr(Image, "OPEN", {**Image.OPEN, **spies})
    monkeypatch.setattr(subprocess, "Popen", refuse)
    yield
    assert asked == []


@pytest.fixture(scope="session")
def bench_data() -> Path:
    """Return the folder of measuring material, which is not part of the project."""
    named = os.environ.get("ZTUNE_BENCH_DATA")
    if not named or not Path(named).is_dir():
        pytest.skip("ZTUNE_BENCH_DATA names no folder with a trained CLIP and real photographs")
    return Path(named)


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 44 images of each digit: enough for 16 shots and a test set."""
    return copy_digits(tmp_path_factory.mktemp("few") / "digits", 44)


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Return a function that makes a folder once for all workers of a run, and returns it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)

    def get(name: str, make: Callable[[Path], object]) -> Path:
        with FileLock(shared / f"{name}.lock"):
            if not (shared / name).exists():
                make(shared / name)
        return shared / name

    return get


@pytest.fixture(scope="session")
def trained(bench_data: Path, once: Once) -> Path:
    """Return the bundle of the trained CLIP among the measuring material."""
    from export.bundle import export_bundle
    from export.clip import load_clip

    model = bench_data / "bench-clip"
    if not model.is_dir():
        pytest.skip(f"{model} is missing")
    return once("trained", lambda out: export_bundle(load_clip(f"local-dir:{model}"), out))
