"""The papers' published loops in torch: one candidate at a time, whole sequences.

    python -m benchmarks.torch_loops backprop --classes 10

As a command it tunes a context for a few steps in its own process, to measure its peak memory: with
backpropagation (CoOp: SGD on the context), or with forward passes only (ZIP's 10 candidates per
step, one by one). Image features are precomputed, as in `ztune tune`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.measure import seconds
from benchmarks.names import classes_named
from benchmarks.towers import Size, load_random
from export.loaded import LoadedClip
from runtimes.prompts import placeholder_id
from runtimes.tokenizer import Tokenizer

BATCH = 128
"""Published batch size."""


class TorchPrompts:
    """open_clip's text forward over all 77 tokens of each class."""

    def __init__(self, loaded: LoadedClip, classes: Sequence[str], n_context: int):
        self._loaded = loaded
        spec = loaded.text
        tokenizer = Tokenizer.from_json(loaded.tokenizer_json, spec)
        gap = [placeholder_id(spec)] * n_context
        self._tokens = torch.tensor(
            tokenizer.pad(
                [
                    (*spec.prefix_ids, *gap, *tokenizer.encode(f"{name}."), *spec.suffix_ids)
                    for name in classes
                ]
            )
        )
        with torch.no_grad():
            embedded = loaded.tower.embedding(self._tokens)
        first = len(spec.prefix_ids)
        self._before = embedded[:, :first]
        self._after = embedded[:, first + n_context :]

    def __call__(self, context: Tensor) -> Tensor:
        """Return unit features f32[C, e] of a context f32[m, d]."""
        model: Any = self._loaded.model
        middle = context.expand(len(self._before), -1, -1)
        embedded = torch.cat([self._before, middle, self._after], 1)
        hook = self._loaded.tower.embedding.register_forward_hook(lambda *_: embedded)
        try:
            features: Tensor = model.encode_text(self._tokens, normalize=True)
        finally:
            hook.remove()
        return features


class PublishedLoop:
    """One query of the published code: both towers, nothing cached between queries."""

    def __init__(self, loaded: LoadedClip, n_images: int = BATCH):
        self._loaded = loaded
        size = loaded.image.size
        self._pixels = torch.randn(n_images, 3, size, size)

    def image_seconds(self) -> float:
        """Return the seconds of one query's image tower, scaled to 128 images."""
        model: Any = self._loaded.model
        with torch.no_grad():
            taken = seconds(lambda: model.encode_image(self._pixels, normalize=True))
        return taken * BATCH / len(self._pixels)

    def text_seconds(self, classes: Sequence[str], n_context: int, at_most: int) -> float:
        """Return the seconds of one query's text tower, timed on `at_most` classes and scaled."""
        some = classes[:at_most]
        prompts = TorchPrompts(self._loaded, some, n_context)
        context = 0.02 * torch.randn(n_context, self._loaded.text.width)
        with torch.no_grad():
            taken = seconds(lambda: prompts(context))
        return taken * len(classes) / len(some)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("loop", choices=("backprop", "forward", "published"))
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--context", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args()
    # Only the published loop needs the image tower; cached features do not.
    published = arguments.loop == "published"
    loaded = load_random(Size(arguments.model), without_images=not published)
    prompts = TorchPrompts(loaded, classes_named(arguments.classes), arguments.context)
    torch.manual_seed(0)
    context = 0.02 * torch.randn(arguments.context, loaded.text.width)
    with torch.no_grad():
        images = functional.normalize(torch.randn(BATCH, prompts(context).shape[1]), dim=-1)
    labels = torch.randint(arguments.classes, (BATCH,))
    model: Any = loaded.model
    # One query with images is enough, since it is slow and its peak is that of any other.
    n_candidates = 1 if arguments.loop != "forward" else 10

    def loss(candidate: Tensor) -> Tensor:
        logits = 100 * images @ prompts(candidate).T
        return functional.cross_entropy(logits, labels)

    def backprop() -> None:
        context.requires_grad_(True)
        optimizer = torch.optim.SGD([context], lr=0.002)
        optimizer.zero_grad()
        loss(context).backward()
        optimizer.step()

    def forward() -> None:
        with torch.no_grad():
            for _ in range(n_candidates):
                if published:
                    size = loaded.image.size
                    model.encode_image(torch.randn(BATCH, 3, size, size), normalize=True)
                loss(context + 0.01 * torch.randn(context.shape))

    step = backprop if arguments.loop == "backprop" else forward
    taken = min(seconds(step) for _ in range(arguments.steps))
    print(json.dumps({"step_seconds": taken, "candidates": n_candidates}))


if __name__ == "__main__":
    main()
