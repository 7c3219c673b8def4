"""`ztune export`: export a bundle (the only verb that needs torch), or copy its client half."""

from __future__ import annotations

import argparse
from pathlib import Path

from ztune.cli.output import Output
from ztune.errors import ConfigError

USAGE = (
    "--model NAME --out BUNDLE [options]",
    "--client BUNDLE --out BUNDLE",
    "--list [WORD]",
)
EXAMPLE = """\
  ztune export --model ViT-B-32 --pretrained laion2b_s34b_b79k --out bundles/vit-b-32
  ztune export --model ViT-B-32 --pretrained ./my.pt --preprocess-from openai --out bundles/mine
  ztune export --model local-dir:./checkpoint --tokenizer ./tokenizer.json --out bundles/own
  ztune export --client bundles/vit-b-32 --out vit-b-32-client"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for option, kind, metavar, what in (
        ("--model", str, "NAME|FOLDER|hf-hub:ID", "open_clip or transformers model"),
        ("--pretrained", str, "TAG|FILE", "pretrained tag or checkpoint"),
        ("--tokenizer", Path, "FILE", "tokenizer.json (Hugging Face tokenizers)"),
        ("--pad-id", int, "N", "padding token, if not defined"),
        ("--preprocess-from", str, "TAG|JSON", "preprocessing of a checkpoint (mean, resizing)"),
        ("--adapter", Path, "FOLDER", "LoRA adapter to merge"),
        ("--random-weights", int, "SEED", "random weights (tests)"),
        ("--licence", str, "TEXT", "licence of the weights, for the manifest (unknown)"),
        ("--precision", str, "NAME", "fp32 (default), fp16 (for GPUs) or int8 (for CPUs)"),
        ("--store", str, "NAME", "fp16: store weights in half precision"),
        ("--client", Path, "BUNDLE", "copy the part of this bundle that a server's client needs"),
        ("--out", Path, "BUNDLE", "a new folder"),
    ):
        parser.add_argument(option, type=kind, metavar=metavar, help=what)
    for option, what in (
        ("--ema", "take the EMA weights of a checkpoint file"),
        ("--interpolate-positions", "resize position embeddings of a checkpoint file"),
        ("--image-tokens", "add the image graph for visual prompts (open_clip ViTs, fp32)"),
    ):
        parser.add_argument(option, action="store_true", help=what)
    listing = "list open_clip's models and tags, or those with a word in them"
    parser.add_argument("--list", nargs="?", const="", metavar="WORD", help=listing)


def run(arguments: argparse.Namespace, output: Output) -> None:
    if arguments.list is not None:
        _list_models(arguments, output)
        return
    if arguments.out is None:
        raise ConfigError("--out BUNDLE is required: a new folder")
    if arguments.client is not None:
        _export_client_half(arguments, output)
        return
    if arguments.model is None:
        raise ConfigError("--model NAME or --client BUNDLE is required")
    from ztune.exporting import export, summary

    bundle = export(
        arguments.model,
        arguments.out,
        pretrained=arguments.pretrained,
        precision=arguments.precision or "fp32",
        store=arguments.store or "fp32",
        image_tokens=arguments.image_tokens,
        preprocess_from=arguments.preprocess_from,
        tokenizer=arguments.tokenizer,
        pad_id=arguments.pad_id,
        random_weights=arguments.random_weights,
        licence=arguments.licence or "unknown",
        ema=arguments.ema,
        interpolate_positions=arguments.interpolate_positions,
        adapter=arguments.adapter,
        progress=output,
    )
    output.result(dict(bundle.manifest), summary(bundle))


def _list_models(arguments: argparse.Namespace, output: Output) -> None:
    from ztune.exporting import list_models

    others = [option for name, option in arguments.given.items() if name != "list"]
    if others:
        raise ConfigError(f"--list only lists models (leave out {', '.join(others)})")
    found = list_models(arguments.list)
    width = max(len(name) for name in found)
    lines = [f"{name:{width}}  {', '.join(tags) or '-'}" for name, tags in found.items()]
    output.result({"models": {name: [*tags] for name, tags in found.items()}}, lines)


def _export_client_half(arguments: argparse.Namespace, output: Output) -> None:
    from export.client import export_client
    from runtimes.bundle import load_bundle

    kept = ("client", "out")
    of_model = [option for name, option in arguments.given.items() if name not in kept]
    if of_model:
        raise ConfigError(f"--client copies an existing bundle (leave out {', '.join(of_model)})")
    half = export_client(load_bundle(arguments.client), arguments.out)
    size = sum((half.path / name).stat().st_size for name in half.client_files)
    lines = [
        f"{half.path}: {size / 1e6:.1f} MB, client half of bundle {half.digest[:12]}…",
        "Use it with --client to tune against a server.",
    ]
    output.result(dict(half.manifest), lines)
