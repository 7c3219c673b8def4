"""Adapt a vision-language model where only forward passes are possible.

Nothing is loaded until a name is used, so that what lies below may import `ztune.types`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ztune.model import Model, open_model
    from ztune.run_config import RunConfig
    from ztune.training import start_run

__all__ = ["Model", "RunConfig", "open_model", "start_run"]
_HOMES = {
    "Model": "ztune.model",
    "RunConfig": "ztune.run_config",
    "open_model": "ztune.model",
    "start_run": "ztune.training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ztune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
