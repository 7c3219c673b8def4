"""Documents that must follow the code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ztune.cli.parser import VERBS, parser_of
from ztune.errors import how_to_install
from ztune.io.config import as_json
from ztune.methods.base import Preset, TunedMethod
from ztune.methods.registry import METHODS
from ztune.types import Json

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("verb", VERBS)
def test_the_reference_names_every_option_and_no_other(verb: str) -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    general, _, rest = text.partition("## ztune export")
    section = re.split(r"^## ", f"## ztune export{rest}", flags=re.MULTILINE)
    own = general + next(part for part in section if part.startswith(f"ztune {verb}"))
    parser = parser_of(verb)
    for action in parser._actions:
        for option in action.option_strings:
            if option not in ("-h", "--help"):
                assert option in own, f"docs/commands.md, {verb}: {option}"
    known = parser._option_string_actions.keys()
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", own):
        assert option in known | {"--provider", "--threads", "--version"}, (
            f"docs/commands.md, {verb} has no {option}"
        )


def page_of_methods() -> dict[str, str]:
    """Return the text of each method's section in docs/methods.md."""
    text = (ROOT / "docs" / "methods.md").read_text()
    parts = re.split(r"^#{2,3} (.+)\n", text, flags=re.MULTILINE)
    headed = zip(parts[1::2], parts[2::2], strict=True)
    return {head.strip("`"): body for head, body in headed if head.startswith("`")}


def shown(value: Json) -> str:
    """Return a value as one would write it behind --set."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_the_methods_page_has_a_section_for_each_method_and_no_other() -> None:
    assert list(page_of_methods()) == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_the_methods_page_has_every_setting_with_its_default(name: str) -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([^`|]*)` \| .", page_of_methods()[name], re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a setting stands there twice"
    assert dict(rows) == {k: shown(v) for k, v in as_json(METHODS[name].config()).items()}


@pytest.mark.parametrize("name", METHODS)
def test_the_methods_page_has_paper_cost_presets_and_departures(name: str) -> None:
    method, section = METHODS[name], page_of_methods()[name]
    for number in re.findall(r"arXiv \d+\.\d+", method.paper):
        assert number in section
    assert re.search(
        r"^Departures: none|^\| what \| paper \| published code \| here \| why \|$", section, re.M
    )
    assert "Result:" in section
    named = re.findall(r"^Preset `([\w-]+)`: (.*)\.$", section, re.MULTILINE)
    assert dict(named) == {name: said(preset) for name, preset in method.presets.items()}
    if isinstance(method, TunedMethod):
        assert f"{method.config().step_queries():,} queries" in section


def said(preset: Preset) -> str:
    views = [f"{preset.views} cached view{'s' * (preset.views > 1)}"] if preset.views else []
    return ", ".join(views + [f"`{key}` {shown(value)}" for key, value in preset.settings.items()])


def test_the_yaml_of_the_serving_page_is_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    text = (ROOT / "docs" / "serving.md").read_text()
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    documents = [document for block in blocks for document in yaml.safe_load_all(block)]
    kinds = [document.get("kind", "rules") for document in documents]
    assert kinds == [
        "Deployment", "Service", "rules", "HorizontalPodAutoscaler", "NetworkPolicy",
    ]  # fmt: skip
    deployment, service, adapter, scaler, policy = documents
    # What refers to each other by name does.
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        policy["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector == labels
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    for probe, path in (("startup", "ready"), ("readiness", "ready"), ("liveness", "live")):
        request = container[f"{probe}Probe"]["httpGet"]
        assert request == {"path": f"/v2/health/{path}", "port": "http"}
    volumes = {volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    (metric,) = scaler["spec"]["metrics"]
    (rule,) = adapter["rules"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "\n" not in rule["metricsQuery"]


def test_links_inside_the_project_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_three_steps_lead_to_a_piece_of_code() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("Where is it?")[2]
    rows = re.findall(r"^\| (?!question|---)(.+?) \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) > 5
    for question, steps in rows:
        file = ROOT
        assert len(steps.split(" → ")) <= 3, question
        for step in re.findall(r"`([^`]+)`", steps):
            if step.endswith(".py"):
                file = ROOT / step if "/" in step else file.parent / step
                assert file.is_file(), f"{question}: {step}"
            else:
                assert f"def {step}(" in file.read_text(), f"{question}: {step}"


def test_what_the_page_on_security_promises_has_its_test() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`(tests/[\w/.]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 15
    for file, function in named:
        assert f"def {function}" in (ROOT / file).read_text(), f"{file}::{function}"


# Which of our files have a function that a run of ZIP calls, in the order of the first call.
ENTERED = """
import sys, threading, ztune
from pathlib import Path
root, found, seen = Path(sys.argv[1]), [], set()
def note(frame, event, _):
    code = frame.f_code
    if event != "call" or code in seen:
        return
    seen.add(code)
    if code.co_name == "<module>" or not code.co_flags & 1:  # no class bodies
        return
    path = Path(code.co_filename)
    ours = path.is_relative_to(root) and path.relative_to(root).parts[0] in ("ztune", "runtimes")
    if ours and path not in found:
        found.append(path)
ztune.Model, ztune.Dataset, ztune.FewShotClassifier  # loaded before anything is noted
sys.setprofile(note)
threading.setprofile(note)
model = ztune.load(root / "models" / "mini", provider="cpu")
train, _ = ztune.Dataset.from_folder(root / "examples" / "digits").split(shots=4, seed=1)
ztune.FewShotClassifier(model, method="zip", queries=40).fit(train)
sys.setprofile(None)
print(*(path.relative_to(root).as_posix() for path in found), sep="\\n")
"""


def test_the_files_that_a_run_enters_are_listed() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("A run of ZIP")[2].partition("\n\n")[0]
    listed = re.findall(r"`((?:ztune|runtimes)/[\w/]+\.py)`", text)
    said = subprocess.check_output([sys.executable, "-c", ENTERED, str(ROOT)], text=True)
    assert said.split() == listed
    assert len(listed) <= 57


def test_extras_are_installed_from_a_checkout_and_exist() -> None:
    """No package index has ztune."""
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for room in ("ztune", "runtimes", "export", "docs"):
        for path in (ROOT / room).rglob("*.[pm][yd]"):
            text = path.read_text()
            assert "ztune[" not in text, path
            for extra in re.findall(r"how_to_install\(['\"](\w+)['\"]\)", text):
                assert extra in extras, path
    assert how_to_install("export").startswith("pip install '.[export]' ")
    assert "pip install '.[export]'" in (ROOT / "README.md").read_text()
