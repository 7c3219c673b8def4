"""The result of tuning, `*.safetensors`: read, write, check. docs/formats.md specifies it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from ztune.errors import FormatError
from ztune.io.files import read_json, write_bytes
from ztune.io.kinds import RUN_FORMAT, kind_of, wrong_kind
from ztune.io.old_formats import rename_arrays
from ztune.io.schema import Count, Record, convert, current, plain
from ztune.io.tensors import read_tensors, tensor_bytes
from ztune.logits import FeatureClassifier, InlierTest, Kernel, Whitening
from ztune.printing import quoted
from ztune.types import F32, I32, Json

FORMAT = "ztune-artifact"
VERSION = 3
MOST_TOKENS = 4096
MOST_AT_ONCE = 65_536
MOST_TEMPERATURE = 1e6

Fingerprints = NDArray[np.uint64]
"""u64[n], sorted: the first 8 bytes of the SHA-256 of every training and validation image, so that
an evaluation can report overlap."""


def _none() -> Fingerprints:
    return np.zeros(0, dtype=np.uint64)


@dataclass(frozen=True)
class Provenance:
    """The origin of an artifact; equal runs give equal fields."""

    model_id: str
    bundle_digest: str
    method: str
    seed: int
    queries: int
    stop_reason: str
    config: Mapping[str, Json] = field(default_factory=dict)


class Metadata(Record, frozen=True, kw_only=True, tag_field="kind"):
    """The metadata of a file; each kind adds its own fields."""

    classes: tuple[str, ...]
    model_id: str
    bundle_digest: str
    method: str
    seed: Count
    queries: Count
    stop_reason: str
    config: Mapping[str, Json]
    temperature: Annotated[float, Meta(gt=0, le=MOST_TEMPERATURE)] | None = None
    reject: Annotated[float, Meta(gt=0, lt=1)] | None = None

    @property
    def provenance(self) -> Provenance:
        names = (field.name for field in fields(Provenance))
        return Provenance(**{name: getattr(self, name) for name in names})


class ContextMetadata(Metadata, frozen=True, tag="context"):
    """Metadata of a ContextArtifact."""


class MixtureMetadata(Metadata, frozen=True, kw_only=True, tag="mixture"):
    """Metadata of a MixtureArtifact."""

    at_once: Annotated[int, Meta(ge=1, le=MOST_AT_ONCE)]


class EnsembleMetadata(MixtureMetadata, frozen=True, kw_only=True, tag="ensemble"):
    """Metadata of an EnsembleArtifact."""

    templates: tuple[str, ...]
    chosen: Mapping[str, Json]


class VisualMetadata(Metadata, frozen=True, kw_only=True, tag="visual"):
    """Metadata of a VisualArtifact."""

    program: Literal["border", "decoder", "tokens"]
    templates: tuple[str, ...]
    extractor: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")]


class HeadMetadata(Metadata, frozen=True, tag="head"):
    """Metadata of a HeadArtifact without a kernel."""


class KernelMetadata(HeadMetadata, frozen=True, tag="kernel"):
    """Metadata of a HeadArtifact with a kernel."""


AnyMetadata = (
    ContextMetadata
    | MixtureMetadata
    | EnsembleMetadata
    | VisualMetadata
    | HeadMetadata
    | KernelMetadata
)


@dataclass(frozen=True)
class ContextArtifact:
    """A tuned context and the text features of its classes."""

    classes: tuple[str, ...]
    provenance: Provenance
    context: F32
    """f32[m, d]: the context embeddings, not a latent."""
    text_features: F32 | None
    """f32[C, e], unit rows; None if the server returned losses only."""
    logit_scale: float
    logit_bias: float
    tuning_images: Fingerprints = field(default_factory=_none)
    temperature: float | None = None
    """Of the probabilities (ztune.calibration); None if it was not fitted."""
    inliers: InlierTest | None = None
    """Tells images of none of the classes; None: it was not asked for."""

    def classifier(self) -> FeatureClassifier:
        """Return the classifier of image features.

        Raises: FormatError without text features.
        """
        if self.text_features is None:
            raise FormatError(
                "the context was tuned with losses only, so it has no text features (compute them "
                "from the bundle: ztune pack BUNDLE, ztune eval BUNDLE)"
            )
        return classifier_of_texts(
            self.text_features, self.logit_scale, self.logit_bias, self.temperature
        )


@dataclass(frozen=True)
class MixtureArtifact:
    """A weighted mixture of token prompts; it serves other classes too."""

    classes: tuple[str, ...]
    provenance: Provenance
    tokens: I32
    """i32[K, m]: each prompt's context as rows of the token table."""
    weights: F32
    """f32[K], of any sign and sum."""
    text_features: F32
    """f32[C, e]: the weighted sum of the prompts' unit text features."""
    logit_scale: float
    logit_bias: float
    at_once: int
    """Prompts encoded per call; in low precision the call's content affects the scaling."""
    tuning_images: Fingerprints = field(default_factory=_none)
    temperature: float | None = None
    """As for a context."""
    inliers: InlierTest | None = None
    """As for a context."""

    def classifier(self) -> FeatureClassifier:
        return classifier_of_texts(
            self.text_features, self.logit_scale, self.logit_bias, self.temperature
        )


@dataclass(frozen=True)
class HeadArtifact:
    """A closed-form classifier on image features, for its own classes only."""

    classes: tuple[str, ...]
    provenance: Provenance
    weight: F32
    """f32[C, e]"""
    bias: F32
    """f32[C]"""
    tuning_images: Fingerprints = field(default_factory=_none)
    kernel: Kernel | None = None
    temperature: float | None = None
    """As for a context."""
    inliers: InlierTest | None = None
    """As for a context."""

    def classifier(self) -> FeatureClassifier:
        return FeatureClassifier(self.weight, self.bias, self.kernel, self.temperature or 1.0)

    def with_priors(self, shift: F32, name: str) -> HeadArtifact:
        """Return the head with a shift f32[C] of its logits; `name` is recorded."""
        provenance = replace(self.provenance, config={**self.provenance.config, "priors": name})
        return replace(self, provenance=provenance, bias=self.bias + shift)

    def restricted(self, classes: tuple[str, ...]) -> HeadArtifact:
        """Return the head for some of its classes, in another order if wanted."""
        own = self.classifier().of_classes([self.classes.index(name) for name in classes])
        return replace(self, classes=classes, weight=own.weight, bias=own.bias, kernel=own.kernel)


@dataclass(frozen=True)
class EnsembleArtifact:
    """A calibrated ensemble on image features, and the mixture of prompts that it started from.

    The ensemble serves its own classes, or some of them; the mixture serves others.
    """

    classes: tuple[str, ...]
    provenance: Provenance
    head: FeatureClassifier
    """Of image features; its logits are calibrated."""
    mixture: MixtureArtifact
    """With the same classes and provenance."""
    templates: tuple[str, ...]
    """The hand-written templates, one of the priors."""
    chosen: Mapping[str, Json]
    """The members' settings and temperatures."""
    tuning_images: Fingerprints = field(default_factory=_none)
    temperature: float | None = None
    """As for a context."""
    inliers: InlierTest | None = None
    """As for a context."""

    def classifier(self) -> FeatureClassifier:
        return replace(self.head, temperature=self.temperature or 1.0)

    def with_priors(self, shift: F32, name: str) -> EnsembleArtifact:
        """Return the ensemble with a shift f32[C] of its logits; `name` is recorded."""
        head = replace(self.head, bias=self.head.bias + shift)
        return replace(self, head=head, chosen={**self.chosen, "priors": name})

    def restricted(self, classes: tuple[str, ...]) -> EnsembleArtifact:
        """Return the ensemble for some of its classes, in another order if wanted."""
        rows = [self.classes.index(name) for name in classes]
        texts = self.mixture.text_features[rows]
        return replace(
            self,
            classes=classes,
            head=self.head.of_classes(rows),
            mixture=replace(self.mixture, classes=classes, text_features=texts),
        )


@dataclass(frozen=True)
class VisualArtifact:
    """A visual prompt and its text features; it serves other classes too."""

    classes: tuple[str, ...]
    provenance: Provenance
    program: str
    """border, decoder or tokens: how the values change an image."""
    visual: F32
    """border f32[3, S, S] before its sigmoid; decoder f32[n]; tokens f32[n, w]."""
    text_features: F32
    """f32[C, e], unit rows."""
    logit_scale: float
    logit_bias: float
    context: F32 | None = None
    """f32[m, d] if the text side was tuned too."""
    templates: tuple[str, ...] = ()
    """The hand-written templates otherwise."""
    statistics: F32 | None = None
    """f32[2, n]: means and variances of a decoder's normalisation over the training images."""
    extractor: str = ""
    """SHA-256 of the decoder's own feature extractor; empty: the bundle's image tower."""
    tuning_images: Fingerprints = field(default_factory=_none)
    temperature: float | None = None
    """As for a context."""

    def classifier(self) -> FeatureClassifier:
        return classifier_of_texts(
            self.text_features, self.logit_scale, self.logit_bias, self.temperature
        )


_N_STATISTICS = 144
"""Channels normalised by BlackVIP's decoder."""
_LARGEST_FEATURE = 1e30
_MOST_SHARPNESS = 1e6
_UNIT_TOLERANCE = 1e-3
Artifact = ContextArtifact | MixtureArtifact | EnsembleArtifact | HeadArtifact | VisualArtifact


def classifier_of_texts(
    text_features: F32, logit_scale: float, logit_bias: float, temperature: float | None = None
) -> FeatureClassifier:
    """Return the classifier of text features f32[C, e]; logit_scale multiplies."""
    bias = np.full(len(text_features), logit_bias, dtype=np.float32)
    weight = np.float32(logit_scale) * text_features
    return FeatureClassifier(weight, bias, temperature=temperature or 1.0)


def inliers_of(artifact: Artifact, classes: tuple[str, ...] | None = None) -> InlierTest | None:
    """Return an artifact's test for images of none of the classes, or of some of its classes.

    None if it has none, or for class names that it was not tuned on.
    """
    test = None if isinstance(artifact, VisualArtifact) else artifact.inliers
    if test is None or classes is None or classes == artifact.classes:
        return test
    if not set(classes) <= set(artifact.classes):
        return None
    rows = [artifact.classes.index(name) for name in classes]
    return replace(test, prototypes=test.prototypes[rows])


def write_artifact(path: Path, artifact: Artifact) -> None:
    """Write an artifact, whole or not at all.

    Raises: FormatError naming a tensor that is not finite.
    """
    write_bytes(path, artifact_bytes(artifact))


def artifact_bytes(artifact: Artifact) -> bytes:
    """Return an artifact's file content; equal artifacts give equal bytes.

    Raises: FormatError naming a tensor that is not finite.
    """
    own: dict[str, Any] = {}
    arrays: dict[str, NDArray[np.generic]] = {"tuning_images": artifact.tuning_images}
    if isinstance(artifact, HeadArtifact | EnsembleArtifact):
        arrays |= _head_arrays(artifact.classifier())
    if not isinstance(artifact, HeadArtifact):
        texts = artifact.mixture if isinstance(artifact, EnsembleArtifact) else artifact
        if texts.text_features is not None:
            arrays["text_features"] = texts.text_features
        arrays["logit_scale"] = np.array([texts.logit_scale], dtype=np.float32)
        arrays["logit_bias"] = np.array([texts.logit_bias], dtype=np.float32)
        if isinstance(texts, MixtureArtifact):
            arrays |= {"tokens": texts.tokens, "weights": texts.weights}
            own = {"at_once": texts.at_once}
        elif texts.context is not None:
            arrays["context"] = texts.context
    if isinstance(artifact, EnsembleArtifact):
        own |= {"templates": artifact.templates, "chosen": artifact.chosen}
    if isinstance(artifact, VisualArtifact):
        arrays["visual"] = artifact.visual
        if artifact.statistics is not None:
            arrays["statistics"] = artifact.statistics
        own = {name: getattr(artifact, name) for name in ("program", "templates", "extractor")}
    if (test := inliers_of(artifact)) is not None:
        own["reject"], arrays["prototypes"] = test.share, test.prototypes
        arrays["inlier_threshold"] = np.array([test.threshold], dtype=np.float32)
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise FormatError(
                f"artifact of {artifact.provenance.method}: tensor {name} has values that are not "
                "finite; nothing was written (use other settings)"
            )
    metadata = _kind(artifact)(
        classes=artifact.classes,
        temperature=artifact.temperature,
        **vars(artifact.provenance),
        **own,
    )
    return tensor_bytes(arrays, {"format": FORMAT, "version": VERSION, **plain(metadata)})


def _head_arrays(classifier: FeatureClassifier) -> dict[str, NDArray[np.generic]]:
    arrays: dict[str, NDArray[np.generic]] = {
        "weight": classifier.weight,
        "bias": classifier.bias,
    }
    if (kernel := classifier.kernel) is not None:
        arrays |= {"keys": kernel.keys, "values": kernel.values}
        arrays["sharpness"] = np.array([kernel.sharpness], dtype=np.float32)
        if kernel.whitening is not None:
            arrays |= {"centre": kernel.whitening.centre, "matrix": kernel.whitening.matrix}
    return arrays


def _kind(artifact: Artifact) -> type[Metadata]:
    if isinstance(artifact, EnsembleArtifact):
        return EnsembleMetadata
    if isinstance(artifact, HeadArtifact):
        return HeadMetadata if artifact.kernel is None else KernelMetadata
    if isinstance(artifact, MixtureArtifact):
        return MixtureMetadata
    return VisualMetadata if isinstance(artifact, VisualArtifact) else ContextMetadata


def read_artifact(path: Path) -> Artifact:
    """Read and check an artifact; `path` is its file or a finished run.

    Raises: FormatError if it is damaged, foreign, too new or inconsistent.
    """
    path = _file_of(path)
    where = f'artifact "{path}"'
    arrays, document = read_tensors(path, where)
    arrays = rename_arrays(arrays)
    content, kinds = (
        current(document, FORMAT, VERSION, where),
        cast("type[AnyMetadata]", AnyMetadata),
    )
    found = convert(content, kinds, where)
    classes, provenance = found.classes, found.provenance
    if len(classes) < 2 or len(set(classes)) != len(classes):
        raise FormatError(f"{where}: expected at least two different class names")
    C = len(classes)

    def tensor(name: str, *shape: int | None) -> F32:
        array = arrays.pop(name, None)
        if array is None or array.dtype != np.float32 or array.ndim != len(shape):
            raise FormatError(f"{where}: tensor {name} is missing or not float32 of {shape}")
        if any(want not in (None, got) for want, got in zip(shape, array.shape, strict=True)):
            raise FormatError(f"{where}: tensor {name} is {array.shape}, expected {shape}")
        if 0 in array.shape or not np.isfinite(array).all():
            raise FormatError(f"{where}: tensor {name} is empty or has values that are not finite")
        return array

    def unit_rows(name: str, *shape: int | None) -> F32:
        array = tensor(name, *shape)
        lengths = np.linalg.norm(array.astype(np.float64), axis=1)
        worst = float(lengths[np.abs(lengths - 1).argmax()])
        if abs(worst - 1) > _UNIT_TOLERANCE:
            raise FormatError(
                f"{where}: tensor {name} has a row of length {worst:.6g}, expected unit rows"
            )
        return array

    def positive(name: str, most: float = np.inf) -> float:
        value = float(tensor(name, 1)[0])
        if not 0 < value <= most:
            limit = "" if np.isinf(most) else f" and at most {most:g}"
            raise FormatError(f"{where}: {name} is {value:g}, expected more than 0{limit}")
        return value

    def token_ids() -> I32:
        array = arrays.pop("tokens", None)
        if array is None or array.dtype != np.int32 or array.ndim != 2 or 0 in array.shape:
            raise FormatError(f"{where}: tensor tokens is missing, empty or not int32 of (K, m)")
        if array.min() < 0:
            raise FormatError(
                f"{where}: tensor tokens has {array.min()}, expected ids of at least 0"
            )
        return array

    def statistics() -> F32:
        array = tensor("statistics", 2, _N_STATISTICS)
        if (array[1] < 0).any():
            raise FormatError(
                f"{where}: tensor statistics has a variance of {array[1].min():g}, "
                "expected at least 0"
            )
        return array

    images = arrays.pop("tuning_images", None)
    if images is None or images.dtype != np.uint64 or images.ndim != 1:
        raise FormatError(f"{where}: tensor tuning_images is missing or not uint64 of (n,)")

    def head(*, with_kernel: bool) -> FeatureClassifier:
        weight, bias, kernel = tensor("weight", C, None), tensor("bias", C), None
        if with_kernel:
            e, whitening = weight.shape[1], None
            if isinstance(found, EnsembleMetadata):
                whitening = Whitening(tensor("centre", e), tensor("matrix", e, e))
            keys = unit_rows("keys", None, e)
            sharpness = positive("sharpness", _MOST_SHARPNESS)
            kernel = Kernel(keys, tensor("values", len(keys), C), sharpness, whitening)
        return FeatureClassifier(weight, bias, kernel)

    def mixture(at_once: int) -> MixtureArtifact:
        tokens = token_ids()
        read = MixtureArtifact(
            classes,
            provenance,
            tokens,
            tensor("weights", len(tokens)),
            tensor("text_features", C, None),
            positive("logit_scale"),
            float(tensor("logit_bias", 1)[0]),
            at_once,
            images,
        )
        if np.abs(read.text_features).max() > _LARGEST_FEATURE:
            raise FormatError(
                f"{where}: tensor text_features has values too large for a classifier"
            )
        return read

    artifact: Artifact
    if isinstance(found, HeadMetadata):
        own = head(with_kernel=isinstance(found, KernelMetadata))
        artifact = HeadArtifact(classes, provenance, own.weight, own.bias, images, own.kernel)
    elif isinstance(found, EnsembleMetadata):
        own, texts = head(with_kernel="keys" in arrays), mixture(found.at_once)
        if texts.text_features.shape[1] != own.weight.shape[1]:
            raise FormatError(
                f"{where}: tensor text_features has {texts.text_features.shape[1]} columns, "
                f"expected those of weight, {own.weight.shape[1]}"
            )
        artifact = EnsembleArtifact(
            classes,
            provenance,
            own,
            texts,
            _checked_templates(found.templates, where),
            found.chosen,
            images,
        )
    elif isinstance(found, MixtureMetadata):
        artifact = mixture(found.at_once)
    else:
        # Absent if the context was tuned with losses only; a bundle computes them.
        known = isinstance(found, VisualMetadata) or "text_features" in arrays
        text_features = unit_rows("text_features", C, None) if known else None
        logit_scale = positive("logit_scale")
        logit_bias = float(tensor("logit_bias", 1)[0])
        context = None
        if isinstance(found, ContextMetadata) or "context" in arrays:
            context = tensor("context", None, None)
        if not isinstance(found, VisualMetadata):
            assert context is not None
            artifact = ContextArtifact(
                classes, provenance, context, text_features, logit_scale, logit_bias, images
            )
        else:
            assert text_features is not None
            program = found.program
            templates: tuple[str, ...] = ()
            if context is None:
                templates = _checked_templates(found.templates, where)
            shape = {"border": (3, None, None), "decoder": (None,), "tokens": (None, None)}[program]
            visual = tensor("visual", *shape)
            if program == "tokens" and len(visual) > MOST_TOKENS:
                raise FormatError(
                    f"{where}: tensor visual has {len(visual)} tokens, "
                    f"expected at most {MOST_TOKENS}"
                )
            artifact = VisualArtifact(
                classes,
                provenance,
                program,
                visual,
                text_features,
                logit_scale,
                logit_bias,
                context,
                templates,
                statistics() if program == "decoder" else None,
                found.extractor,
                images,
            )
    if found.reject is not None:
        if isinstance(artifact, VisualArtifact):
            raise FormatError(f"{where}: reject is {found.reject:g}, but it changes images")
        texts_only = isinstance(artifact, ContextArtifact) and artifact.text_features is None
        width = None if texts_only else artifact.classifier().weight.shape[1]
        prototypes = unit_rows("prototypes", C, width)
        threshold = float(tensor("inlier_threshold", 1)[0])
        artifact = replace(artifact, inliers=InlierTest(prototypes, threshold, found.reject))
    if arrays:
        raise FormatError(f"{where}: unknown tensors {sorted(arrays)}")
    return replace(artifact, temperature=found.temperature)


def _checked_templates(templates: tuple[str, ...], where: str) -> tuple[str, ...]:
    if not (templates and all(template.count("{}") == 1 for template in templates)):
        raise FormatError(f"{where}: expected templates with one {{}} each")
    return templates


def _file_of(path: Path) -> Path:
    """Return the artifact's file; for a run, its result.

    Raises: FormatError for a run without a result, or another kind of path.
    """
    kind = kind_of(path)
    if kind not in ("artifact", "file", "run"):
        raise wrong_kind(path, "artifact")
    if kind != "run":
        return path
    head = read_json(path / "run.json", f'run "{path}"')
    if head.get("format") != RUN_FORMAT:
        raise FormatError(f'run "{path}": run.json was not written by ztune')
    status = head.get("status")
    if status == "refused":
        raise FormatError(
            f'run "{path}" was refused before its first step and has no prompt.safetensors (see '
            '"signal" in its run.json, and start a run with other settings)'
        )
    if status != "finished":
        raise FormatError(
            f'run "{path}" is not finished and has no prompt.safetensors yet (resume with: ztune '
            f"tune --resume {quoted(path)})"
        )
    return path / "prompt.safetensors"


def require_same_model(artifact: Artifact, model_id: str, path: Path, bundle: Path) -> None:
    """Refuse an artifact made for another model.

    Raises: FormatError with both ids.
    """
    if artifact.provenance.model_id != model_id:
        raise FormatError(
            f'"{path}" was made for model {artifact.provenance.model_id[:19]}…, '
            f'bundle "{bundle}" is {model_id[:19]}… (use the bundle it was tuned on, or tune again)'
        )
