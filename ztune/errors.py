"""The errors a user can meet: each is one line that says what, got, expected and what to do."""


class ZtuneError(Exception):
    """Anything that the command line reports in one line and exits 1 for."""


class DataError(ZtuneError):
    """Images, folders, manifests or splits that cannot be used as they are."""


class StorageError(DataError):
    """A file that cannot be written, on a full disk for instance."""


class FormatError(ZtuneError):
    """A file of ours (bundle, artifact, run) that is damaged, foreign or too new."""


class ProviderError(ZtuneError):
    """An execution provider that was asked for and does not really run."""


class BudgetError(ZtuneError):
    """A step that would cost more queries than are left."""


class NotFiniteError(ZtuneError):
    """A candidate whose loss is infinite or no number."""

    def __init__(self, message: str, candidate: int):
        super().__init__(message)
        self.candidate = candidate
        """Its place among those of one call, from 0."""


class ConfigError(ZtuneError):
    """A setting with an unknown name or an impossible value."""


class ServerError(ZtuneError):
    """A server that cannot be reached, refuses, or answers what it must not."""


class AwayError(ServerError):
    """No server has answered for as long as was agreed."""


class NotFittedError(ZtuneError, ValueError, AttributeError):
    """A classifier that is asked before it was fitted; scikit-learn's own where that is loaded."""


class ClosedError(ZtuneError):
    """A model or a classifier that is asked after it was closed."""


class ZtuneWarning(UserWarning):
    """What a caller should know of a result, though there is one."""


def how_to_install(extra: str) -> str:
    """Return the command that installs an extra of pyproject.toml, as README gives it."""
    return f"pip install '.[{extra}]' in a checkout of ztune"
