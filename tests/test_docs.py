"""Documents that must follow the code."""

import argparse
import re
from dataclasses import fields
from pathlib import Path

import pytest

from ztune.cli.main import VERBS, parser
from ztune.methods import METHODS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("verb", VERBS)
def test_the_reference_names_every_option_and_no_other(verb: str) -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    general, _, rest = text.partition("## ztune export")
    section = re.split(r"^## ", f"## ztune export{rest}", flags=re.MULTILINE)
    own = general + next(part for part in section if part.startswith(f"ztune {verb}"))
    (verbs,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    for action in verbs.choices[verb]._actions:
        for option in action.option_strings:
            if option not in ("-h", "--help"):
                assert option in own, f"docs/commands.md, {verb}: {option}"
    known = verbs.choices[verb]._option_string_actions.keys()
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", own):
        assert option in known | {"--provider", "--threads"}, (
            f"docs/commands.md, {verb} has no {option}"
        )


def test_the_reference_names_every_setting() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    for method in METHODS.values():
        for field in fields(method.config):
            assert f"`{field.name}`" in text


def test_links_inside_the_project_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
