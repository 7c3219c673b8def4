"""A tuned method at its start, and what answers it: text tower, image tower, or both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtimes.runtime import TextEncoder
from runtimes.visual import (
    BorderPrompts,
    DecoderPrompts,
    DeployedPictures,
    PromptedPictures,
    TokenPrompts,
    VisualPrompts,
)
from ztune.access import LOGITS, TEXTS
from ztune.answers import TopClasses
from ztune.artifact import (
    Artifact,
    ContextArtifact,
    MixtureArtifact,
    Provenance,
    VisualArtifact,
)
from ztune.cli.pictures import Pictures, fingerprints
from ztune.compositions.base import TunedConfig
from ztune.data.split import Split
from ztune.errors import ZtuneError
from ztune.io.files import sha256
from ztune.loop import HeldOut
from ztune.mixing import mixed_texts
from ztune.model import Workbench
from ztune.objective import FewShotObjective, NumpyScores, cross_entropy, focal_loss
from ztune.remembered import RememberingEncoder
from ztune.statistics import Share
from ztune.types import (
    F32,
    F64,
    I64,
    Batch,
    Mixing,
    Mixture,
    Optimizer,
    PromptedImages,
    PromptEncoder,
    PromptMap,
    Prompts,
    Scorer,
)


@dataclass(frozen=True)
class Parts:
    """A tuned method at its start, and what answers it."""

    config: TunedConfig
    prompt_map: PromptMap
    optimizer: Optimizer
    texts: TextEncoder | F32
    """Encodes contexts; or the hand-written sentences' f32[C, e]."""
    remembered: RememberingEncoder | None
    """The encoder of a method whose result mixes the prompts that it has tried."""
    images: VisualPrompts | None
    """Encodes pictures under visual prompts."""
    objective: FewShotObjective
    held_out: HeldOut | None

    @property
    def encoder(self) -> TextEncoder | None:
        return None if isinstance(self.texts, np.ndarray) else self.texts

    def prompts(self, point: F64) -> Prompts:
        """Return what one point f64[dim] sends."""
        with np.errstate(over="ignore", invalid="ignore"):  # told in one line where it matters
            return self.prompt_map(point[None])


@dataclass(frozen=True)
class Assembly:
    """Puts the parts of one run together."""

    bench: Workbench
    split: Split
    pictures: Pictures
    config: TunedConfig
    templates: tuple[str, ...]
    extractor: str | None

    def parts(
        self, prompt_map: PromptMap, optimizer: Optimizer, text_features: F32 | None
    ) -> Parts:
        """Return the parts; `text_features` f32[C, e] are the hand-written sentences'."""
        config, pictures = self.config, self.pictures
        first = prompt_map(optimizer.ask().points[:1])
        texts: TextEncoder | F32
        if first.contexts is not None:
            n_context = first.contexts.shape[1]
            texts = self.bench.prompt_graph.encoder(
                self.split.classes, n_context, config.round_size
            )
        elif text_features is not None:
            texts = text_features
        else:
            raise ZtuneError("the method tunes no texts, and there are no sentences")
        images = None
        if config.program is not None:
            changeable = pictures.changeable
            n_extracted = 0 if changeable is None else changeable.extracted.shape[-1]
            images = open_program(self.bench, config.program, n_extracted)
        remembered = None
        if config.mixes and not isinstance(texts, np.ndarray):
            remembered = RememberingEncoder(texts)
        train = self._objective(remembered or texts, images, held_out=False)
        held_out = None
        if pictures.val_features is not None:
            val = self._objective(texts, images, held_out=True)
            held_out = HeldOut(val, len(pictures.val_labels))
        return Parts(config, prompt_map, optimizer, texts, remembered, images, train, held_out)

    def _objective(
        self, texts: PromptEncoder | F32, images: VisualPrompts | None, *, held_out: bool
    ) -> FewShotObjective:
        """Return the loss of the training pictures, or of those held out for validation."""
        pictures = self.pictures
        labels = pictures.val_labels if held_out else pictures.labels
        features: F32 | PromptedImages = pictures.features
        if images is not None:
            features = self._prompted(images, held_out)
        elif held_out and pictures.val_features is not None:
            features = pictures.val_features[None]
        return FewShotObjective(self._scorer(texts, features, labels), labels)

    def _prompted(self, images: VisualPrompts, held_out: bool) -> PromptedImages:
        changeable = self.pictures.val_changeable if held_out else self.pictures.changeable
        if changeable is None:
            raise ZtuneError("the method changes pictures, and their pixels were not kept")
        pixels, extracted = changeable.pixels, changeable.extracted
        if held_out and isinstance(images, DecoderPrompts):
            return DeployedPictures(images, pixels, extracted, self._tuned_on)
        return PromptedPictures(images, pixels, extracted)

    def _scorer(
        self, texts: PromptEncoder | F32, features: F32 | PromptedImages, labels: I64
    ) -> Scorer:
        """Return what computes losses: the host, or where the texts are if they alone change."""
        bundle, scorer = self.bench.bundle, None
        if isinstance(features, np.ndarray) and not isinstance(texts, np.ndarray):
            logits = LOGITS in self.config.needs
            scorer = self.bench.runtime.scorer(texts, features, labels, logits=logits)
        if scorer is None:
            scale, bias = bundle.logit_scale, bundle.logit_bias
            scorer = NumpyScores(texts, features, scale, bias, focal_loss(self.config.focal))
        k = self.config.top_classes
        return scorer if k is None else TopClasses(scorer, k)

    @property
    def _tuned_on(self) -> F32:
        """What a decoder sees of all training pictures and views, f32[V * N, k]."""
        if self.pictures.changeable is None:
            raise ZtuneError("the method changes pictures, and their pixels were not kept")
        extracted = self.pictures.changeable.extracted
        return extracted.reshape(-1, extracted.shape[-1])

    def result(self, parts: Parts, provenance: Provenance) -> Artifact:
        """Return what the method chooses by now."""
        optimizer = parts.optimizer
        if isinstance(optimizer, Mixing):
            return self._mixture(parts, optimizer.mixture(), provenance)
        return self.artifact(parts, optimizer.recommend(), provenance)

    def _mixture(self, parts: Parts, mixture: Mixture, provenance: Provenance) -> MixtureArtifact:
        bundle = self.bench.bundle
        encoder = parts.remembered
        contexts = parts.prompt_map(mixture.points).contexts
        if encoder is None or contexts is None:
            raise ZtuneError("a mixture is of contexts, and there are none")
        weights = mixture.weights.astype(np.float32)
        return MixtureArtifact(
            self.split.classes,
            provenance,
            mixture.points.astype(np.int32),
            weights,
            mixed_texts(encoder, contexts, weights, parts.config.round_size),
            bundle.logit_scale,
            bundle.logit_bias,
            parts.config.round_size,
            fingerprints(self.split),
        )

    def artifact(self, parts: Parts, point: F64, provenance: Provenance) -> Artifact:
        """Return what a point f64[dim] is worth keeping as."""
        bundle, classes, seen = self.bench.bundle, self.split.classes, fingerprints(self.split)
        prompts = parts.prompts(point)
        context = None if prompts.contexts is None else prompts.contexts[0]
        texts: F32 | None = None
        if isinstance(parts.texts, np.ndarray):
            texts = parts.texts
        elif TEXTS not in self.bench.runtime.withheld:
            texts = parts.texts.encode(np.asarray(prompts.contexts))[0]
        scale, bias = bundle.logit_scale, bundle.logit_bias
        if prompts.visual is None:
            if context is None:
                raise ZtuneError("the method tunes neither texts nor pictures")
            return ContextArtifact(classes, provenance, context, texts, scale, bias, seen)
        if texts is None:
            raise ZtuneError("a visual prompt stands beside text features, and there are none")
        statistics = None
        if isinstance(parts.images, DecoderPrompts):
            statistics = parts.images.statistics(prompts.visual[0], self._tuned_on)
        return VisualArtifact(
            classes,
            provenance,
            str(self.config.program),
            prompts.visual[0],
            texts,
            scale,
            bias,
            context,
            () if context is not None else self.templates,
            statistics,
            sha256(Path(self.extractor)) if self.extractor else "",
            seen,
        )

    def val_features(self, parts: Parts, artifact: Artifact) -> F32 | None:
        """Return unit features f32[n, e] of the validation pictures as the artifact changes them.

        None without such pictures.
        """
        changeable, images = self.pictures.val_changeable, parts.images
        if not isinstance(artifact, VisualArtifact) or changeable is None or images is None:
            return self.pictures.val_features
        if isinstance(images, DecoderPrompts) and artifact.statistics is not None:
            images = images.fixed(artifact.statistics)
        visual = artifact.visual[None]
        return images.encode(visual, changeable.pixels[0], changeable.extracted[0])[0]

    def val_share(self, parts: Parts) -> Share | None:
        """Return how many validation pictures are right by the runtime's own count."""
        if parts.held_out is None:
            return None
        held_out = parts.held_out
        prompts = parts.prompts(parts.optimizer.recommend())
        accuracy = held_out.oracle(prompts, held_out.batch).accuracies[0]
        n = held_out.n_pictures
        return Share(round(float(accuracy) * n), n)

    def train_loss(self, parts: Parts, result: Artifact) -> float:
        """Return the loss over all training pictures and views: a final report, free of charge."""
        if isinstance(result, MixtureArtifact):
            classifier = result.classifier()
            views = [classifier.logits(view) for view in self.pictures.features]
            labels = self.pictures.labels
            return float(np.mean([cross_entropy(view, labels) for view in views]))
        return self._point_loss(parts, parts.optimizer.recommend())

    def _point_loss(self, parts: Parts, point: F64) -> float:
        n_views, n = self.pictures.features.shape[:2]
        every = np.arange(n, dtype=np.int64)
        prompts = parts.prompts(point)
        losses = [
            parts.objective(prompts, Batch(every, np.full(n, view, dtype=np.int64), 0)).losses[0]
            for view in range(n_views)
        ]
        return float(np.mean(losses))


def open_program(
    bench: Workbench, program: str, n_extracted: int, statistics: F32 | None = None
) -> VisualPrompts:
    """Open the image tower under border, decoder or tokens.

    `n_extracted` is k of the features f32[N, k] that a decoder sees; `statistics` f32[2, n] fixes
    its normalisation.
    """
    bundle, execution = bench.bundle, bench.execution
    if program == "border":
        return BorderPrompts(bundle, execution)
    if program == "decoder":
        return DecoderPrompts(bundle, execution, n_extracted, statistics)
    return TokenPrompts(bundle, execution)
