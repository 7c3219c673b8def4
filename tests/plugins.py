"""Packages with methods, installed into a folder as pip would."""

import shutil
from pathlib import Path

from tests.conftest import ROOT
from ztune.io.toml import parse_toml

EXAMPLE = ROOT / "examples" / "ztune_random_search"


def install(site: Path, name: str, version: str, *points: str, **modules: str) -> None:
    """Write modules by name, and what says that a package has these entry points."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("\n".join(["[ztune.methods]", *points, ""]))
    for module, text in modules.items():
        (site / f"{module}.py").write_text(text)


def install_example(site: Path, version: str | None = None) -> None:
    """Install the example, in place of another version of it."""
    if site.exists():
        shutil.rmtree(site)
    project = parse_toml((EXAMPLE / "pyproject.toml").read_text(), "pyproject.toml")["project"]
    assert isinstance(project, dict)
    groups = project["entry-points"]
    assert isinstance(groups, dict)
    points = groups["ztune.methods"]
    assert isinstance(points, dict)
    listed = [f"{name} = {place}" for name, place in points.items()]
    source = (EXAMPLE / "ztune_random_search.py").read_text()
    given = version or str(project["version"])
    install(site, str(project["name"]), given, *listed, ztune_random_search=source)
