"""`ztune methods`: what there is, from which paper, what it needs, and its settings."""

from __future__ import annotations

import argparse

from ztune.access import described
from ztune.cli.output import Output, Table
from ztune.errors import ConfigError
from ztune.io.config import as_json
from ztune.methods import METHODS, Method, TunedMethod, find_method, method_config, needs_of
from ztune.types import Json

USAGE = ("[NAME]",)
EXAMPLE = """\
  ztune methods
  ztune methods sharpzo"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="one method and its settings")


def run(arguments: argparse.Namespace, output: Output) -> None:
    if arguments.name is not None:
        method = find_method(arguments.name)
        document = _document(method)
        output.result(document, _lines(method, document))
        return
    documents = [_document(method) for method in METHODS.values()]
    rows = [
        (m.name, m.title, m.paper, _access(m), "yes" if m.serves_new_classes() else "no")
        for m in METHODS.values()
    ]
    columns = ("method", "what it is", "from", "needs", "new classes")
    listing = Table("", columns, rows, words=columns)
    closing = "settings of one: ztune methods NAME; all of them on your pictures: ztune compare"
    output.result({"methods": list(documents)}, [listing, "", closing])


def _access(method: Method) -> str:
    return described(needs_of(method, method.config()))


def _document(method: Method) -> dict[str, Json]:
    config = method.config()
    document: dict[str, Json] = {
        "name": method.name,
        "title": method.title,
        "paper": method.paper,
        "needs": [*sorted(needs_of(method, config))],
        "access": _access(method),
        "serves_new_classes": method.serves_new_classes(),
        "settings": as_json(config),
        "presets": _presets(method),
    }
    if isinstance(method, TunedMethod):
        document["first_step_queries"] = config.step_queries()
        document["encodes_pictures_anew"] = config.program is not None
    return document


def _presets(method: Method) -> dict[str, Json]:
    """Return what each preset changes; a preset that changes nothing is left out."""
    presets: dict[str, Json] = {}
    if not isinstance(method, TunedMethod):
        return presets
    if method.augment:
        presets["published"] = {"augment": method.augment}
    default = as_json(method.config())
    tuned = as_json(method_config(method, {}, "tuned"))
    changed: dict[str, Json] = {k: v for k, v in tuned.items() if v != default[k]}
    if changed:
        presets["tuned"] = changed
    return presets


def _lines(method: Method, document: dict[str, Json]) -> list[str | Table]:
    settings = as_json(method.config())
    lines: list[str | Table] = [
        f"{method.name}: {method.title}",
        f"from {method.paper}",
        f"needs {document['access']}",
        "serves new class names"
        if method.serves_new_classes()
        else "serves only the classes it was fitted on",
    ]
    if "first_step_queries" in document:
        lines.append(f"its first step costs {document['first_step_queries']} queries")
    if document.get("encodes_pictures_anew"):
        lines.append("encodes the pictures of a batch anew with every query")
    if settings:
        rows = [(name, _shown(value)) for name, value in settings.items()]
        lines += ["", Table("", ("setting", "default"), rows)]
    for name, changes in _presets(method).items():
        if not isinstance(changes, dict):
            raise ConfigError(f"preset {name} is {changes!r}, expected settings")
        words = ", ".join(f"{key} {_shown(value)}" for key, value in changes.items())
        lines += ["", f"preset {name}: {words}"]
    return lines


def _shown(value: Json) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
