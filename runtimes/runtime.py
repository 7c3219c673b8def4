"""The interface of a runtime, which runs forward passes locally or on a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from runtimes.bundle import Bundle
from runtimes.ort import OrtImageEncoder, OrtPromptEncoder, OrtPromptGraph, plan_for
from runtimes.providers import Execution
from runtimes.scores import OrtScores
from runtimes.tokenizer import Tokenizer
from ztune.types import F32, I64, ImageEncoder, Json, PromptEncoder, Scorer


class Calls(Protocol):
    """How a candidate batch is split into calls."""

    def to_json(self) -> dict[str, Json]:
        """Return the entry in run.json."""


class TextEncoder(PromptEncoder, Protocol):
    """Encodes contexts with fixed class names."""

    @property
    def plan(self) -> Calls:
        """How a candidate batch is split."""

    @property
    def cuda_graph(self) -> str | None:
        """Whether a candidate batch was captured as a CUDA graph, or why not; None without CUDA."""


class PromptGraph(Protocol):
    """The text tower that takes contexts."""

    def encoder(self, classes: Sequence[str], n_context: int, n_candidates: int) -> TextEncoder:
        """Return the encoder of contexts of `n_context` tokens before these class names."""

    def encode_template(self, template: str, classes: Sequence[str]) -> F32:
        """Return the unit features f32[C, e] of a template filled with the classes."""


class Runtime(Protocol):
    """A bundle's towers, local or on a server."""

    @property
    def where(self) -> str:
        """The bundle's name in errors."""

    @property
    def place(self) -> str:
        """The bundle's folder or the server's URL, for run.json."""

    @property
    def provider(self) -> str:
        """The execution provider, for run.json."""

    @property
    def missing(self) -> frozenset[str]:
        """The capabilities of `ztune.capabilities` that it lacks."""

    @property
    def hint(self) -> str:
        """How to get the missing capabilities."""

    def close(self) -> None:
        """Close its connections."""

    @property
    def batches_at_once(self) -> int:
        """The number of image batches to encode concurrently."""

    def images(self) -> ImageEncoder:
        """Return the image tower."""

    def prompts(self, tokenizer: Tokenizer) -> PromptGraph:
        """Open the text tower."""

    def check_plan(
        self, names: Sequence[tuple[int, ...]], n_context: int, n: int, n_images: int = 0
    ) -> None:
        """Check that candidate batches of `n` with names of these ids can be split into calls.

        `n_images` is how many images a call may be scored on.

        Raises: ConfigError when they cannot.
        """

    def scorer(
        self, encoder: PromptEncoder, features: F32, labels: I64, *, logits: bool
    ) -> Scorer | None:
        """Return a scorer that runs on the prompt graph's device; None to compute on the host.

        Shapes: features f32[V, N, e], labels i64[N]. `logits` is whether a method reads them.
        """


class LocalRuntime:
    """A bundle's graphs on this machine (a Runtime)."""

    missing: frozenset[str] = frozenset()
    hint = ""
    batches_at_once = 1

    def __init__(self, bundle: Bundle, execution: Execution):
        self._bundle, self._execution = bundle, execution

    @property
    def where(self) -> str:
        return f'bundle "{self._bundle.path}"'

    @property
    def place(self) -> str:
        return str(self._bundle.path.resolve())

    @property
    def provider(self) -> str:
        return self._execution.provider

    def close(self) -> None:
        """Do nothing: sessions close when they are garbage-collected."""

    def images(self) -> ImageEncoder:
        return OrtImageEncoder(self._bundle, self._execution)

    def prompts(self, tokenizer: Tokenizer) -> OrtPromptGraph:
        return OrtPromptGraph(self._bundle, tokenizer, self._execution)

    def check_plan(
        self, names: Sequence[tuple[int, ...]], n_context: int, n: int, n_images: int = 0
    ) -> None:
        plan_for(self._bundle, names, n_context, n, self._execution)

    def scorer(
        self, encoder: PromptEncoder, features: F32, labels: I64, *, logits: bool
    ) -> Scorer | None:
        # Logits that a method reads are computed on the host.
        on_device = self._execution.provider != "cpu" and not logits
        if not (on_device and isinstance(encoder, OrtPromptEncoder)):
            return None
        bundle = self._bundle
        return OrtScores(encoder, features, bundle.logit_scale, bundle.logit_bias, self._execution)
