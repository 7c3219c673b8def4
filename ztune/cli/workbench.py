"""What several verbs compose from all three packages: a bundle at work on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from runtimes.bundle import Bundle, load_bundle
from runtimes.ort import OrtImageEncoder, OrtPromptEncoder, OrtTextEncoder
from runtimes.prompts import template_tokens
from runtimes.providers import resolve
from runtimes.tokenizer import Tokenizer
from ztune.artifact import Artifact, ContextArtifact
from ztune.cli.output import Output
from ztune.data.cache import FeatureCache
from ztune.data.features import Features, encode_pictures
from ztune.errors import DataError
from ztune.types import F32


@dataclass(frozen=True)
class Workbench:
    """A bundle, the provider that runs it, and where progress goes."""

    bundle: Bundle
    provider: str
    output: Output

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.bundle)

    def features(
        self,
        items: Sequence[tuple[Path, str]],
        cache: Path,
        *,
        what: str,
        n_views: int = 0,
        seed: int = 0,
        skip_broken: bool = False,
    ) -> Features:
        """Encode pictures, those cached left out; the image tower is closed again afterwards."""
        encoder = OrtImageEncoder(self.bundle, self.provider)
        with self.output.progress(what, len(items) * max(1, n_views)) as ticker:
            result = encode_pictures(
                encoder,
                items,
                FeatureCache(cache),
                n_views=n_views,
                seed=seed,
                progress=lambda done, _total: ticker.update(done),
                skip_broken=skip_broken,
            )
        if not result.kept.all():
            self.output.warn(f"{what}: {int((~result.kept).sum())} broken pictures left out")
        return result

    def template_features(self, template: str, classes: tuple[str, ...]) -> F32:
        """Return the unit features f32[C, e] of a hand-written template filled with the classes."""
        tokens = template_tokens(self.bundle, self.tokenizer, template, classes)
        return OrtTextEncoder(self.bundle, self.provider).encode(tokens)

    def zero_shot(self, template: str, classes: tuple[str, ...]) -> tuple[F32, F32]:
        """Return weight f32[C, e] and bias f32[C] of the zero-shot classifier."""
        weight = np.float32(self.bundle.logit_scale) * self.template_features(template, classes)
        return weight, np.full(len(classes), self.bundle.logit_bias, dtype=np.float32)

    def prompt_encoder(self, classes: tuple[str, ...], n_context: int) -> OrtPromptEncoder:
        return OrtPromptEncoder(self.bundle, self.tokenizer, classes, n_context, self.provider)

    def refreshed(self, artifact: Artifact, classes: tuple[str, ...] | None = None) -> Artifact:
        """Return the artifact with text features from this bundle, for other classes if named.

        Raises: DataError when a head is asked for classes that it was not fitted on.
        """
        if not isinstance(artifact, ContextArtifact):
            if classes is not None and set(classes) != set(artifact.classes):
                raise DataError(
                    "a head serves only the classes it was fitted on: "
                    f"{', '.join(artifact.classes)} (a tuned context serves any)"
                )
            return artifact
        if artifact.context.shape[1] != self.bundle.text.width:
            raise DataError(
                f"the context has {artifact.context.shape[1]} values a token, the bundle's text "
                f"tower takes {self.bundle.text.width}"
            )
        wanted = classes or artifact.classes
        encoder = self.prompt_encoder(wanted, len(artifact.context))
        return ContextArtifact(
            wanted,
            artifact.provenance,
            artifact.context,
            encoder.encode(artifact.context[None])[0],
            self.bundle.logit_scale,
            self.bundle.logit_bias,
            artifact.tuning_pictures,
        )


def open_workbench(path: Path, provider: str, output: Output) -> Workbench:
    """Load a bundle and settle on a provider, saying which.

    Raises: FormatError for the bundle, ProviderError for the provider.
    """
    bundle = load_bundle(path)
    name, why = resolve(provider)
    output.remark(why)
    return Workbench(bundle, name, output)
