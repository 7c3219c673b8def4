"""Which way imports run, and what a device never loads."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("ztune", "runtimes", "export")
GROUND = {"types", "errors", "capabilities", "printing", "progress", "io", "system"}
"""What everything may import, and what imports nothing but itself."""
LAYERS = (
    {"cli"},
    {"experiments", "doctor", "estimator", "deployed", "exporting", "foreign"},
    {"dataset"},
    {"saved_run", "starting"},
    {"training"},
    {"checks", "evaluate"},
    {"task", "out_of_fold"},
    {"encoded"},
    {"precision", "run_document"},
    {"run_config"},
    {"model", "timing"},
    {"ensemble"},
    {"methods"},
    {"run"},
    {"optim", "heads", "loop", "maps", "top_classes", "journal", "report_compare", "text_cache"},
    {"objective", "artifact", "data", "report", "budget", "inliers"},
    {"calibration", "mixing", "statistics"},
    {"logits"},
    GROUND,
)
"""Rooms of ztune from the top floor down; a room imports those of lower floors, and itself."""
KNOWS_RUNTIMES = set().union(*LAYERS[: LAYERS.index({"model", "timing"}) + 1]) - {
    "run_config",
    "encoded",
}
ALLOWED = {
    "runtimes": {"runtimes"} | {f"ztune.{room}" for room in GROUND},
    "export": {"export", "runtimes", "ztune.artifact", "ztune.logits"}
    | {f"ztune.{room}" for room in GROUND},
}


def imported(path: Path) -> set[str]:
    """Return the full names of all modules a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    """Return which of our modules a file imports."""
    found = {name for name in imported(path) if name.split(".")[0] in (*ROOMS, "benchmarks")}
    return found - {"ztune", "runtimes", "export"}


def list_files(room: str) -> list[Path]:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    return files


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "ztune").parts[0].removesuffix(".py")


@pytest.mark.parametrize("room", ["runtimes", "export"])
def test_rooms_import_only_what_the_design_allows(room: str) -> None:
    for path in list_files(room):
        for name in ours(path):
            fits = any(name == one or name.startswith(f"{one}.") for one in ALLOWED[room])
            assert fits, f"{path.relative_to(ROOT)} imports {name}"


def test_every_room_of_ztune_is_on_a_floor() -> None:
    placed = [room for layer in LAYERS for room in layer]
    assert len(placed) == len(set(placed))
    assert {room_of(path) for path in list_files("ztune")} - {"__init__"} <= set(placed)


def test_arrows_run_down() -> None:
    floor = {room: level for level, layer in enumerate(LAYERS) for room in layer}
    for path in list_files("ztune"):
        room = room_of(path)
        if room == "__init__":
            continue
        for name in ours(path):
            first, _, rest = name.partition(".")
            where = f"{path.relative_to(ROOT)} imports {name}"
            if first == "ztune":
                other = rest.split(".")[0]
                lower = floor[other] > floor[room] or (room in GROUND and other in GROUND)
                assert other == room or lower, where
            elif first == "export":
                assert room in ("cli", "estimator", "exporting"), where
            else:
                assert first == "runtimes", where
                assert room in KNOWS_RUNTIMES, where


def test_the_face_loads_export_only_when_it_is_used() -> None:
    for name in ("estimator.py", "exporting.py"):
        tree = ast.parse((ROOT / "ztune" / name).read_text())
        loaded = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert not [module for module in loaded if str(module).startswith("export")]


def test_nothing_imports_the_command_line() -> None:
    """Benchmarks call `ztune` as a process, where they do."""
    for room in ("ztune", "runtimes", "export", "benchmarks", "examples/mini_clip"):
        for path in list_files(room):
            if path.is_relative_to(ROOT / "ztune" / "cli"):
                continue
            named = {name for name in imported(path) if name.startswith("ztune.cli")}
            assert not named, f"{path.relative_to(ROOT)} imports {sorted(named)}"


def test_no_files_import_each_other() -> None:
    """Whatever is imported inside a function counts too."""
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for room in (*ROOMS, "benchmarks")
        for path in list_files(room)
    }
    edges = {name: imported(path) & names.keys() - {name} for name, path in names.items()}
    while leaves := {name for name, targets in edges.items() if not targets & edges.keys()}:
        edges = {name: targets for name, targets in edges.items() if name not in leaves}
    assert not edges, f"circles among {sorted(edges)}"


def texts_in(tree: ast.AST) -> list[tuple[int, str]]:
    """Return the strings of a file with their lines, one with values in it as a whole."""
    whole = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for node in whole for part in ast.walk(node) if part is not node}
    plain = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts
    ]
    found = [(node.lineno, str(node.value)) for node in plain]
    return found + [(node.lineno, ast.unparse(node)) for node in whole]


def test_no_flag_of_the_command_line_is_named_below_it() -> None:
    """Errors name arguments, which the command line says as its options.

    A whole command may be named, ours or Ray's, and what git and Triton are called with.
    """
    flag = re.compile(r"(?<![\w-])--[a-z]")
    command = re.compile(r"(ztune [a-z-]+|ray start) |^--(always|abbrev=12|dirty)$")
    for room in ROOMS:
        for path in list_files(room):
            if path.is_relative_to(ROOT / "ztune" / "cli") or path.name == "python_backend.py":
                continue
            for line, text in texts_in(ast.parse(path.read_text())):
                assert not flag.search(text) or command.search(text), f"{path}:{line}: {text!r}"


def test_importing_ztune_loads_nothing() -> None:
    program = """
import sys, ztune
heavy = {"numpy", "torch", "onnx", "onnxruntime", "tritonclient", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
assert set(ztune.__all__) <= set(dir(ztune))
for name in ztune.__all__:
    assert getattr(ztune, name).__name__ == name
assert not {"torch", "onnxruntime", "tritonclient", "ztune.cli"} & set(sys.modules)
try:
    ztune.nothing
except AttributeError as error:
    assert "nothing" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", ["ztune", "runtimes"])
def test_a_device_never_imports_torch(room: str) -> None:
    for path in list_files(room):
        tops = {name.split(".")[0] for name in imported(path)}
        assert not tops & {"torch", "torchvision", "open_clip", "timm", "transformers"}, path


def test_packing_needs_no_torch() -> None:
    tops = {name.split(".")[0] for name in imported(ROOT / "export" / "classifier.py")}
    assert "torch" not in tops
    program = "import sys, export.classifier; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_pickle_and_eval_occur_nowhere() -> None:
    for room in ROOMS:
        for path in list_files(room):
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
        for path in list_files(room)
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
    for path in list_files("ztune"):
        if path != ROOT / "ztune" / "cli" / "output.py":
            tree = ast.parse(path.read_text())
            called = {ast.unparse(one.func) for one in ast.walk(tree) if isinstance(one, ast.Call)}
            assert not writing & (called | imported(path)), path


def test_help_is_quick_to_load() -> None:
    """Asking for help loads neither ONNX Runtime nor torch nor matplotlib."""
    program = """
import contextlib, io, sys
from ztune.cli.parser import VERBS, parser_of
for verb in VERBS:
    parser_of(verb).format_help()
heavy = {"onnxruntime", "onnx", "torch", "matplotlib", "PIL", "tokenizers"} & set(sys.modules)
sys.exit(f"help loads {sorted(heavy)}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def loaded_by(*words: str) -> tuple[int, set[str]]:
    """Return the exit code of `ztune` with these words, and the modules that it has loaded."""
    program = """
import atexit, sys
atexit.register(lambda: print("\\nloaded", *sys.modules))
from ztune.cli.main import main
sys.exit(main())
"""
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, set(done.stdout.rpartition("\nloaded ")[2].split())


@pytest.mark.parametrize(
    ("words", "code"),
    [((), 2), (("--help",), 0), (("--version",), 0), (("tnue",), 2), (("--shots", "4"), 2)],
)
def test_the_list_of_verbs_loads_none_of_them(words: tuple[str, ...], code: int) -> None:
    returned, loaded = loaded_by(*words)
    assert returned == code
    assert {name for name in loaded if name.startswith("ztune.cli.")} == {
        "ztune.cli.main", "ztune.cli.output", "ztune.cli.parser",
    }  # fmt: skip
    assert not {"numpy", "rich"} & loaded


def test_predict_loads_only_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "classifier.onnx").write_bytes(b"none")
    code, loaded = loaded_by("predict", str(tmp_path / "classifier.onnx"), str(tmp_path))
    assert code == 1
    assert "onnxruntime" in loaded
    assert {name for name in loaded if name.startswith("ztune.cli.")} == {
        "ztune.cli.main", "ztune.cli.options", "ztune.cli.output", "ztune.cli.parser",
        "ztune.cli.predict",
    }  # fmt: skip
    assert not {"matplotlib", "onnx", "tokenizers", "ftfy", "rich.progress", "ssl"} & loaded


def test_images_are_opened_with_a_list_of_formats_everywhere() -> None:
    for room in (*ROOMS, "benchmarks"):
        for path in list_files(room):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                    assert "formats" in {word.arg for word in node.keywords}, path
