"""What a method needs of a runtime, and what a runtime gives: matched before the first query."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ztune.errors import ConfigError

LOSS = "loss"
"""One number a candidate."""
CONTEXTS = "contexts"
"""The text tower takes embeddings before the class names."""
LOGITS = "logits"
"""Logits of every image and class."""
TEXTS = "texts"
"""Features of texts, which images are compared with on the host."""
FEATURES = "features"
"""Image features, to be read once."""
PIXELS = "pixels"
"""Changed images may be sent and are encoded anew with every query."""
IMAGE_TOKENS = "image tokens"
"""The image tower takes extra tokens."""

EVERYTHING = frozenset((LOSS, CONTEXTS, LOGITS, TEXTS, FEATURES, PIXELS, IMAGE_TOKENS))
_SENTENCES = {
    LOSS: "losses",
    LOGITS: "logits",
    CONTEXTS: "text prompts as embeddings",
    TEXTS: "text features",
    FEATURES: "image features",
    PIXELS: "changed images in every query",
    IMAGE_TOKENS: "extra tokens in the image tower",
}


def described(needs: Iterable[str]) -> str:
    """Return a phrase for a person, in the order of access given away."""
    return ", ".join(_SENTENCES[need] for need in _SENTENCES if need in set(needs))


def no_access(
    name: str, given: frozenset[str], needs: Mapping[str, frozenset[str]], hint: str = ""
) -> ConfigError:
    """Return the error of a method that needs more than a runtime gives.

    `needs` is what every method of the table needs, this one as it is configured. The error names
    what is missing and the methods that would work.
    """
    missing = needs[name] - given
    able = [other for other, wanted in needs.items() if wanted <= given]
    works = f"methods that would work: {', '.join(able)}" if able else "no method would work"
    return ConfigError(
        f'method "{name}" needs {described(missing)}, which this runtime does not give'
        f"{f' ({hint})' if hint else ''}; {works}"
    )
