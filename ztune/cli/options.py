"""Options that several verbs have, each declared once; a verb adds those it takes to a group."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_DECLARED: dict[str, dict[str, Any]] = {
    # data
    "--data": {
        "metavar": "FOLDER|NAME",
        "help": "folder, .csv/.jsonl list, or name of a data set with --root",
    },
    "--root": {
        "type": Path,
        "metavar": "DIR",
        "help": "folder that holds the data sets known by name (see: ztune data list)",
    },
    "--names": {"type": Path, "metavar": "FILE", "help": "lines of folder<TAB>name"},
    "--shots": {"type": int, "metavar": "N", "help": "training images per class (default: 16)"},
    "--val": {
        "type": int,
        "metavar": "N",
        "help": "validation images per class (default: min(shots, 4))",
    },
    "--test-fraction": {"metavar": "X", "help": "kept for testing (default: auto)"},
    "--test-data": {"type": Path, "metavar": "FOLDER", "help": "test images from elsewhere"},
    "--split-seed": {"type": int, "metavar": "N", "help": "chooses test images (default: 0)"},
    "--cache": {"type": Path, "metavar": "DIR", "help": "where features are kept"},
    "--skip-broken": {
        "action": "store_true",
        "help": "leave images out that cannot be read",
    },
    # method
    "--method": {"metavar": "NAME", "help": "see: ztune methods (default: ogn)"},
    "--queries": {"type": int, "metavar": "N", "help": "budget of a method (default: 5000)"},
    "--seed": {"type": int, "metavar": "N", "help": "default: 1"},
    "--preset": {"metavar": "NAME", "help": "default, published or tuned"},
    "--set": {
        "action": "append",
        "dest": "settings",
        "metavar": "KEY=VALUE",
        "help": "a method's setting (see: ztune methods NAME)",
    },
    "--init": {"metavar": "WORDS", "help": 'start from words, say "a photo of a"'},
    "--template": {
        "action": "append",
        "dest": "templates",
        "metavar": "TEXT",
        "help": "hand-written prompt of zero-shot, heads and visual prompts; several are averaged "
        '(default: "a photo of a {}.")',
    },
    "--extractor": {
        "type": Path,
        "metavar": "FILE",
        "help": "ONNX file whose features the decoder of blackvip sees",
    },
    # machine
    "--provider": {
        "default": "auto",
        "metavar": "NAME",
        "help": "auto (default), cpu, cuda or tensorrt",
    },
    "--threads": {
        "type": int,
        "metavar": "N",
        "help": "N threads, without spin-waiting (default: all cores)",
    },
    "--memory-limit": {
        "type": int,
        "metavar": "MB",
        "help": "of the tuning's forward passes (default: 250, on a GPU 4000)",
    },
    "--force": {"action": "store_true", "help": "tune below the signal-to-noise limit"},
    "--reference": {
        "type": Path,
        "metavar": "BUNDLE",
        "help": "fp32 bundle to measure an int8 or fp16 one's signal against (default: its own "
        "graph)",
    },
}


def add(group: argparse._ActionsContainer, *flags: str, **changes: Any) -> None:
    """Add options to a parser or a group of it, in this order; `changes` are this verb's own."""
    for flag in flags:
        group.add_argument(flag, **{**_DECLARED[flag], **changes})
