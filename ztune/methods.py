"""The table of methods: a tuned method is a map and an optimizer, a closed-form one is a head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ztune.access import FEATURES, TEXTS, described
from ztune.compositions.base import TunedConfig
from ztune.compositions.outputs import Answers, OgnConfig, OgnContextConfig
from ztune.compositions.pixels import BarConfig, BlackVipConfig
from ztune.compositions.population import BptVlmConfig, SharpZoMethodConfig, TextCmaConfig
from ztune.compositions.steps import DirectRgfConfig, DirectSpsaConfig, SpsaGcConfig, ZipConfig
from ztune.errors import ConfigError
from ztune.heads.base import Fitted, Shots
from ztune.heads.gda import GdaConfig, fit_gda
from ztune.heads.linear_probe import LinearProbeConfig, fit_linear_probe
from ztune.heads.lp_plus import LpPlusConfig, fit_lp_plus
from ztune.heads.proker import ProkerConfig, fit_proker
from ztune.heads.tip import TipConfig, fit_tip
from ztune.heads.zero_shot import ZeroShotConfig, fit_zero_shot
from ztune.io.config import as_json, configured, nearest
from ztune.types import Json

PRESETS = ("default", "published", "tuned")
"""default: the published optimizer on centre crops. published: with the published random crops too.
tuned: settings that did better in our measurements, where there are such (docs/methods.md)."""


@dataclass(frozen=True)
class TunedMethod:
    """A method that asks for losses."""

    name: str
    title: str
    paper: str
    config: type[Any]
    """Builds a TunedConfig."""
    augment: int = 0
    """Cached random views per training image in preset `published`."""
    tuned: Mapping[str, Json] = field(default_factory=dict)
    """Settings of preset `tuned`; empty where the published ones were not beaten."""

    def serves_new_classes(self) -> bool:
        return True


@dataclass(frozen=True)
class HeadMethod:
    """A method in closed form on image features."""

    name: str
    title: str
    paper: str
    config: type[Any]
    fit: Callable[[Any, Shots, int], Fitted]

    def serves_new_classes(self) -> bool:
        return False


Method = TunedMethod | HeadMethod
_BLACK_BOX = "with the settings of its comparison in ZIP"
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        TunedMethod(
            "ogn",
            "random prompts mixed by Gauss–Newton in the space of logits",
            "ours (docs/research/ogn.md)",
            OgnConfig,
            tuned={"init": "random", "n_context": 8},
        ),
        TunedMethod(
            "ogn-context",
            "a context moved by Gauss–Newton steps in the space of logits",
            "ours (docs/research/ogn.md)",
            OgnContextConfig,
        ),
        TunedMethod(
            "zip",
            "low-rank, intrinsically clipped zeroth-order prompt tuning",
            "ZIP, ICLR 2025 (arXiv 2504.06838)",
            ZipConfig,
            augment=16,
        ),
        TunedMethod(
            "sharpzo",
            "sharpness-aware CMA-ES, then sparse zeroth-order steps on a projected context",
            "SharpZO, NeurIPS 2025 (arXiv 2506.20990)",
            SharpZoMethodConfig,
            tuned={"warmup_steps": 1, "prune_every": 2000, "step_size": 0.01},
        ),
        TunedMethod(
            "bptvlm",
            "CMA-ES on projected contexts and image tokens",
            f"BPT-VLM, IJCAI 2023, {_BLACK_BOX}",
            BptVlmConfig,
        ),
        TunedMethod(
            "cma",
            "CMA-ES on a projected context",
            "BBT, ICML 2022 (arXiv 2201.03514)",
            TextCmaConfig,
        ),
        TunedMethod(
            "spsa",
            "simultaneous perturbation of the context's own values",
            "Spall 1992; decays of Spall 1998",
            DirectSpsaConfig,
            tuned={"step_size": 1.0},
        ),
        TunedMethod(
            "spsa-gc",
            "simultaneous perturbation of the context's own values with gradient correction",
            "optimizer of BlackVIP, CVPR 2023 (arXiv 2303.14773)",
            SpsaGcConfig,
        ),
        TunedMethod(
            "rgf",
            "one-sided random gradient-free steps on the context's own values",
            "Nesterov and Spokoiny 2017",
            DirectRgfConfig,
        ),
        TunedMethod(
            "blackvip",
            "an image-dependent visual prompt from a small decoder",
            f"BlackVIP, CVPR 2023 (arXiv 2303.14773), {_BLACK_BOX}",
            BlackVipConfig,
            augment=16,
        ),
        TunedMethod(
            "bar",
            "black-box adversarial reprogramming: a trained border around the image",
            f"BAR, ICML 2020 (arXiv 2007.08714), {_BLACK_BOX}",
            BarConfig,
            augment=16,
        ),
        HeadMethod(
            "gda",
            "Gaussian discriminant analysis on features, blended with zero-shot",
            "Wang et al., ICLR 2024",
            GdaConfig,
            fit_gda,
        ),
        HeadMethod(
            "tip-adapter",
            "a cache of the training features beside zero-shot, training-free",
            "Zhang et al., ECCV 2022 (arXiv 2207.09519)",
            TipConfig,
            fit_tip,
        ),
        HeadMethod(
            "lp++",
            "a linear probe blended with the text features, step sizes in closed form",
            "Huang et al., CVPR 2024 (arXiv 2404.02285)",
            LpPlusConfig,
            fit_lp_plus,
        ),
        HeadMethod(
            "proker",
            "kernel ridge regression on what zero-shot leaves over",
            "Bendou et al., CVPR 2025 (arXiv 2501.11175)",
            ProkerConfig,
            fit_proker,
        ),
        HeadMethod(
            "linear-probe",
            "logistic regression on image features, without texts",
            "Radford et al., ICML 2021 (arXiv 2103.00020)",
            LinearProbeConfig,
            fit_linear_probe,
        ),
        HeadMethod(
            "zero-shot",
            "hand-written prompts, one or an ensemble: nothing is tuned",
            "Radford et al., ICML 2021 (arXiv 2103.00020)",
            ZeroShotConfig,
            fit_zero_shot,
        ),
    )
}


def find_method(name: str) -> Method:
    """Return a method of the table.

    Raises: ConfigError listing the known names.
    """
    if name not in METHODS:
        raise ConfigError(
            f'unknown method "{name}"{nearest(name, METHODS)}; known: {", ".join(METHODS)}'
        )
    return METHODS[name]


def views_of(name: str, preset: str) -> int:
    """Return how many cached views of each image a preset asks for."""
    method = find_method(name)
    return method.augment if preset == "published" and isinstance(method, TunedMethod) else 0


def method_config(method: Method, settings: Mapping[str, Json], preset: str = "default") -> Any:
    """Return the method's configuration: `settings` over its preset.

    Raises: ConfigError for a setting that it does not have, or a value that it cannot take.
    """
    chosen: dict[str, Json] = {}
    if preset == "tuned" and isinstance(method, TunedMethod):
        chosen |= method.tuned
    return configured(method.config, {**chosen, **settings}, f'method "{method.name}"')


def tuned_config(method: Method, config: Any) -> TunedConfig | None:
    """Return a tuned method's configuration, None for a head's."""
    if not isinstance(method, TunedMethod):
        return None
    tuned: TunedConfig = config.in_effect if isinstance(config, Answers) else config
    return tuned


def needs_of(method: Method, config: Any) -> frozenset[str]:
    """Return what the runtime must give a method so configured."""
    tuned = tuned_config(method, config)
    return frozenset((FEATURES, TEXTS)) if tuned is None else tuned.needs


def needs_of_all() -> dict[str, frozenset[str]]:
    """Return what every method of the table needs with its defaults."""
    return {name: needs_of(method, method.config()) for name, method in METHODS.items()}


def preset_changes(method: Method) -> dict[str, dict[str, Json]]:
    """Return what each preset changes; a preset that changes nothing is left out."""
    default, tuned = (as_json(method_config(method, {}, name)) for name in ("default", "tuned"))
    changes: dict[str, dict[str, Json]] = {
        "published": {"augment": views} if (views := views_of(method.name, "published")) else {},
        "tuned": {key: value for key, value in tuned.items() if value != default[key]},
    }
    return {name: changed for name, changed in changes.items() if changed}


def method_to_json(method: Method) -> dict[str, Json]:
    """Return what there is to know of a method, with its default settings."""
    config = method.config()
    needs = needs_of(method, config)
    document: dict[str, Json] = {
        "name": method.name,
        "title": method.title,
        "paper": method.paper,
        "needs": [*sorted(needs)],
        "capabilities": described(needs),
        "serves_new_classes": method.serves_new_classes(),
        "settings": as_json(config),
        "presets": {name: dict(changes) for name, changes in preset_changes(method).items()},
    }
    if isinstance(method, TunedMethod):
        document["first_step_queries"] = config.step_queries()
        document["encodes_images_every_query"] = config.program is not None
    return document
