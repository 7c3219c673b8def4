"""A run's training and validation images: features, and pixels for methods that change images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ztune.data.features import CENTRE, Features, Views, read_view
from ztune.data.manifests import SplitName
from ztune.data.split import Split
from ztune.errors import ZtuneError
from ztune.heads import Shots
from ztune.model import Model
from ztune.run import RunStore
from ztune.run_config import RunConfig
from ztune.types import F32, I64, U8


@dataclass(frozen=True)
class Changeable:
    """Images that are re-encoded under visual prompts."""

    pixels: U8
    """u8[V, N, S, S, 3], on disk."""
    extracted: F32
    """f32[V, N, k]: a decoder's input features."""


@dataclass(frozen=True)
class EncodedSplit:
    """Encoded training and validation images, never test images."""

    features: F32
    """f32[V, N, e], the training images and their views."""
    labels: I64
    """i64[N]"""
    val_features: F32 | None
    """f32[n, e], None without validation images."""
    val_labels: I64
    n_encoded: int
    n_cached: int
    broken: tuple[str, ...]
    """Paths of unreadable images, relative to their root."""
    changeable: Changeable | None = None
    """The training images' pixels, if the method changes images."""
    val_changeable: Changeable | None = None
    conversions: Mapping[str, int] = field(default_factory=dict)
    """How many images each rule changed (runtimes.conversions)."""

    def shots(self, text_features: F32, logit_scale: float, logit_bias: float) -> Shots:
        """Return a head's input; `text_features` f32[C, e] are the templates'."""
        n_views = len(self.features)
        features = self.features.reshape(-1, self.features.shape[-1])
        held_out = None
        if self.val_features is not None:
            held_out = self.val_features, self.val_labels
        labels = np.tile(self.labels, n_views)
        return Shots(features, labels, text_features, logit_scale, logit_bias, held_out, n_views)

    def costs(self, seconds: float) -> dict[str, Any]:
        """Return the image pass's cost; a resumed run keeps its first full pass's."""
        return {
            "image_forwards": self.n_encoded,
            "image_forwards_cached": self.n_cached,
            "conversions": self.conversions,
            "image_seconds": round(seconds, 3),
        }


@dataclass(frozen=True)
class SplitEncoder:
    """Encodes the images of one split for one run."""

    run_config: RunConfig
    split: Split
    folder: RunStore
    model: Model

    def training(self) -> tuple[Features, I64]:
        """Return the training images' features, and the labels i64[N] of readable ones.

        Raises: ZtuneError for a class without readable images.
        """
        train = self._encoded("train", "training images", self.run_config.views)
        labels = self.split.labels("train")[train.kept]
        missing = sorted(set(range(len(self.split.classes))) - set(labels.tolist()))
        if missing:
            name = self.split.classes[missing[0]]
            raise ZtuneError(f'class "{name}" has no readable image')
        return train, labels

    def encode(self, *, changeable: bool) -> EncodedSplit:
        """Encode training and validation images; with `changeable` keep the pixels too."""
        views = self.run_config.views
        train, labels = self.training()
        n_wanted, n_encoded = len(views) * len(labels), train.n_encoded
        conversions = Counter(train.conversions)
        broken = self._broken("train", train)
        val, val_labels = None, self.split.labels("val")
        if len(val_labels):
            val = self._encoded("val", "validation images", CENTRE)
            val_labels = val_labels[val.kept]
            n_wanted, n_encoded = n_wanted + len(val_labels), n_encoded + val.n_encoded
            conversions.update(val.conversions)
            broken += self._broken("val", val)
        parts: list[Changeable | None] = [None, None]
        if changeable:
            parts[0], n_more = self._changeable("train", train, views)
            n_encoded, n_wanted = n_encoded + n_more[0], n_wanted + n_more[1]
            if val is not None:
                parts[1], n_more = self._changeable("val", val, CENTRE)
                n_encoded, n_wanted = n_encoded + n_more[0], n_wanted + n_more[1]
        return EncodedSplit(
            train.values,
            labels,
            val.values[0] if val is not None else None,
            val_labels,
            n_encoded,
            n_wanted - n_encoded,
            broken,
            changeable=parts[0],
            val_changeable=parts[1],
            conversions=dict(conversions),
        )

    def _broken(self, role: SplitName, found: Features) -> tuple[str, ...]:
        """Return the paths of a role's unreadable images."""
        entries = zip(self.split.entries_of(role), found.kept, strict=True)
        return tuple(entry.path for entry, keep in entries if not keep)

    def _encoded(
        self, role: SplitName, what: str, views: Views, extractor: Path | None = None
    ) -> Features:
        return self.model.features(
            self.split.items(role),
            self.folder.cache(self.run_config.cache),
            what=what,
            views=views,
            skip_broken=self.run_config.skip_broken,
            extractor=extractor,
        )

    def _changeable(
        self, role: SplitName, encoded: Features, views: Views
    ) -> tuple[Changeable, tuple[int, int]]:
        """Return a role's changeable images, and how many were encoded of how many requested."""
        extracted, n_more = encoded.values, (0, 0)
        if self.run_config.extractor is not None:
            found = self._encoded(
                role, "images for the extractor", views, self.run_config.extractor
            )
            extracted = found.values
            n_more = found.n_encoded, extracted.shape[0] * extracted.shape[1]
        items = self.split.items(role)
        kept = [item for item, keep in zip(items, encoded.kept, strict=True) if keep]
        return Changeable(self._pixels(kept, views), extracted), n_more

    def _pixels(self, items: Sequence[tuple[Path, str]], views: Views) -> U8:
        """Return u8[V, N, S, S, 3]."""
        encoder = self.model.images()
        side = self.model.bundle.image.size
        shape = (len(views), len(items), side, side, 3)
        pixels = self.folder.pixels(shape)
        for number, (path, digest) in enumerate(items):
            for view in range(shape[0]):
                pixels[view, number] = read_view(encoder, path, digest, view, views)
        return pixels


def fingerprints(split: Split) -> Any:
    """Return the fingerprints u64[n] of the training and validation images, sorted."""
    entries = [*split.entries_of("train"), *split.entries_of("val")]
    return np.array(sorted(int(entry.sha256[:16], 16) for entry in entries), dtype=np.uint64)
