"""`ztune quantize`: derive an int8 or fp16 bundle from an fp32 one."""

from __future__ import annotations

import argparse
from pathlib import Path

from ztune.cli.output import Output

USAGE = ("BUNDLE --out BUNDLE [options]",)
EXAMPLE = """\
  ztune quantize bundles/vit-b-32 --precision int8 --out bundles/vit-b-32-int8
  ztune quantize bundles/vit-b-32 --precision fp16 --out bundles/vit-b-32-fp16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="an fp32 bundle")
    parser.add_argument("--precision", default="int8", help="int8 (default, CPUs) or fp16 (GPUs)")
    parser.add_argument("--out", required=True, type=Path, metavar="BUNDLE", help="a new folder")


def run(arguments: argparse.Namespace, output: Output) -> None:
    from export.quantize import quantize_bundle
    from runtimes.bundle import load_bundle

    bundle = load_bundle(arguments.bundle)
    result = quantize_bundle(bundle, arguments.out, arguments.precision, output.remark)
    before, after = (sum(file.bytes for file in b.files.values()) / 1e6 for b in (bundle, result))
    lines = [f"{result.path}: {result.precision}, {after:.1f} MB instead of {before:.1f} MB"]
    lines += [
        f"  {graph}.onnx against torch: worst cosine {figures['cosine']:.5f}"
        for graph, figures in result.parity.items()
    ]
    output.result(dict(result.manifest), lines)
