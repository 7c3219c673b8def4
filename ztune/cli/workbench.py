"""What several verbs compose from all three packages: a bundle at work on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from runtimes.bundle import Bundle, load_bundle
from runtimes.ort import OrtImageEncoder, OrtPromptGraph
from runtimes.providers import Execution, check_precision
from runtimes.tokenizer import Tokenizer
from ztune.artifact import Artifact, ContextArtifact
from ztune.cli.output import Output
from ztune.data.cache import FeatureCache
from ztune.data.features import Features, encode_pictures
from ztune.errors import DataError
from ztune.types import F32


@dataclass(frozen=True)
class Workbench:
    """A bundle, how it runs here, and where progress goes."""

    bundle: Bundle
    execution: Execution
    output: Output

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.bundle)

    @cached_property
    def prompt_graph(self) -> OrtPromptGraph:
        """The prompt graph, opened when first used: after the image tower is closed again."""
        return OrtPromptGraph(self.bundle, self.tokenizer, self.execution)

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
        encoder = OrtImageEncoder(self.bundle, self.execution)
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

    def zero_shot(self, template: str, classes: tuple[str, ...]) -> tuple[F32, F32]:
        """Return weight f32[C, e] and bias f32[C] of the zero-shot classifier."""
        features = self.prompt_graph.sentences(template, classes)
        weight = np.float32(self.bundle.logit_scale) * features
        return weight, np.full(len(classes), self.bundle.logit_bias, dtype=np.float32)

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
        encoder = self.prompt_graph.encoder(wanted, len(artifact.context), 1)
        return ContextArtifact(
            wanted,
            artifact.provenance,
            artifact.context,
            encoder.encode(artifact.context[None])[0],
            self.bundle.logit_scale,
            self.bundle.logit_bias,
            artifact.tuning_pictures,
        )


def open_workbench(path: Path, execution: Execution, output: Output) -> Workbench:
    """Load a bundle; its graphs are opened when they are used.

    Raises: FormatError, ProviderError when the provider cannot run the bundle's precision.
    """
    bundle = load_bundle(path)
    check_precision(bundle.precision, execution.provider)
    return Workbench(bundle, execution, output)
