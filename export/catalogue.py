"""The models that open_clip knows by name."""

from __future__ import annotations

import open_clip

from ztune.errors import ConfigError


def list_known(word: str = "") -> dict[str, list[str]]:
    """Return the tags of published weights by architecture.

    `word` selects architectures with it in the name or in a tag, in any case.

    Raises: ConfigError if there is none.
    """
    known = {
        name: open_clip.list_pretrained_tags_by_model(name) for name in open_clip.list_models()
    }
    found = {
        name: tags
        for name, tags in known.items()
        if any(word.lower() in one.lower() for one in (name, *tags))
    }
    if not found:
        raise ConfigError(
            f'no model of open_clip {open_clip.__version__} has "{word}" in its name or in a tag '
            "(leave out the word to list all)"
        )
    return found
