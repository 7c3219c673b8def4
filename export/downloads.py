"""Silence downloads and report their errors in one line."""

from __future__ import annotations

import contextlib
import logging
import socket
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator

from ztune.errors import ZtuneError
from ztune.printing import reason_of

_OFFLINE_HINT = (
    "pass a local checkpoint instead: `pretrained=FILE`, or `model` local-dir:FOLDER "
    "with open_clip_config.json and the weights"
)


@contextlib.contextmanager
def explain_download_errors(what: str, hint: str = _OFFLINE_HINT) -> Iterator[None]:
    """Report a failed download in one line, immediately when the hub's name does not resolve."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = offline or not _is_reachable(constants.ENDPOINT)
        yield
    except ZtuneError:
        raise
    except Exception as error:
        why = "no network" if constants.HF_HUB_OFFLINE else reason(error)
        raise ZtuneError(f"{what} cannot be fetched ({why}); {hint}") from None
    finally:
        constants.HF_HUB_OFFLINE = offline


def _is_reachable(endpoint: str) -> bool:
    """Return whether the hub's name resolves; a proxy may resolve it, so assume it does."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(endpoint).hostname, 443)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def capture_logs() -> Iterator[list[str]]:
    """Silence open_clip and the hub; yield the messages that open_clip logs."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    root = logging.getLogger()
    # open_clip logs to the root logger; the hub has handlers of its own.
    others = [logging.getLogger(name) for name in ("huggingface_hub", "transformers", "timm")]
    before = (root.handlers[:], root.level)
    levels = [other.level for other in others]
    try:
        root.handlers[:] = [Collect()]
        root.setLevel(logging.INFO)
        for other in others:
            other.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield messages
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        for other, level in zip(others, levels, strict=True):
            other.setLevel(level)


def reason(error: BaseException) -> str:
    """Return an error of torch, open_clip or the hub as one line."""
    text = reason_of(error, most=240)
    if "weights_only" in text:
        return (
            "it contains more than tensors and could run code; save its state_dict as safetensors"
        )
    if isinstance(error, KeyError):
        return f"it has no {text}: weights of another architecture"
    return text


@contextlib.contextmanager
def no_remote_code() -> Iterator[None]:
    """Let transformers refuse a model's or tokenizer's own code, instead of asking the user.

    open_clip passes it no `trust_remote_code`.
    """
    from transformers import dynamic_module_utils as remote

    seconds = remote.TIME_OUT_REMOTE_CODE
    try:
        remote.TIME_OUT_REMOTE_CODE = 0
        yield
    finally:
        remote.TIME_OUT_REMOTE_CODE = seconds
