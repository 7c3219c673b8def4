"""Capabilities that a method needs and a runtime provides, matched before the first query."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ztune.errors import ConfigError

LOSS = "loss"
"""One loss per candidate."""
CONTEXTS = "contexts"
"""The text tower takes context embeddings before the class names."""
LOGITS = "logits"
"""Logits per image and class."""
TEXTS = "texts"
"""Text features, compared with image features on the host."""
FEATURES = "features"
"""Image features, read once."""
PIXELS = "pixels"
"""Changed images can be sent and encoded with every query."""
IMAGE_TOKENS = "image tokens"
"""The image tower takes extra tokens."""

EVERYTHING = frozenset((LOSS, CONTEXTS, LOGITS, TEXTS, FEATURES, PIXELS, IMAGE_TOKENS))
_PHRASES = {
    LOSS: "losses",
    LOGITS: "logits",
    CONTEXTS: "text prompts as embeddings",
    TEXTS: "text features",
    FEATURES: "image features",
    PIXELS: "changed images in every query",
    IMAGE_TOKENS: "extra tokens in the image tower",
}


def describe(needs: Iterable[str]) -> str:
    """Return the capabilities as a phrase, from the least to the most revealing."""
    return ", ".join(_PHRASES[need] for need in _PHRASES if need in set(needs))


def missing_capability(
    name: str, given: frozenset[str], needs: Mapping[str, frozenset[str]], hint: str = ""
) -> ConfigError:
    """Return the error for a method that needs capabilities that a runtime lacks.

    `needs` maps each method to its capabilities, this one as configured. The error names the
    missing capabilities and the methods that would work.
    """
    missing = needs[name] - given
    able = [other for other, wanted in needs.items() if wanted <= given]
    works = f"methods that would work: {', '.join(able)}" if able else "no method would work"
    return ConfigError(
        f'method "{name}" needs {describe(missing)}, which this runtime does not provide'
        f"{f' ({hint})' if hint else ''}; {works}"
    )
