"""List public names and messages, and find words that the field does not use.

python -m tests.words            # every public name of ztune.*, every message
python -m tests.words --stilted  # lines with a word that has a usual one instead
"""

from __future__ import annotations

import ast
import bisect
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ("ztune", "runtimes", "export", "benchmarks", "examples")
PROSE = (
    "README.md",
    "CHANGELOG.md",
    "docs/**/*.md",
    "plans/*.toml",
    "examples/**/*.md",
    "benchmarks/*.md",
)
OLD_FORMATS = ROOT / "ztune" / "io" / "old_formats.py"
"""Where the words of earlier versions are read."""
USUAL = {
    r"pictures?": "image",
    r"(?<!there )(?:is|are|was|were) no (?!longer|more)[a-z]": "is not a ...",
    r"anew": "again",
    r"beside": "next to, with",
    r"(?:carry|carries|carried|carrying) out": "run",
    r"courses?": "run, loop",
    r"albums?|galler(?:y|ies)": "features",
    r"settled": "resolved",
    r"withheld": "missing",
    r"whoever|whosoever": "a caller that",
    r"deaths?": "attempts",
    r"sentences?": "template, text",
    r"upon": "on",
    r"none of ours|of ours": "of ztune",
    r"stands? (?:in|at|behind|beside|there|above|below)": "is in",
    r"somebody|nobody": "another user, no process",
    r"by far": "much",
    r"meanwhile": "in between",
    r"begun": "started",
    r"goes? on with|go on with": "resume with, continue with",
    r"begins? with none of": "unknown",
    r"on (?:their|its) way": "in flight, concurrent",
    r"of one's own|of (?:its|their) very own": "local, separate",
    r"for want of": "without",
    r"lives? off": "use",
    r"midway": "intermediate",
    r"dear(?:er|est)": "more expensive",
    r"g(?:ive|ives|iven|ave) away": "expose",
    r"tells? (?:no|nothing|of|apart)": "reports, distinguishes",
    r"(?:is|are|be|was|were) told": "gets, is reported",
    r"(?:has|have) no company": "is alone in its batch",
    r"the former one": "the previous one",
    r"half a character": "an unpaired surrogate",
    r"at the next occasion": "when convenient",
    r"(?:is|are|was|were) asked for": "is requested",
    r"one's own": "your own",
    r"by themselves": "automatically",
    r"(?:must|has to|have to) be said": "is required",
}
"""Patterns of words and phrases, and the usual ones; matched as whole words."""
_STILTED = {
    re.compile(rf"\b(?:{word})" + r"\b" * (word[-1] != "]"), re.I): usual
    for word, usual in USUAL.items()
}
_CODE = re.compile(r"`[^`]*`")
_RAISED = ("Error", "warn", "remark", "exit", "fail", "CallError", "add_argument")


def source_files() -> list[Path]:
    """Return the program's Python files."""
    return sorted(path for room in SOURCE for path in (ROOT / room).rglob("*.py"))


def prose_files() -> list[Path]:
    """Return the pages, plans and notes that a user reads."""
    return sorted({path for pattern in PROSE for path in ROOT.glob(pattern)})


def stilted(path: Path) -> Iterator[tuple[int, str, str, str]]:
    """Yield line number, word, usual word and line wherever a file has a word of USUAL.

    Phrases may continue on the next line. What a page quotes as code, such as keys of earlier
    versions, is left out.
    """
    lines = path.read_text().splitlines()
    texts = [_CODE.sub("", line) if path.suffix == ".md" else line for line in lines]
    texts = [text.strip(" #\"'") + " " for text in texts]
    starts = list(itertools.accumulate(map(len, texts), initial=0))
    for word, usual in _STILTED.items():
        for found in word.finditer("".join(texts)):
            number = bisect.bisect_right(starts, found.start())
            yield number, found[0], usual, lines[number - 1].strip()


def public_names(path: Path) -> Iterator[str]:
    """Yield the classes, functions and methods of a module that have no underscore."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if any(part.startswith("_") and part != "__init__" for part in module.split(".")):
        return
    for node in ast.parse(path.read_text()).body:
        name = getattr(node, "name", "_")
        if not name.startswith("_"):
            yield f"{module}.{name}"
        for part in node.body if isinstance(node, ast.ClassDef) else []:
            inner = getattr(part, "name", "_")
            if not inner.startswith("_"):
                yield f"{module}.{name}.{inner}"


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and text of errors, warnings, remarks and help."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func).split(".")[-1]
        if not called.endswith(_RAISED) or not (node.args or node.keywords):
            continue
        for value in (*node.args, *(keyword.value for keyword in node.keywords)):
            text = _text(value)
            if " " in text:
                yield node.lineno, text


def _text(node: ast.expr) -> str:
    """Return a string literal, {} for its expressions; empty for other nodes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "{}" for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return ""


def main() -> None:
    """Print the requested list."""
    if "--stilted" in sys.argv[1:]:
        for path in (*source_files(), *prose_files()):
            for number, word, _, line in stilted(path):
                sys.stdout.write(f"{path.relative_to(ROOT)}:{number}: {word}: {line}\n")
        return
    for path in source_files():
        for name in public_names(path):
            sys.stdout.write(f"{name}\n")
    for path in source_files():
        for number, text in messages(path):
            sys.stdout.write(f"{path.relative_to(ROOT)}:{number}: {text}\n")


if __name__ == "__main__":
    main()
