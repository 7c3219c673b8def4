"""Examples that people copy: in docstrings, in README and docs/python.md, and the notebook."""

import doctest
import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

import ztune
from tests.conftest import DIGITS, MINI, ROOT
from ztune import errors

PAGE = ROOT / "docs" / "python.md"
NOTEBOOK = ROOT / "examples" / "few_shot.ipynb"
FACE = (
    "ztune.model", "ztune.dataset", "ztune.estimator", "ztune.deployed", "ztune.experiments.bench",
)  # fmt: skip


@pytest.fixture
def workplace(tmp_path: Path, few_digits: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder, with the model and the digits where they are in the project.

    The plan is of a few of the digits.
    """
    (tmp_path / "models").symlink_to(MINI.parent)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "digits").symlink_to(DIGITS)
    (tmp_path / "plans").mkdir()
    plan = (ROOT / "plans" / "smoke.toml").read_text()
    assert '"../examples/digits"' in plan
    plan = plan.replace('"../examples/digits"', json.dumps(str(few_digits)))
    (tmp_path / "plans" / "smoke.toml").write_text(plan)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("module", FACE)
def test_the_examples_in_docstrings_run(module: str, workplace: Path) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("name", ztune.__all__)
def test_the_face_is_documented(name: str) -> None:
    one = getattr(ztune, name)
    assert ">>>" in one.__doc__
    assert inspect.isclass(one) or "Raises:" in one.__doc__
    for member, value in vars(one).items() if inspect.isclass(one) else ():
        is_method = isinstance(value, property | classmethod) or inspect.isfunction(value)
        if is_method and not member.startswith("_"):
            assert value.__doc__, f"{name}.{member}"


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """Return info string and text of a page's blocks of Python."""
    found = re.findall(r"^```(python.*)\n((?:.*\n)*?)```$", page.read_text(), re.MULTILINE)
    assert found, f"{page.name} has no block of Python"
    return found


def test_the_python_page_runs_from_top_to_bottom(workplace: Path) -> None:
    pytest.importorskip("sklearn")
    names: dict[str, Any] = {}
    for number, (info, text) in enumerate(blocks_of(PAGE)):
        code = compile(text, f"{PAGE.name}, block {number}", "exec")
        assert info in ("python", "python no-run")
        if info == "python":
            exec(code, names)


def test_the_python_page_names_every_error() -> None:
    text = PAGE.read_text()
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, errors.ZtuneError | errors.ZtuneWarning):
            assert f"`{name}`" in text, name


def test_the_lines_in_the_readme_run(workplace: Path) -> None:
    (workplace / "bundles").mkdir()
    (workplace / "bundles" / "vit-b-32").symlink_to(MINI)
    (workplace / "photos").symlink_to(DIGITS)
    ((_, text),) = blocks_of(ROOT / "README.md")
    exec(compile(text, "README.md", "exec"), {})


def kinds(notebook: Any) -> list[list[list[str]]]:
    """Return for each cell of code, and each output of it, whether it is text, an image…"""
    return [
        [sorted(output.get("data", [output.output_type])) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_the_notebook_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(workplace / "jupyter"))
    stored = nbformat.read(NOTEBOOK, as_version=4)
    text = NOTEBOOK.read_text()
    assert "queries=1000" in text
    notebook = nbformat.reads(text.replace("queries=1000", "queries=100"), as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(workplace / "examples"))
    assert kinds(notebook) == kinds(stored)
    assert {path.name for path in (workplace / "runs" / "few_shot").iterdir()} == {
        "prompt.safetensors",
        "classifier.onnx",
    }


@pytest.mark.parametrize("folder", [".", "examples"])
def test_the_notebook_finds_its_files_from_here(
    folder: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace / folder)
    cells = [
        cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    names: dict[str, Any] = {}
    for cell in cells[:2]:
        exec("".join(cell["source"]), names)
    assert len(names["data"]) == 1797
    # No other cell looks at the working folder.
    assert all("Path(" not in "".join(cell["source"]) for cell in cells[1:])
    assert names["root"].resolve() == workplace


def test_the_notebook_is_stored_with_its_outputs_and_nothing_of_a_machine() -> None:
    text = NOTEBOOK.read_text()
    assert text.count('"image/png"') >= 3
    assert '"output_type": "error"' not in text
    assert not re.search(r"/(home|root|tmp|work|Users|usr|opt)/|\\\\Users", text)
