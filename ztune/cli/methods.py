"""`ztune methods`: list the methods with paper, required capabilities and settings."""

from __future__ import annotations

import argparse

from ztune.cli.output import Output, Table
from ztune.io.config import as_json
from ztune.methods.base import Method
from ztune.methods.registry import find_method, method_to_json, preset_changes, usable_methods
from ztune.types import LEAST_AREA, Json

USAGE = ("[NAME]",)
EXAMPLE = """\
  ztune methods
  ztune methods sharpzo"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="show one method and its settings")


def run(arguments: argparse.Namespace, output: Output) -> None:
    if arguments.name is not None:
        method = find_method(arguments.name)
        document = method_to_json(method)
        output.result(document, _lines(method, document))
        return
    methods, failed = usable_methods()
    documents = [method_to_json(method) for method in methods.values()]
    columns: tuple[str, ...] = ("method", "description", "paper", "needs", "new classes")
    rows: list[tuple[str, ...]] = [
        (m.name, m.title, m.paper, str(one["capabilities"]), ("no", "yes")[m.serves_new_classes()])
        for m, one in zip(methods.values(), documents, strict=True)
    ]
    packages = [str(one["package"] or "ztune") for one in documents]
    if set(packages) != {"ztune"}:
        columns = (*columns, "package")
        rows = [(*row, package) for row, package in zip(rows, packages, strict=True)]
    lines: list[str | Table] = [Table("", columns, rows, words=columns)]
    if failed:
        lines += ["", "unusable methods:", *map(str, failed.values())]
    closing = "settings: ztune methods NAME; compare on your images: ztune compare"
    failures: dict[str, Json] = {name: str(error) for name, error in failed.items()}
    output.result({"methods": list(documents), "failed": failures}, [*lines, "", closing])


def _lines(method: Method, document: dict[str, Json]) -> list[str | Table]:
    settings = as_json(method.config())
    lines: list[str | Table] = [
        f"{method.name}: {method.title}",
        f"paper: {method.paper}",
        *([f"package: {document['package']}"] if document["package"] else []),
        f"needs: {document['capabilities']}",
        "supports new class names"
        if method.serves_new_classes()
        else "supports only the classes it was fitted on",
    ]
    if "first_step_queries" in document:
        lines.append(f"first step: {document['first_step_queries']} queries")
    if document.get("encodes_images_every_query"):
        lines.append("encodes the images of a batch with every query")
    if settings:
        rows = [(name, _shown(value)) for name, value in settings.items()]
        lines += ["", Table("", ("setting", "default"), rows)]
    for name, changes in preset_changes(method).items():
        words = [f"{key} {_shown(value)}" for key, value in changes.items()]
        if (area := method.presets[name].least_area) != LEAST_AREA:
            words.append(f"crops of at least {area:g} of an image")
        lines += ["", f"preset {name}: {', '.join(words)}"]
    return lines


def _shown(value: Json) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
