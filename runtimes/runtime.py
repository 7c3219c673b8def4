"""What answers forward passes, this machine or a server, as the rest of the house sees it."""

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
    """How a round of candidates is cut into calls."""

    def to_json(self) -> dict[str, Json]:
        """Return what run.json keeps of it."""


class TextEncoder(PromptEncoder, Protocol):
    """Encodes contexts before fixed class names, round after round."""

    @property
    def plan(self) -> Calls:
        """How a round is cut."""

    @property
    def cuda_graph(self) -> str | None:
        """Whether a round was captured as a CUDA graph, and if not why; None where none can be."""


class PromptGraph(Protocol):
    """The text tower that takes contexts."""

    def encoder(self, classes: Sequence[str], n_context: int, n_candidates: int) -> TextEncoder:
        """Return the encoder of contexts of `n_context` tokens before these class names."""

    def sentences(self, template: str, classes: Sequence[str]) -> F32:
        """Return the unit features f32[C, e] of a template filled with the classes."""


class Runtime(Protocol):
    """A bundle's towers, wherever they run."""

    @property
    def where(self) -> str:
        """What errors call the bundle."""

    @property
    def place(self) -> str:
        """What a run keeps of where the bundle is: its folder, or a server's URL."""

    @property
    def provider(self) -> str:
        """What run.json says of where they run."""

    @property
    def withheld(self) -> frozenset[str]:
        """What of `ztune.access` a method cannot have here."""

    @property
    def hint(self) -> str:
        """What to do about it."""

    def close(self) -> None:
        """Give up what connects to it."""

    @property
    def batches_at_once(self) -> int:
        """How many batches of images the image tower should get in a call."""

    def images(self) -> ImageEncoder:
        """Return the image tower."""

    def prompts(self, tokenizer: Tokenizer) -> PromptGraph:
        """Open the text tower."""

    def check_plan(
        self, names: Sequence[tuple[int, ...]], n_context: int, n: int, n_images: int = 0
    ) -> None:
        """See that rounds of `n` candidates before names of these ids can be cut into calls.

        `n_images` is how many images a call may be scored on.

        Raises: ConfigError when they cannot.
        """

    def scorer(
        self, encoder: PromptEncoder, features: F32, labels: I64, *, logits: bool
    ) -> Scorer | None:
        """Return what computes losses where the prompt graph runs; None where the host does.

        Shapes: features f32[V, N, e], labels i64[N]. `logits` says that a method reads them.
        """


class Local:
    """A bundle's graphs on this machine (a Runtime)."""

    withheld: frozenset[str] = frozenset()
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
        """Sessions go when they are no longer used."""

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
        # Logits that a method reads are the host's: a device keeps its own.
        on_device = self._execution.provider != "cpu" and not logits
        if not (on_device and isinstance(encoder, OrtPromptEncoder)):
            return None
        bundle = self._bundle
        return OrtScores(encoder, features, bundle.logit_scale, bundle.logit_bias, self._execution)
