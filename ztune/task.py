"""A few-shot task: a method's map and optimizer, and the oracle on a split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtimes.ort import OrtPromptEncoder
from runtimes.runtime import TextEncoder
from runtimes.visual import (
    BorderPrompts,
    DecoderPrompts,
    DeployedImages,
    PromptedViews,
    TokenPrompts,
    VisualPrompts,
)
from ztune.artifact import (
    Artifact,
    ContextArtifact,
    EnsembleArtifact,
    MixtureArtifact,
    Provenance,
    VisualArtifact,
)
from ztune.capabilities import LOGITS, TEXTS
from ztune.data.split import Split
from ztune.encoded import Changeable, EncodedSplit, fingerprints
from ztune.ensemble import LabelledFeatures, Prior, fit_ensemble
from ztune.errors import ZtuneError
from ztune.io.files import sha256
from ztune.loop import HeldOut
from ztune.methods.base import TunedConfig, build_method
from ztune.mixing import mix_text_features
from ztune.model import Model
from ztune.objective import FewShotObjective, NumpyScores, cross_entropy, focal_loss
from ztune.optim.validation import EarlyStop, Validated
from ztune.run_config import RunConfig
from ztune.statistics import Proportion
from ztune.system import one_blas_thread
from ztune.text_cache import CachedTextEncoder, StoredTextEncoder, TextStore
from ztune.top_classes import TopClasses
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
class MethodStart:
    """A tuned method's map and optimizer before the first query, made once per run."""

    prompt_map: PromptMap
    optimizer: Optimizer
    first: Prompts
    """The prompts of the first point, which show the context length."""

    @property
    def n_context(self) -> int | None:
        """Tokens of a context; None if no text is tuned."""
        return None if self.first.contexts is None else int(self.first.contexts.shape[1])


def compose(
    run_config: RunConfig, config: TunedConfig, model: Model, n_extracted: int, n_images: int
) -> MethodStart:
    """Return a method's map and optimizer at their start, with validation and early stopping.

    `n_extracted` is the size of a decoder's input features, `n_images` the training images.

    Raises: ConfigError for a budget of less than the minimum with so many images.
    """
    run_config.check_budget(n_images)
    with one_blas_thread():
        spec = model.spec(n_extracted, n_images)
        prompt_map, optimizer = build_method(config, spec, run_config.queries, run_config.seed)
        if run_config.validates:
            every = run_config.queries_between_validations
            optimizer = Validated(optimizer, every, run_config.keep)
            if run_config.patience is not None:
                optimizer = EarlyStop(optimizer, run_config.patience)
        return MethodStart(prompt_map, optimizer, prompt_map(optimizer.ask().points[:1]))


@dataclass(frozen=True)
class Result:
    """A method's result, and its logits of images that it was not fitted to, if it has any."""

    artifact: Artifact
    held_out: tuple[F32, I64] | None = None
    """Out-of-fold logits f32[h, C] of training images, and their labels."""


@dataclass(frozen=True)
class FewShotTask:
    """A tuned method at its start, and its oracle on the images of one split."""

    model: Model
    split: Split
    encoded: EncodedSplit
    config: TunedConfig
    start: MethodStart
    templates: tuple[str, ...]
    extractor: Path | None
    texts: TextEncoder | F32
    """The encoder of contexts, or the templates' features f32[C, e]."""
    template_features: F32 | None
    """f32[C, e]; None if the runtime returns no text features."""
    remembered: CachedTextEncoder | None
    """The caching encoder of a method whose result is a mixture."""
    stored: StoredTextEncoder | None
    """Its encoder, if text features are kept on disk."""
    images: VisualPrompts | None
    """Encodes images under visual prompts."""
    objective: FewShotObjective
    held_out: HeldOut | None

    @property
    def prompt_map(self) -> PromptMap:
        return self.start.prompt_map

    @property
    def optimizer(self) -> Optimizer:
        return self.start.optimizer

    @property
    def encoder(self) -> TextEncoder | None:
        return None if isinstance(self.texts, np.ndarray) else self.texts

    def take_n_found(self) -> int:
        """Return the class prompts found on disk since the last time it was asked."""
        return 0 if self.stored is None else self.stored.take_n_found()

    def prompts(self, point: F64) -> Prompts:
        """Return the prompts of one point f64[dim]."""
        with np.errstate(over="ignore", invalid="ignore"):  # reported in one line where it matters
            return self.prompt_map(point[None])

    def result(self, provenance: Provenance, fitted_on: I64) -> Result:
        """Return the method's current recommendation.

        `fitted_on` i64[n] are the images of the last batch, on which a mixture was fitted.
        """
        optimizer = self.optimizer
        if not isinstance(optimizer, Mixing):
            return Result(self._artifact(optimizer.recommend(), provenance))
        if self.config.ensembles:
            return self._ensemble(optimizer, provenance, fitted_on)
        mixture = optimizer.mixture()
        texts = self._mixed(mixture, mixture.weights)
        held_out = optimizer.held_out_logits()
        return Result(self._mixture(mixture, texts, provenance), held_out)

    def _ensemble(self, optimizer: Mixing, provenance: Provenance, fitted_on: I64) -> Result:
        mixture, held_out = optimizer.mixture(), optimizer.held_out()
        encoded, templates = self.encoded, self.template_features
        if templates is None:
            raise ZtuneError("an ensemble needs text features, and there are none")
        folds = np.full(len(encoded.labels), -1, dtype=np.int64)
        without = np.zeros((0, len(mixture.weights)))
        if held_out is not None:
            folds[fitted_on], without = held_out.folds, held_out.weights
        texts = self._mixed(mixture, np.concatenate([mixture.weights[None], without]))
        wide, hand_written = texts.astype(np.float64), templates.astype(np.float64)
        priors = [
            Prior("zero-shot", hand_written, np.broadcast_to(hand_written, wide[1:].shape)),
            Prior("prompts", wide[0], wide[1:]),
        ]
        images = LabelledFeatures(encoded.features[0], encoded.labels, folds, len(templates))
        found = fit_ensemble(images, priors, self.model.bundle.logit_scale)
        calibrated = len(found.labels) > 0
        artifact = EnsembleArtifact(
            self.split.classes,
            provenance,
            found.classifier,
            self._mixture(mixture, texts[0], provenance),
            self.templates,
            found.chosen,
            fingerprints(self.split),
            temperature=1.0 if calibrated else None,
        )
        return Result(artifact, (found.logits, found.labels) if calibrated else None)

    def _mixed(self, mixture: Mixture, weights: F64) -> F32:
        """Return the text features f32[..., C, e] of a mixture with weights f64[..., K]."""
        contexts = self.prompt_map(mixture.points).contexts
        if self.remembered is None or contexts is None:
            raise ZtuneError("a mixture needs a method that tunes contexts")
        at_once = self.config.round_size
        return mix_text_features(self.remembered, contexts, weights.astype(np.float32), at_once)

    def _mixture(
        self, mixture: Mixture, text_features: F32, provenance: Provenance
    ) -> MixtureArtifact:
        bundle = self.model.bundle
        return MixtureArtifact(
            self.split.classes,
            provenance,
            mixture.points.astype(np.int32),
            mixture.weights.astype(np.float32),
            text_features,
            bundle.logit_scale,
            bundle.logit_bias,
            self.config.round_size,
            fingerprints(self.split),
        )

    def _artifact(self, point: F64, provenance: Provenance) -> Artifact:
        """Return the artifact of a point f64[dim]."""
        bundle, classes, seen = self.model.bundle, self.split.classes, fingerprints(self.split)
        prompts = self.prompts(point)
        context = None if prompts.contexts is None else prompts.contexts[0]
        texts: F32 | None = None
        if isinstance(self.texts, np.ndarray):
            texts = self.texts
        elif TEXTS not in self.model.runtime.missing:
            texts = self.texts.encode(np.asarray(prompts.contexts))[0]
        scale, bias = bundle.logit_scale, bundle.logit_bias
        if prompts.visual is None:
            if context is None:
                raise ZtuneError("the method tunes neither texts nor images")
            return ContextArtifact(classes, provenance, context, texts, scale, bias, seen)
        if texts is None:
            raise ZtuneError("a visual prompt needs text features, and there are none")
        statistics = None
        if isinstance(self.images, DecoderPrompts):
            statistics = self.images.statistics(prompts.visual[0], _tuned_on(self.encoded))
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
            "" if self.extractor is None else sha256(self.extractor),
            seen,
        )

    def val_features(self, artifact: Artifact) -> F32 | None:
        """Return unit features f32[n, e] of the validation images under the artifact.

        None without validation images.
        """
        changeable, images = self.encoded.val_changeable, self.images
        if not isinstance(artifact, VisualArtifact) or changeable is None or images is None:
            return self.encoded.val_features
        if isinstance(images, DecoderPrompts) and artifact.statistics is not None:
            images = images.with_statistics(artifact.statistics)
        visual = artifact.visual[None]
        return images.encode(visual, changeable.pixels[0], changeable.extracted[0])[0]

    def val_share(self) -> Proportion | None:
        """Return the validation accuracy as computed by the runtime."""
        if self.held_out is None:
            return None
        held_out = self.held_out
        prompts = self.prompts(self.optimizer.recommend())
        accuracy = held_out.oracle(prompts, held_out.batch).accuracies[0]
        n = held_out.n_images
        return Proportion(round(float(accuracy) * n), n)

    def train_loss(self, result: Artifact) -> float:
        """Return the loss over all training images and views, as a final report (not charged)."""
        if isinstance(result, MixtureArtifact | EnsembleArtifact):
            classifier = result.classifier()
            views = [classifier.logits(view) for view in self.encoded.features]
            labels = self.encoded.labels
            return float(np.mean([cross_entropy(view, labels) for view in views]))
        return self._point_loss(self.optimizer.recommend())

    def _point_loss(self, point: F64) -> float:
        n_views, n = self.encoded.features.shape[:2]
        every = np.arange(n, dtype=np.int64)
        prompts = self.prompts(point)
        losses = [
            self.objective(prompts, Batch(every, np.full(n, view, dtype=np.int64), 0)).losses[0]
            for view in range(n_views)
        ]
        return float(np.mean(losses))


def open_task(
    run_config: RunConfig,
    split: Split,
    encoded: EncodedSplit,
    model: Model,
    config: TunedConfig,
    start: MethodStart,
    text_features: F32 | None,
    store: TextStore | None = None,
) -> FewShotTask:
    """Open a method's task on a split.

    `text_features` f32[C, e] are those of the templates. A mixture's prompts are kept in `store`.

    Raises: ZtuneError without text features for a method that tunes no text; ProviderError,
        ServerError.
    """
    texts: TextEncoder | F32
    if start.n_context is not None:
        texts = model.prompt_graph.encoder(split.classes, start.n_context, config.round_size)
    elif text_features is not None:
        texts = text_features
    else:
        raise ZtuneError("a method that tunes no text needs templates, and there are none")
    images = None
    if config.program is not None:
        changeable = encoded.changeable
        n_extracted = 0 if changeable is None else changeable.extracted.shape[-1]
        images = open_program(model, config.program, n_extracted)
    remembered, stored = None, None
    if config.mixes and not isinstance(texts, np.ndarray):
        if store is not None and isinstance(texts, OrtPromptEncoder):
            stored = StoredTextEncoder(texts, store)
        remembered = CachedTextEncoder(stored or texts)
    objective = _objective(
        model, config, remembered or texts, _seen(encoded, images), encoded.labels
    )
    held_out = None
    if encoded.val_features is not None:
        seen = _seen_held_out(encoded, encoded.val_features, images)
        held_out = HeldOut(
            _objective(model, config, texts, seen, encoded.val_labels), len(encoded.val_labels)
        )
    return FewShotTask(
        model,
        split,
        encoded,
        config,
        start,
        run_config.templates,
        run_config.extractor,
        texts,
        text_features,
        remembered,
        stored,
        images,
        objective,
        held_out,
    )


def _seen(encoded: EncodedSplit, images: VisualPrompts | None) -> F32 | PromptedImages:
    """Return the training images for the loss: features, or an encoder under visual prompts."""
    if images is None:
        return encoded.features
    changeable = _required(encoded.changeable)
    return PromptedViews(images, changeable.pixels, changeable.extracted)


def _seen_held_out(
    encoded: EncodedSplit, val_features: F32, images: VisualPrompts | None
) -> F32 | PromptedImages:
    """Return the validation images for the loss, as `_seen` does for training."""
    if images is None:
        return val_features[None]
    changeable = _required(encoded.val_changeable)
    pixels, extracted = changeable.pixels, changeable.extracted
    if isinstance(images, DecoderPrompts):
        return DeployedImages(images, pixels, extracted, _tuned_on(encoded))
    return PromptedViews(images, pixels, extracted)


def _tuned_on(encoded: EncodedSplit) -> F32:
    """Return a decoder's inputs f32[V * N, k] of all training images and views."""
    extracted = _required(encoded.changeable).extracted
    return extracted.reshape(-1, extracted.shape[-1])


def _required(changeable: Changeable | None) -> Changeable:
    if changeable is None:
        raise ZtuneError("the method changes images, but their pixels were not kept")
    return changeable


def _objective(
    model: Model,
    config: TunedConfig,
    texts: PromptEncoder | F32,
    features: F32 | PromptedImages,
    labels: I64,
) -> FewShotObjective:
    """Return the objective on the runtime's device if only texts change, else on the host."""
    scorer: Scorer | None = None
    if isinstance(features, np.ndarray) and not isinstance(texts, np.ndarray):
        logits = LOGITS in config.needs
        scorer = model.runtime.scorer(texts, features, labels, logits=logits)
    if scorer is None:
        scale, bias = model.bundle.logit_scale, model.bundle.logit_bias
        scorer = NumpyScores(texts, features, scale, bias, focal_loss(config.focal))
    k = config.top_classes
    return FewShotObjective(scorer if k is None else TopClasses(scorer, k), labels)


def open_program(
    model: Model, program: str, n_extracted: int, statistics: F32 | None = None
) -> VisualPrompts:
    """Open the image tower under border, decoder or tokens.

    `n_extracted` is k of a decoder's input features f32[N, k]; `statistics` f32[2, n] fixes its
    normalisation.
    """
    bundle, execution = model.bundle, model.execution
    if program == "border":
        return BorderPrompts(bundle, execution)
    if program == "decoder":
        return DecoderPrompts(bundle, execution, n_extracted, statistics)
    return TokenPrompts(bundle, execution)
