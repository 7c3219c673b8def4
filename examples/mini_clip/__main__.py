"""Train the embedded default model: ``python -m examples.mini_clip --out DIR``."""

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from open_clip.model import CLIP
from safetensors.torch import save_file
from tokenizers import Tokenizer

from examples.mini_clip.images import SIZE
from examples.mini_clip.tokens import build_tokenizer
from examples.mini_clip.train import MEAN, STD, Settings, evaluate, model_config, train

_PACKAGES = ("torch", "open_clip_torch", "tokenizers", "numpy", "pillow", "matplotlib")


def main(arguments: list[str] | None = None) -> None:
    """Train, evaluate on held-out images, write the checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m examples.mini_clip", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--workers", type=int, default=Settings.workers, help="drawing processes")
    given = parser.parse_args(arguments)
    settings = Settings(steps=given.steps, seed=given.seed, workers=given.workers)
    began = time.perf_counter()
    tokenizer = build_tokenizer()
    model, losses = train(tokenizer, settings)
    figures = {
        "training_loss": sum(losses[-100:]) / len(losses[-100:]),
        "held_out": evaluate(model, tokenizer, settings.seed),
        "logit_scale": model.logit_scale.exp().item(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "images": settings.steps * settings.batch,
        "seconds": round(time.perf_counter() - began),
        "settings": asdict(settings),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in _PACKAGES},
    }
    save(given.out, model, tokenizer, figures)
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


def save(folder: Path, model: CLIP, tokenizer: Tokenizer, figures: dict[str, Any]) -> None:
    """Write an open_clip ``local-dir:`` folder, with the tokenizer and the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"size": SIZE, "mode": "RGB", "mean": [MEAN] * 3, "std": [STD] * 3}
    preprocess |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    config = {
        "model_cfg": model_config(tokenizer.get_vocab_size()),
        "preprocess_cfg": preprocess,
    }
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    _write(folder / "open_clip_config.json", json.dumps(config, indent=2) + "\n")
    _write(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    _write(folder / "figures.json", json.dumps(figures, indent=2) + "\n")
    part = folder / "open_clip_model.safetensors.part"
    save_file(weights, part)
    part.replace(folder / "open_clip_model.safetensors")


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    main()
