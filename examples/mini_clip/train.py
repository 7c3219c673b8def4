"""Contrastive training in which every matching caption of an image is a positive."""

import math
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.model import CLIP
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from examples.mini_clip.captions import NAMES, SUBJECT, Rows, compatible, describe
from examples.mini_clip.images import SIZE, draw
from examples.mini_clip.tokens import CONTEXT_LENGTH, encode

MEAN, STD = 0.5, 0.25  # of pixels in [0, 1], every channel
_MAX_LOGIT_SCALE: Final = math.log(100)
_TRAINING, _HELD_OUT = 0, 1  # the two streams of images


@dataclass(frozen=True)
class Settings:
    """How the default model is trained."""

    steps: int = 3000
    batch: int = 64
    seed: int = 0
    workers: int = 2
    learning_rate: float = 1.5e-3
    warmup_steps: int = 200
    weight_decay: float = 0.05


class Batch(NamedTuple):
    """Images u8[B, 24, 24, 3], attributes i64[B, A], texts, and their named values i64[B, A]."""

    pixels: NDArray[np.uint8]
    shown: Rows
    texts: list[str]
    named: Rows


class Batches(Dataset[Batch]):
    """Batches of a stream; batch ``i`` depends only on seed, stream and ``i``."""

    def __init__(self, seed: int, stream: int, n: int, batch: int) -> None:
        self._seed, self._stream, self._n, self._batch = seed, stream, n, batch

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng((self._seed, self._stream, index))
        pixels, shown = draw(self._batch, rng)
        captions = [describe(image, rng) for image in shown]
        texts = [caption.text for caption in captions]
        return Batch(pixels, shown, texts, np.stack([caption.named for caption in captions]))


def model_config(vocabulary: int) -> dict[str, Any]:
    """Return the model's ``model_cfg`` for open_clip."""
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": SIZE, "patch_size": 4, "width": 128, "layers": 4, "head_width": 32,
        },
        "text_cfg": {
            "context_length": CONTEXT_LENGTH, "vocab_size": vocabulary, "width": 64, "heads": 4,
            "layers": 3,
        },
    }  # fmt: skip


def normalise(pixels: NDArray[np.uint8]) -> Tensor:
    """Normalise pixels u8[B, 24, 24, 3] to the model's input f32[B, 3, 24, 24]."""
    return ((torch.from_numpy(pixels).float() / 255 - MEAN) / STD).permute(0, 3, 1, 2)


def contrastive_loss(logits: Tensor, fits: Tensor) -> Tensor:
    """Return the symmetric cross-entropy in nats, with targets uniform over all matches.

    logits f32[N, C] are of images against captions, fits bool[N, C] marks matching captions.
    """
    total = torch.zeros(())
    for scores, right in ((logits, fits), (logits.T, fits.T)):
        target = right / right.sum(dim=1, keepdim=True)
        total = total - (target * functional.log_softmax(scores, dim=1)).sum(dim=1).mean()
    return total / 2


def train(tokenizer: Tokenizer, settings: Settings) -> tuple[CLIP, list[float]]:
    """Train from scratch for a fixed number of steps; return the model and each step's loss."""
    torch.manual_seed(settings.seed)
    model = CLIP(**model_config(tokenizer.get_vocab_size()))
    # As large as the patch embeddings: with open_clip's 0.09 the tower learns positions slowly.
    torch.nn.init.normal_(model.visual.positional_embedding, std=1.0)
    # An auxiliary linear head that classifies the subject, dropped afterwards: with captions alone
    # the model learns colours first and shapes late.
    head = torch.nn.Linear(model.visual.output_dim, sum(map(len, NAMES)))
    values = [*model.parameters(), *head.parameters()]
    matrices = [p for p in values if p.ndim > 1]
    others = [p for p in values if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, settings=settings))
    batches = Batches(settings.seed, _TRAINING, settings.steps, settings.batch)
    losses: list[float] = []
    head_losses: list[float] = []
    for batch in DataLoader(
        batches, batch_size=None, num_workers=settings.workers, collate_fn=_as_drawn
    ):
        fits = torch.from_numpy(compatible(batch.named, batch.shown))
        images = model.encode_image(normalise(batch.pixels))
        loss = contrastive_loss(_logits(model, tokenizer, images, batch.texts), fits)
        subjects = functional.cross_entropy(head(images), torch.from_numpy(batch.shown[:, SUBJECT]))
        optimizer.zero_grad()
        (loss + subjects).backward()
        torch.nn.utils.clip_grad_norm_(values, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=_MAX_LOGIT_SCALE)
        losses.append(loss.item())
        head_losses.append(subjects.item())
        if len(losses) % 100 == 0:
            recent = f"loss {np.mean(losses[-100:]):.3f}, head {np.mean(head_losses[-100:]):.3f}"
            sys.stderr.write(f"step {len(losses)} of {settings.steps}: {recent}\n")
    return model.eval(), losses


@torch.inference_mode()
def evaluate(model: CLIP, tokenizer: Tokenizer, seed: int, n_batches: int = 8) -> dict[str, float]:
    """Return the loss and accuracies on held-out images.

    ``retrieval_accuracy``: the best of 256 captions matches; ``naming_accuracy``: the best of the
    names of all subjects is the subject's.
    """
    names = torch.from_numpy(encode(tokenizer, [f"{name}." for kind in NAMES for name in kind]))
    named = model.encode_text(names, normalize=True)
    losses, right, name_right = [], [], []
    for batch in (Batches(seed, _HELD_OUT, n_batches, 256)[i] for i in range(n_batches)):
        fits = torch.from_numpy(compatible(batch.named, batch.shown))
        images = model.encode_image(normalise(batch.pixels))
        logits = _logits(model, tokenizer, images, batch.texts)
        losses.append(contrastive_loss(logits, fits).item())
        right.append(fits[torch.arange(256), logits.argmax(dim=1)].double().mean().item())
        best_names = (images @ named.T).argmax(dim=1)
        name_right.append(np.mean(best_names.numpy() == batch.shown[:, SUBJECT]))
    return {
        "loss": float(np.mean(losses)),
        "retrieval_accuracy": float(np.mean(right)),
        "naming_accuracy": float(np.mean(name_right)),
    }


def _logits(model: CLIP, tokenizer: Tokenizer, images: Tensor, texts: list[str]) -> Tensor:
    """Return logits f32[N, C] of image features f32[N, e], of any length, against texts."""
    features = model.encode_text(torch.from_numpy(encode(tokenizer, texts)), normalize=True)
    logits: Tensor = model.logit_scale.exp() * functional.normalize(images, dim=-1) @ features.T
    return logits


def _as_drawn(batch: Batch) -> Batch:
    """Keep the loader from turning arrays into tensors."""
    return batch


def _rate(step: int, settings: Settings) -> float:
    """Return the factor of the learning rate: linear warm-up, then cosine decay."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
