"""`ztune pack`: one classifier.onnx to deploy."""

from __future__ import annotations

import argparse
from pathlib import Path

from ztune.cli.options import add
from ztune.cli.output import Output
from ztune.errors import ConfigError
from ztune.types import Json

USAGE = ("BUNDLE --prompt FILE --out FILE [options]",)
EXAMPLE = """\
  ztune pack models/mini --prompt runs/digits/prompt.safetensors --out classifier.onnx
  ztune pack bundles/vit-b-32 --prompt photos.safetensors --resize --out classifier.onnx"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle of the prompt")
    parser.add_argument(
        "--prompt", required=True, type=Path, metavar="RUN|FILE", help="a result of ztune tune"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help="file to write, such as classifier.onnx",
    )
    parser.add_argument("--resize", action="store_true", help="accept images of any size")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="class names, one per line")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    add(parser, "--provider", default="cpu", help="auto, cpu (default), cuda or tensorrt")
    add(parser, "--threads")


def run(arguments: argparse.Namespace, output: Output) -> None:
    from export.classifier import pack
    from runtimes.providers import resolve_execution
    from ztune.artifact import inliers_of, read_artifact, require_same_model
    from ztune.data.manifests import read_class_list
    from ztune.evaluate import find_extractor
    from ztune.model import open_model

    out: Path = arguments.out
    if out.exists() and not arguments.force:
        raise ConfigError(f'"{out}" exists (use --force to replace it, or another --out)')
    model = open_model(
        arguments.bundle, resolve_execution(arguments.provider, arguments.threads, output), output
    )
    artifact = read_artifact(arguments.prompt)
    require_same_model(artifact, model.bundle.model_id, arguments.prompt, model.bundle.path)
    classes = read_class_list(arguments.classes) if arguments.classes else None
    artifact = model.refresh(artifact, classes)
    extractor = find_extractor(artifact, arguments.prompt)
    pack(model.bundle, artifact, out, resize=arguments.resize, extractor=extractor)
    size = model.bundle.image.size
    shape = "N, H, W, 3" if arguments.resize else f"N, {size}, {size}, 3"
    document: dict[str, Json] = {
        "classifier": str(out),
        "bytes": out.stat().st_size,
        "classes": list(artifact.classes),
        "input": f"pixels u8[{shape}]",
    }
    lines = [
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, {len(artifact.classes)} classes",
        f"  input pixels u8[{shape}]; outputs logits and probabilities, both "
        f"f32[N, {len(artifact.classes)}]"
        + ("" if inliers_of(artifact) is None else ", and inlier_score f32[N]"),
    ]
    output.result(document, lines)
