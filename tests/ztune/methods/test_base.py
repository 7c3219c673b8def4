"""An error in one line names what a method lacks."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from ztune.errors import ConfigError
from ztune.heads import Shots
from ztune.maps import DirectContext
from ztune.methods.base import (
    Composition,
    HeadMethod,
    ModelSpec,
    TextStart,
    TunedMethod,
    build_method,
)
from ztune.methods.gda import GdaConfig, fit_gda
from ztune.methods.zip import ZipConfig
from ztune.types import F32


@dataclass(frozen=True)
class Unfinished(TextStart):
    """Has no build, no round_size, no step_queries and no perturbation_setting."""


@dataclass(frozen=True)
class Unset:
    size: int


TUNED: dict[str, Any] = {"name": "new", "title": "a method", "paper": "ours", "config": ZipConfig}
HEAD: dict[str, Any] = {**TUNED, "config": GdaConfig, "fit": fit_gda}


def test_a_complete_method_is_taken() -> None:
    assert TunedMethod(**TUNED).serves_new_classes()
    assert not HeadMethod(**HEAD).serves_new_classes()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "my method"}, r"method name 'my method': expected lower-case letters"),
        ({"name": "a.b"}, r"method name 'a\.b'"),
        ({"name": None}, r"method name None"),
        ({"title": ""}, r'method "new": title is \'\', expected a line of text'),
        ({"paper": " "}, r'method "new": paper is \' \''),
        ({"paper": None}, r'method "new": paper is None'),
        ({"config": dict}, r"config is <class 'dict'>, expected a dataclass of its settings"),
        ({"config": ZipConfig()}, r"config is ZipConfig\(.*, expected a dataclass"),
        ({"config": Unset}, r'method "new": Unset has no default for size'),
    ],
)
def test_what_a_line_of_the_table_lacks(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TunedMethod(**{**TUNED, **changed})
    if "config" not in changed or changed["config"] is not ZipConfig:
        with pytest.raises(ConfigError, match=said):
            HeadMethod(**{**HEAD, **changed})


def test_what_the_settings_of_a_tuned_method_lack() -> None:
    said = (
        r"Unfinished lacks perturbation_setting, round_size, step_queries, build \(derive it from"
    )
    with pytest.raises(ConfigError, match=said):
        TunedMethod(**{**TUNED, "config": Unfinished})
    with pytest.raises(ConfigError, match=r"GdaConfig lacks batch_size, needs, .*, build"):
        TunedMethod(**{**TUNED, "config": GdaConfig})


def test_what_a_closed_form_must_give() -> None:
    with pytest.raises(ConfigError, match=r'method "new": fit is None, expected a function'):
        HeadMethod(**{**HEAD, "fit": None})
    features: F32 = np.eye(2, 4, dtype=np.float32)
    shots = Shots(features, np.arange(2), features, 1.0)
    assert HeadMethod(**HEAD).fit_shots(GdaConfig(), shots, 0).chosen == {"alpha": 1.0}
    wrong = HeadMethod(**{**HEAD, "fit": lambda *_: features})
    with pytest.raises(ConfigError, match=r'method "new": fit returned ndarray, expected ztune'):
        wrong.fit_shots(GdaConfig(), shots, 0)


def test_what_a_build_must_give() -> None:
    table: F32 = np.zeros((9, 4), np.float32)
    spec = ModelSpec(
        4, table, lambda _: table[:2], 8, lambda g: g.random(3), None,
        lambda _: np.arange(2), lambda: np.arange(9), 60,
    )  # fmt: skip
    parts: Any = build_method(ZipConfig(), spec, 100, 1)
    context = DirectContext(table[:2])

    def building(found: Any) -> ZipConfig:
        class Wrong(ZipConfig):
            def build(self, spec: ModelSpec, queries: int, seed: int) -> Composition:
                return found

        return Wrong()

    for found, said in (
        (None, r"Wrong.build returned NoneType, expected a map and an optimizer"),
        (parts[:1], r"Wrong.build returned tuple, expected a map and an optimizer"),
        (parts[::-1], r"Wrong.build: Spsa lacks dim, __call__ of a PromptMap"),
        ((context, context), r"DirectContext lacks ask, tell, .*restore of a Optimizer"),
    ):
        with pytest.raises(ConfigError, match=said):
            build_method(building(found), spec, 100, 1)
