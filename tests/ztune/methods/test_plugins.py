"""Methods of other packages: found by name, and what is said where one cannot be used."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.plugins import EXAMPLE, install, install_example
from ztune.errors import ConfigError
from ztune.methods import plugins
from ztune.methods.base import TunedMethod
from ztune.methods.registry import (
    METHODS,
    find_method,
    method_names,
    method_to_json,
    needs_of_all,
    usable_methods,
)

SOURCE = (EXAMPLE / "ztune_random_search.py").read_text()
POINT = "random-search = ztune_random_search:METHOD"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder on the path, from which packages are found."""
    place = tmp_path / "site"
    place.mkdir()
    monkeypatch.syspath_prepend(place)

    def forget() -> None:
        plugins.entry_points.cache_clear()
        plugins.load.cache_clear()
        sys.modules.pop("ztune_random_search", None)

    forget()
    yield place
    forget()


def test_a_method_of_another_package_is_one_of_the_table(site: Path, ztune: Command) -> None:
    install_example(site)
    assert method_names() == [*METHODS, "random-search"]
    assert "ztune_random_search" not in sys.modules
    method = find_method("random-search")
    assert isinstance(method, TunedMethod)
    assert needs_of_all()["random-search"] == needs_of_all()["zip"]
    assert method_to_json(method)["package"] == "ztune-random-search 0.1.0"
    assert method_to_json(find_method("zip"))["package"] is None
    listed = ztune("methods").out
    assert listed.splitlines()[0].split()[-1] == "package"
    assert any(line.split()[-2:] == ["ztune-random-search", "0.1.0"] for line in listed.split("\n"))
    assert "package: ztune-random-search 0.1.0\n" in ztune("methods", "random-search").out
    documents = ztune("methods", "--json").json
    assert documents["methods"][-1]["name"] == "random-search"
    assert documents["failed"] == {}
    assert "random-search" in ztune("compare", "--help").out
    with pytest.raises(ConfigError, match=r'"random_search" \(did you mean random-search\?\)'):
        find_method("random_search")


def wrong(site: Path, source: str, point: str = POINT) -> None:
    install(site, "broken", "1.2", point, ztune_random_search=source)


BROKEN = {
    "a package that is missing": (f"import nothing_there\n{SOURCE}", POINT, "ModuleNotFoundError"),
    "no such object": ("", POINT, "AttributeError: module 'ztune_random_search' has no attribute"),
    "syntax": ("METHOD = (", POINT, "SyntaxError"),
    "a module that exits": ("import sys; sys.exit(3)", POINT, "SystemExit: 3"),
    "several lines": ("raise ValueError('a\\nb')", POINT, "ValueError: a b"),
    "something else": ("METHOD = 3", POINT, "METHOD is int, expected a TunedMethod or HeadMethod"),
    "another name": (SOURCE, "other = ztune_random_search:METHOD", 'is named "random-search"'),
    "no paper": (SOURCE.replace('    paper="Rechenberg 1973",\n', ""), POINT, "'paper'"),
    "no build": (SOURCE.replace("def build", "def buidl"), POINT, "RandomSearchConfig lacks build"),
    "a default that is refused": (
        SOURCE.replace("radius: float = 0.1", "radius: float = 0.0"), POINT,
        "ConfigError: radius is 0.0, expected more than 0",
    ),
    "settings of a type without a word": (
        SOURCE.replace("radius: float = 0.1", "radius: Radius = 0.1"), POINT, "Radius",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_method_that_cannot_be_used_says_why_and_the_others_can(
    case: str, site: Path, ztune: Command
) -> None:
    source, point, reason = BROKEN[case]
    wrong(site, source, point)
    name = point.split()[0]
    result = ztune("methods", name)
    assert result.code == 1
    (line,) = result.err.splitlines()
    assert line.startswith(f'error: method "{name}" of package broken 1.2')
    assert reason in line
    assert find_method("zip") is METHODS["zip"]
    listed = ztune("methods", "--json")
    assert listed.code == 0
    assert [one["name"] for one in listed.json["methods"]] == list(METHODS)
    assert f"error: {listed.json['failed'][name]}" == line
    assert line.removeprefix("error: ") in ztune("methods").out.replace("\n", " ")
    usable, failed = usable_methods()
    assert (list(usable), list(failed)) == (list(METHODS), [name])
    assert name not in needs_of_all()


def test_a_comparison_of_all_methods_leaves_out_one_that_cannot_be_used(
    site: Path, ztune: Command, tmp_path: Path
) -> None:
    wrong(site, "METHOD = 3")
    words = ("compare", tmp_path / "no-bundle", "--data", tmp_path, "--out", tmp_path / "out")
    lines = ztune(*words, "--provider", "cpu").err.splitlines()
    assert 'warning: method "random-search" of package broken 1.2: ' in lines[0]
    assert "no-bundle" in lines[-1]


def test_a_name_of_ztune_is_taken_by_nobody_else(site: Path) -> None:
    wrong(site, SOURCE, "zip = ztune_random_search:METHOD")
    said = r'package broken 1.2 registers the name of ztune\'s own method "zip" \(uninstall'
    with pytest.raises(ConfigError, match=said):
        find_method("zip")
    assert find_method("ogn") is METHODS["ogn"]
    assert "ztune_random_search" not in sys.modules
    assert method_names() == list(METHODS)
    assert list(usable_methods()[1]) == ["zip"]


def test_two_packages_with_one_name_are_both_named(site: Path) -> None:
    install_example(site)
    install(site, "another", "3", POINT)
    said = r"in several packages, another 3 and ztune-random-search 0.1.0 \(uninstall all but one"
    with pytest.raises(ConfigError, match=said):
        find_method("random-search")


def test_nothing_is_looked_for_before_a_method_is() -> None:
    program = """
import ztune, ztune.methods.registry, ztune.model
from ztune.methods.plugins import entry_points
assert entry_points.cache_info().misses == 0
ztune.methods.registry.find_method("zip")
assert entry_points.cache_info().misses == 1
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
