"""`ztune export-triton`: write a Triton model repository from a bundle."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ztune.cli.output import Output, Table
from ztune.types import Json

USAGE = ("BUNDLE --out REPO [options]",)
EXAMPLE = """\
  ztune export-triton bundles/vit-b-32 --out repository
  ztune export-triton bundles/vit-b-32 --backend python --access losses --out repository"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle to serve")
    parser.add_argument("--out", required=True, type=Path, metavar="REPO", help="a new folder")
    parser.add_argument("--name", help="prefix of the models' names (default: the bundle's folder)")
    parser.add_argument(
        "--backend",
        default="onnxruntime",
        help="onnxruntime (default), or python: onnxruntime inside Triton's Python backend",
    )
    parser.add_argument("--accelerator", default="none", help="none (default), cuda or tensorrt")
    parser.add_argument(
        "--instances",
        type=int,
        default=1,
        metavar="N",
        help="instances per model, and per GPU (default: 1)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads per instance")
    parser.add_argument(
        "--access",
        default="features",
        help="most that the server returns: features (default), logits or losses",
    )


def run(arguments: argparse.Namespace, output: Output) -> None:
    from export.triton import Serving, export_triton
    from runtimes.bundle import load_bundle

    serving = Serving(
        backend=arguments.backend,
        accelerator=arguments.accelerator,
        instances=arguments.instances,
        threads=arguments.threads,
        access=arguments.access,
    )
    bundle, out = load_bundle(arguments.bundle), arguments.out
    names = export_triton(bundle, out, arguments.name, serving, output.remark)
    sizes = {
        name: sum(file.stat().st_size for file in (out / name).rglob("*") if file.is_file())
        for name in names
    }
    models: dict[str, Json] = {name: {"bytes": size} for name, size in sizes.items()}
    document: dict[str, Json] = {
        "repository": str(out),
        "models": models,
        "bundle_digest": bundle.digest,
        "model_id": bundle.model_id,
        "precision": bundle.precision,
        "backend": serving.backend,
        "accelerator": serving.accelerator,
        "access": serving.access,
    }
    command = f"tritonserver --model-repository={shlex.quote(str(out.resolve()))}"
    output.result(
        document,
        [
            Table("", ["model", "bytes"], [[name, f"{size:,}"] for name, size in sizes.items()]),
            f"start it with: {command}",
        ],
    )
