"""Which way imports run, and what a device never loads."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("ztune", "runtimes", "export")
GROUND = {"ztune.types", "ztune.access", "ztune.errors", "ztune.printing", "ztune.io"}
ALLOWED = {
    "ztune": {"ztune", "runtimes"},
    "runtimes": {"runtimes"} | GROUND,
    "export": {"export", "runtimes", "ztune.artifact", "ztune.logits"} | GROUND,
}


def imported(path: Path) -> set[str]:
    """Return the full names of all modules a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def files_of(room: str) -> list[Path]:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    return files


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_the_design_allows(room: str) -> None:
    for path in files_of(room):
        if path.is_relative_to(ROOT / "ztune" / "cli"):
            continue  # the only place that composes all three
        ours = {name for name in imported(path) if name.split(".")[0] in ROOMS}
        for name in ours:
            fits = any(name == one or name.startswith(f"{one}.") for one in ALLOWED[room])
            assert fits, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", ["ztune", "runtimes"])
def test_a_device_never_imports_torch(room: str) -> None:
    for path in files_of(room):
        tops = {name.split(".")[0] for name in imported(path)}
        assert not tops & {"torch", "torchvision", "open_clip", "timm", "transformers"}, path


def test_packing_needs_no_torch() -> None:
    tops = {name.split(".")[0] for name in imported(ROOT / "export" / "classifier.py")}
    assert "torch" not in tops
    program = "import sys, export.classifier; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_pickle_and_eval_occur_nowhere() -> None:
    for room in ROOMS:
        for path in files_of(room):
            tree = ast.parse(path.read_text())
            assert not {"pickle", "dill", "marshal"} & imported(path), path
            # Files of joblib are pickles; its processes are what a bench's workers are.
            if path.name != "executors.py":
                assert not {n for n in imported(path) if n.split(".")[0] == "joblib"}, path
            called = {
                node.func.id
                for node in ast.walk(tree)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            }
            assert not called & {"eval", "exec"}, path


def test_onnx_runtime_is_loaded_without_its_telemetry() -> None:
    """One function imports it; a Triton server, which has nothing else of ours, does the same."""
    importing = {
        str(path.relative_to(ROOT))
        for room in (*ROOMS, "benchmarks")
        for path in files_of(room)
        if any(name.split(".")[0] == "onnxruntime" for name in imported(path))
    }
    own = {"runtimes/providers.py", "export/python_backend.py"}
    assert importing == own | {"export/quantize.py"}  # a submodule, after that function
    for name in own:
        text = (ROOT / name).read_text()
        assert re.search(
            r"environ\.setdefault\((TELEMETRY|\"ORT_DISABLE_TELEMETRY\"), \"1\"\)", text
        )
        assert (
            text.index("environ.setdefault(") < text.index("    import onnxruntime as ort")
            if (name.startswith("runtimes"))
            else text.index("environ.setdefault(") < text.index("\nimport onnxruntime")
        )


def test_what_is_printed_passes_one_place() -> None:
    """There, and nowhere else, texts of others are made printable for a terminal."""
    writing = {"print", "rich.console", "rich.progress", "sys.stderr.write", "sys.stdout.write"}
    for path in files_of("ztune"):
        if path != ROOT / "ztune" / "cli" / "output.py":
            tree = ast.parse(path.read_text())
            called = {ast.unparse(one.func) for one in ast.walk(tree) if isinstance(one, ast.Call)}
            assert not writing & (called | imported(path)), path


def test_the_core_loads_nothing_beyond_numpy_and_the_standard_library() -> None:
    program = """
import sys
import numpy
after_numpy = set(sys.modules)
import ztune, ztune.loop, ztune.objective, ztune.maps.zip, ztune.optim.spsa, ztune.heads.gda
import ztune.optim.mixture, ztune.optim.gauss_newton, ztune.maps.vocabulary
new = {name.split(".")[0] for name in set(sys.modules) - after_numpy}
foreign = {n for n in new if n not in sys.stdlib_module_names and n not in ("ztune", "numpy")}
sys.exit(f"the core loads {sorted(foreign)}" if foreign else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_is_quick_to_load() -> None:
    """Asking for help loads neither ONNX Runtime nor torch nor matplotlib."""
    program = """
import contextlib, io, sys
from ztune.cli.main import parser
parser().format_help()
heavy = {"onnxruntime", "onnx", "torch", "matplotlib", "PIL", "tokenizers"} & set(sys.modules)
sys.exit(f"help loads {sorted(heavy)}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pictures_are_opened_with_a_list_of_formats_everywhere() -> None:
    for room in (*ROOMS, "benchmarks"):
        for path in files_of(room):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                    assert "formats" in {word.arg for word in node.keywords}, path
