"""Errors for users: one line that says what, got, expected and what to do."""


class ZtuneError(Exception):
    """An error that the command line reports in one line, with exit code 1."""


class DataError(ZtuneError):
    """Unusable images, folders, manifests or splits."""


class ImageSizeError(DataError):
    """An image too large to decode, or to decode in this memory."""


class StorageError(DataError):
    """A file that cannot be written, as on a full disk."""


class FormatError(ZtuneError):
    """A bundle, artifact or run that is damaged, foreign or too new."""


class ProviderError(ZtuneError):
    """A requested execution provider that does not run."""


class BudgetError(ZtuneError):
    """A step that costs more queries than remain."""


class NotFiniteError(ZtuneError):
    """A candidate whose loss is infinite or NaN."""

    def __init__(self, message: str, candidate: int):
        super().__init__(message)
        self.candidate = candidate
        """Its index in the call, from 0."""


class ConfigError(ZtuneError):
    """A setting with an unknown name or an invalid value."""


class ServerError(ZtuneError):
    """A server that is unreachable, refuses, or sends an invalid answer."""


class AwayError(ServerError):
    """No server has answered within `give_up`."""


class NotFittedError(ZtuneError, ValueError, AttributeError):
    """A classifier used before fitting; also scikit-learn's error if that is loaded."""


class ClosedError(ZtuneError):
    """A model or classifier used after closing."""


class ZtuneWarning(UserWarning):
    """A condition that a caller should know about."""


def how_to_install(extra: str) -> str:
    """Return the command that installs an extra of pyproject.toml, as in README."""
    return f"pip install '.[{extra}]' in a checkout of ztune"
