"""Options shared by several verbs, each declared once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def number_or_word(text: str) -> int | str:
    """Return the value of an option that RunConfig checks."""
    return int(text) if text.lstrip("-").isdecimal() else text


def _number_or_all(text: str) -> int | str:
    """Return the value of --shots; SplitSettings checks a number."""
    value = number_or_word(text)
    if value != "all" and not isinstance(value, int):
        raise argparse.ArgumentTypeError(f"expected a number or all, got '{text}'")
    return value


_DECLARED: dict[str, dict[str, Any]] = {
    # data
    "--data": {
        "metavar": "FOLDER|NAME",
        "help": "folder, .csv/.jsonl list, or name of a data set with --root",
    },
    "--root": {
        "type": Path,
        "metavar": "DIR",
        "help": "folder with the named data sets (see: ztune data list)",
    },
    "--names": {"type": Path, "metavar": "FILE", "help": "class names, lines of folder<TAB>name"},
    "--nested": {
        "nargs": "?",
        "const": "leaf",
        "choices": ("leaf", "top"),
        "help": "folders in folders: classes are the innermost (leaf, default) or the top ones",
    },
    "--shots": {
        "type": _number_or_all,
        "metavar": "N",
        "help": "training images per class, or all (default; with --root: 16)",
    },
    "--val": {
        "type": int,
        "metavar": "N",
        "help": "validation images per class (default: min(shots, 4); with all shots 4 or none)",
    },
    "--test-fraction": {
        "metavar": "X",
        "help": "fraction of images kept for testing (default: auto)",
    },
    "--test-data": {"type": Path, "metavar": "FOLDER", "help": "separate test images"},
    "--split-seed": {"type": int, "metavar": "N", "help": "seed of the test split (default: 0)"},
    "--cache": {"type": Path, "metavar": "DIR", "help": "cache folder for features"},
    "--skip-broken": {"action": "store_true", "help": "skip unreadable images"},
    "--skip-conflicts": {"action": "store_true", "help": "skip images with two classes or roles"},
    "--max-pixels": {"type": int, "metavar": "N", "help": "limit per image (default: 100 million)"},
    # method
    "--method": {"metavar": "NAME", "help": "method, see: ztune methods (default: auto)"},
    "--queries": {"type": int, "metavar": "N", "help": "query budget (default: 5000)"},
    "--seed": {"type": int, "metavar": "N", "help": "random seed (default: 1)"},
    "--preset": {"metavar": "NAME", "help": "default, published, published-code or tuned settings"},
    "--set": {
        "action": "append",
        "dest": "settings",
        "metavar": "KEY=VALUE",
        "help": "setting of the method (see: ztune methods NAME)",
    },
    "--init": {"metavar": "WORDS", "help": 'initial context, such as "a photo of a"'},
    "--template": {
        "action": "append",
        "dest": "templates",
        "metavar": "TEXT",
        "help": "template of zero-shot, heads and visual prompts; several are averaged "
        '(default: "a photo of a {}.")',
    },
    # machine
    "--provider": {
        "default": "auto",
        "metavar": "NAME",
        "help": "execution provider: auto (default), cpu, cuda or tensorrt",
    },
    "--threads": {
        "type": int,
        "metavar": "N",
        "help": "CPU threads, without spin-waiting (default: all cores)",
    },
    "--memory-limit": {
        "type": int,
        "metavar": "MB",
        "help": "memory of the tuning's forward passes (default: 250, on a GPU 4000)",
    },
    "--force": {"action": "store_true", "help": "tune below the signal-to-noise limit"},
    "--reference": {
        "type": Path,
        "metavar": "BUNDLE",
        "help": "fp32 reference of the signal check of an int8 or fp16 bundle (default: itself)",
    },
}


def add(group: argparse._ActionsContainer, *flags: str, **changes: Any) -> None:
    """Add options to a parser or group; `changes` override declarations."""
    for flag in flags:
        group.add_argument(flag, **{**_DECLARED[flag], **changes})
