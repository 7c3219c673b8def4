"""What every tuned method of the table keeps to, and its published settings."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

from runtimes import decoder
from ztune.capabilities import CONTEXTS, FEATURES, IMAGE_TOKENS, LOGITS, LOSS, PIXELS
from ztune.errors import ConfigError
from ztune.methods.answers import AnswersConfig
from ztune.methods.bar import BarConfig
from ztune.methods.base import ModelSpec, Patches, TunedConfig, TunedMethod
from ztune.methods.blackvip import BlackVipConfig
from ztune.methods.bptvlm import BptVlmConfig
from ztune.methods.cma import TextCmaConfig
from ztune.methods.ogn import OgnConfig
from ztune.methods.ogn_context import OgnContextConfig
from ztune.methods.registry import (
    METHODS,
    find_method,
    method_config,
    needs_of,
    tuned_config,
)
from ztune.methods.rgf import DirectRgfConfig
from ztune.methods.sharpzo import SharpZoConfig
from ztune.methods.spsa import DirectSpsaConfig
from ztune.methods.spsa_gc import SpsaGcConfig
from ztune.methods.zip import ZipConfig
from ztune.objective import LOGITS_AT_ONCE, cross_entropy
from ztune.optim.cma import Cma
from ztune.optim.rgf import Rgf
from ztune.system import one_blas_thread
from ztune.types import F64, I64, Evaluation, Json, Mixing, Optimizer, Prompts

D, SIZE, WIDTH, N_EXTRACTED = 16, 24, 12, 40
N_WORDS = 4
QUERIES = 5000
TUNED = {name: method for name, method in METHODS.items() if isinstance(method, TunedMethod)}
# Besides the defaults, other shapes of the same method.
CONFIGS: dict[str, TunedConfig] = {
    **{name: method.config() for name, method in TUNED.items()},
    **{f"{n} {p}": method_config(m, {}, p) for n, m in TUNED.items() for p in m.presets},
    "zip short": ZipConfig(n_context=2, intrinsic_dim=11, rank=1, n_pairs=1),
    "bptvlm text": BptVlmConfig(part="text", text_dim=30),
    "bptvlm vision": BptVlmConfig(part="vision", vision_dim=20, n_tokens=2),
    "bptvlm full": BptVlmConfig(text_dim=30, vision_dim=20, covariance="full", population=None),
    "cma population of the dimension": TextCmaConfig(population=None, intrinsic_dim=33),
    "cma random": TextCmaConfig(init="random", n_context=3, intrinsic_dim=10),
    "sharpzo uneven": SharpZoConfig(intrinsic_dim=21, population=5, probes_per_call=4),
    "sharpzo validating": SharpZoConfig(intrinsic_dim=5, warmup_patience=2),
    "sharpzo large population": SharpZoConfig(intrinsic_dim=5, population=50),
    "rgf one": DirectRgfConfig(n_directions=1, init="random"),
    "ogn one": OgnConfig(n_prompts=1, init="random", n_context=3),
    "ogn with losses only": OgnConfig(answers="loss").in_effect,
    "ogn-context one": OgnContextConfig(n_directions=1, init="three words here"),
}


PATCHES = Patches(WIDTH, 48, 0.01, 0.1)
# No text has the others: ids that frame it, say.
WORDS: I64 = np.delete(np.arange(100), [0, 90, 98, 99])
LABELS = np.arange(60) % 3


def towers(patches: Patches | None = PATCHES) -> ModelSpec:
    table = np.random.default_rng(0).standard_normal((100, D)).astype(np.float32)
    return ModelSpec(
        text_width=D,
        token_table=table,
        context_of_words=lambda words: table[: len(words.split())],
        image_size=SIZE,
        decoder_start=lambda rng: decoder.initial_values(N_EXTRACTED, SIZE, rng),
        patches=patches,
        ids_of_words=lambda words: np.arange(len(words.split())),
        words=lambda: WORDS,
        n_images=len(LABELS),
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As a run does: many small products are slower on several threads."""
    with one_blas_thread():
        yield


@pytest.fixture(params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def config(request: pytest.FixtureRequest) -> TunedConfig:
    return CONFIGS[request.param]


@cache
def slopes(dim: int) -> F64:
    return np.random.default_rng(dim).standard_normal((dim, 3 * len(LABELS))) / np.sqrt(dim)


def answer(optimizer: Optimizer, points: F64) -> None:
    """Answer as a model does whose logits depend on every value of the point."""
    logits = np.sin(0.5 + points @ slopes(points.shape[1])).reshape(-1, len(LABELS), 3)
    wide = logits.astype(np.float32)
    losses = cross_entropy(wide, LABELS).mean(axis=-1)
    accuracies = (wide.argmax(axis=-1) == LABELS).mean(axis=-1)
    optimizer.tell(Evaluation(losses, accuracies, LABELS, 1, wide))


def bytes_of(prompts: Prompts) -> bytes:
    parts = (prompts.contexts, prompts.visual)
    return b"|".join(b"" if part is None else part.tobytes() for part in parts)


def test_map_and_optimizer_fit_and_send_what_the_program_says(config: TunedConfig) -> None:
    prompt_map, optimizer = config.build(towers(), QUERIES, 1)
    start = optimizer.recommend()
    assert start.shape == (prompt_map.dim,)
    points = optimizer.ask().points
    assert points.shape[1] == prompt_map.dim
    prompts = prompt_map(points)
    assert len(prompts) == len(points)
    for part in (prompts.contexts, prompts.visual):
        assert part is None or (part.dtype == np.float32 and np.isfinite(part).all())
    visual = None if prompts.visual is None else prompts.visual.shape[1:]
    if config.program is None:
        assert visual is None
    elif config.program == "border":
        assert visual == (3, SIZE, SIZE)
    elif config.program == "decoder":
        assert visual == (decoder.n_values(N_EXTRACTED, SIZE),)
    else:
        assert isinstance(config, BptVlmConfig)
        assert visual == (config.n_tokens, WIDTH)
    tunes_texts = config.program is None or getattr(config, "part", "") == "both"
    assert (prompts.contexts is not None) == tunes_texts
    if prompts.contexts is not None:
        n_context = getattr(config, "n_context", 0)
        if (init := getattr(config, "init", "random")) != "random":
            n_context = len(init.split())
        assert prompts.contexts.shape == (len(points), n_context, D)
    # A focal loss is computed from logits; the cross-entropy is asked for.
    assert (LOSS in config.needs) == (config.focal == 0)
    assert (LOGITS in config.needs) == (config.focal != 0 or isinstance(config, AnswersConfig))
    assert config.mixes == isinstance(optimizer, Mixing)
    assert (PIXELS in config.needs) == (config.program is not None)
    assert (IMAGE_TOKENS in config.needs) == (config.program == "tokens")
    assert (FEATURES in config.needs) == (config.program == "decoder" or config.ensembles)


def test_the_first_step_costs_what_is_said_in_calls_of_the_size_that_is_said(
    config: TunedConfig,
) -> None:
    _, optimizer = config.build(towers(), QUERIES, 1)
    before = optimizer.recommend()
    spent = 0
    while spent < config.step_queries():
        proposal = optimizer.ask()
        assert 0 < len(proposal.points) <= config.round_size
        inside = spent > 0 and not proposal.validation
        assert (proposal.same_batch, proposal.mid_step) == (inside, inside)
        spent += len(proposal.points)
        answer(optimizer, proposal.points)
    assert spent == config.step_queries()
    # A new step, on new images, but where logits are compared across steps.
    proposal = optimizer.ask()
    assert proposal.same_batch == isinstance(config, AnswersConfig)
    assert not proposal.mid_step
    if isinstance(optimizer, Mixing):
        mixture = optimizer.mixture()
        assert len(mixture.points) == len(mixture.weights) == spent
    else:
        assert not np.array_equal(optimizer.recommend(), before)


def test_the_largest_call_is_as_large_as_is_said(config: TunedConfig) -> None:
    _, optimizer = config.build(towers(), QUERIES, 1)
    largest, spent = 0, 0
    while spent < config.step_queries():
        proposal = optimizer.ask()
        largest, spent = max(largest, len(proposal.points)), spent + len(proposal.points)
        answer(optimizer, proposal.points)
    # Memory is planned for `round_size`.
    bound = config.round_size
    if isinstance(config, SharpZoConfig):
        bound = max(config.population, min(config.probes_per_call, 2 * config.intrinsic_dim))
    assert largest == bound


def test_a_seed_decides_everything(config: TunedConfig) -> None:
    def sent(seed: int) -> list[bytes]:
        prompt_map, optimizer = config.build(towers(), QUERIES, seed)
        rounds = []
        for _ in range(2):
            points = optimizer.ask().points
            rounds.append(bytes_of(prompt_map(points)))
            answer(optimizer, points)
        return rounds

    first = sent(1)
    assert sent(1) == first
    assert sent(2)[0] != first[0]


def test_the_finest_setting_is_one_of_its_own(config: TunedConfig) -> None:
    setting = config.perturbation_setting
    if setting is None:
        assert config.mixes
        _, optimizer = config.build(towers(), QUERIES, 1)
        with pytest.raises(ConfigError, match="compares no neighbouring points"):
            optimizer.probes(1, np.random.default_rng(0))
    else:
        name, value = setting
        assert getattr(config, name) == value > 0


def test_sharpzo_costs_1064_queries_a_step_as_published() -> None:
    config = SharpZoConfig()
    assert (config.intrinsic_dim, config.population) == (512, 40)
    assert config.step_queries() == 1064
    assert SharpZoConfig(warmup_patience=10).step_queries() == 1065
    assert config.validates is False
    assert SharpZoConfig(warmup_patience=10).validates is True


def test_dimensions_as_published() -> None:
    def dim(config: TunedConfig, given: ModelSpec | None = None) -> int:
        return config.build(given or towers(), QUERIES, 1)[0].dim

    assert dim(ZipConfig()) == 417
    assert dim(BptVlmConfig()) == 4000
    assert dim(BptVlmConfig(part="text")) == dim(BptVlmConfig(part="vision")) == 2000
    assert dim(TextCmaConfig()) == 500
    assert dim(SharpZoConfig()) == 512
    assert dim(BarConfig()) == 3 * SIZE * SIZE
    assert dim(BlackVipConfig()) == decoder.n_values(N_EXTRACTED, SIZE)
    for config in (DirectSpsaConfig(), SpsaGcConfig(), DirectRgfConfig()):
        assert dim(config) == N_WORDS * D
    assert dim(OgnConfig()) == N_WORDS
    assert dim(OgnContextConfig()) == 8 * D
    # A tower of 224 px and an extractor of 768 values, as in the papers.
    published = ModelSpec(
        D, towers().token_table, lambda _: np.zeros((1, D), np.float32), 224,
        lambda rng: decoder.initial_values(768, 224, rng), None,
        lambda _: np.zeros(1, np.int64), lambda: WORDS, len(LABELS),
    )  # fmt: skip
    assert dim(BarConfig(), published) == 150_528
    assert dim(BlackVipConfig(), published) == 9_920


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (
            ZipConfig(),
            {
                "n_context": 8, "init": "random", "init_std": 0.02, "intrinsic_dim": 500, "rank": 5,
                "step_size": 0.01, "step_offset": 1.0, "step_decay": 0.4, "perturbation": 0.01,
                "perturbation_decay": 0.1, "n_pairs": 5, "clip": True, "momentum": 0.0,
                "batch_size": 128,
            },
        ),
        (
            SharpZoConfig(),
            {
                "n_context": 4, "init": "a photo of a", "smoothing": 1e-3, "radius": 0.1,
                "bound": 5.0, "prune_every": 200, "keep_fraction": 0.5, "step_size": 1e-3,
                "batch_size": None, "projection_std": 1.0, "warmup_steps": 100,
            },
        ),
        (
            BptVlmConfig(),
            {
                "population": 15, "sigma": 1.0, "n_context": 5, "n_tokens": 5, "text_dim": 2000,
                "vision_dim": 2000, "covariance": "separable", "keep": "best", "batch_size": None,
                "part": "both", "patch_values": 3072, "most_candidates": None,
            },
        ),
        (
            BarConfig(),
            {
                "focal_gamma": 2.0, "n_directions": 5, "perturbation": 0.01, "step_size": 10.0,
                "last_step_size": 0.1, "step_power": 0.9, "batch_size": 128,
                "decay_epochs": 900,
            },
        ),
        (
            BlackVipConfig(),
            {
                "momentum": 0.8, "n_pairs": 5, "clip": False, "step_size": 0.01,
                "step_decay": 0.4, "perturbation": 0.01, "perturbation_decay": 0.1,
                "batch_size": 128,
            },
        ),
        (
            TextCmaConfig(),
            {"intrinsic_dim": 500, "population": 20, "sigma": 1.0, "covariance": "full"},
        ),
        (SpsaGcConfig(), {"momentum": 0.8, "step_decay": 0.4, "perturbation_decay": 0.1}),
        (
            DirectSpsaConfig(),
            {"momentum": 0.0, "clip": False, "step_decay": 0.602, "perturbation_decay": 0.101},
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else "",
)  # fmt: skip
def test_defaults_as_published(config: object, published: dict[str, Any]) -> None:
    assert {name: getattr(config, name) for name in published} == published


def test_only_bar_has_a_focal_loss() -> None:
    focal = {name: method.config().focal for name, method in TUNED.items()}
    assert {name for name, gamma in focal.items() if gamma} == {"bar"}
    assert focal["bar"] == 2.0


def test_a_border_starts_from_a_normal_distribution_and_a_text_from_its_words() -> None:
    start = BarConfig().build(towers(), QUERIES, 1)[1].recommend()
    assert start.std() == pytest.approx(1, rel=0.05)
    assert abs(start.mean()) < 0.05
    words = np.asarray(towers().token_table[:3], np.float32)
    for config in (
        DirectSpsaConfig(init="one two three"),
        SharpZoConfig(init="one two three"),
        TextCmaConfig(init="one two three"),
        ZipConfig(init="one two three"),
    ):
        prompt_map, optimizer = config.build(towers(), QUERIES, 1)
        contexts = prompt_map(optimizer.recommend()[None]).contexts
        assert contexts is not None
        np.testing.assert_allclose(contexts[0], words, atol=1e-6)
    random = ZipConfig().initial(towers(), 1)
    assert random.shape == (8, D)
    assert random.std() == pytest.approx(0.02, rel=0.2)


def test_decaying_steps_know_the_budget() -> None:
    # After its last step the step size has come down to what it is to end with.
    for n_queries in (60, 600):
        config = BarConfig(step_size=5.0, last_step_size=0.5, decay_epochs=None)
        _, optimizer = config.build(towers(), n_queries, 1)
        for _ in range(n_queries // config.step_queries()):
            answer(optimizer, optimizer.ask().points)
        assert isinstance(optimizer, Rgf)
        assert optimizer._step_size == pytest.approx(0.5)


def test_settings_that_make_no_sense_are_refused() -> None:
    for name, setting, value in (
        ("zip", "rank", 0), ("zip", "intrinsic_dim", 0), ("zip", "n_context", 0),
        ("zip", "batch_size", 0), ("zip", "n_pairs", 0), ("cma", "intrinsic_dim", 0),
        ("cma", "population", 3), ("cma", "covariance", "round"), ("bptvlm", "part", "image"),
        ("bptvlm", "n_tokens", 0), ("bptvlm", "patch_values", 0), ("bptvlm", "most_candidates", 0),
        ("bptvlm", "keep", "first"), ("cma", "bound", 0.0), ("bar", "decay_epochs", 0),
        ("sharpzo", "bound", 0.0), ("sharpzo", "bound", -5.0), ("sharpzo", "prune_every", 0),
        ("sharpzo", "copies", 0), ("sharpzo", "differences_at", "best"),
        ("bptvlm", "text_dim", 0), ("bptvlm", "vision_dim", 0),
        ("sharpzo", "projection_std", 0.0), ("sharpzo", "intrinsic_dim", 0),
        ("blackvip", "batch_size", 0), ("blackvip", "momentum", 1.0), ("bar", "focal_gamma", -1.0),
        ("bar", "n_directions", 0), ("rgf", "perturbation", 0.0), ("spsa", "step_size", 0.0),
        ("ogn", "n_prompts", 0), ("ogn", "rank", 0), ("ogn", "most_prompts", 0),
        ("ogn", "ridge", 0.0), ("ogn", "tolerance", -1.0), ("ogn", "n_context", 0),
        ("ogn", "batch_size", 0), ("ogn", "memory_mb", 0), ("ogn-context", "n_directions", 0),
        ("ogn-context", "n_context", 0), ("ogn-context", "damping", 0.0),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=setting):
            method_config(find_method(name), {setting: value})


def test_tokens_need_a_tower_that_takes_them() -> None:
    with pytest.raises(ConfigError, match="takes no extra tokens"):
        BptVlmConfig().build(towers(None), QUERIES, 1)
    BptVlmConfig(part="text", text_dim=10).build(towers(None), QUERIES, 1)
    method = find_method("bptvlm")
    assert needs_of(method, BptVlmConfig(part="text")) == {LOSS, CONTEXTS}


@pytest.mark.parametrize(
    ("config", "queries"),
    [
        (TextCmaConfig(intrinsic_dim=20_000), 5000),  # memory
        (BptVlmConfig(covariance="full"), 5000),  # time
        (TextCmaConfig(intrinsic_dim=3000), 20_000),  # time, of many generations
    ],
    ids=["memory", "time", "generations"],
)
def test_a_covariance_out_of_reach_is_refused_before_anything_is_made(
    config: TunedConfig, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cma, "__init__", lambda *_: pytest.fail("it was made"))
    with pytest.raises(ConfigError, match=r"too much .*separable covariance"):
        config.build(towers(), queries, 1)


def test_a_covariance_within_reach_is_not_refused() -> None:
    TextCmaConfig().build(towers(), 100_000, 1)
    BptVlmConfig().build(towers(), 1_000_000, 1)
    # Its own paper's size.
    config = BptVlmConfig(text_dim=500, vision_dim=500, covariance="full", population=30)
    config.build(towers(), 8000, 1)


def test_how_much_of_its_logits_an_endpoint_gives_away() -> None:
    for kind in (OgnConfig, OgnContextConfig):
        assert [kind(answers=a).top_classes for a in ("logits", "label", "top-1", "top-37")] == [
            None, 1, 1, 37,
        ]  # fmt: skip
        for answers in ("logits", "label", "top-5"):
            config = kind(answers=answers)
            assert config.in_effect is config
            assert needs_of(find_method("ogn"), config) == {LOSS, CONTEXTS, LOGITS}
            assert config.notice == ""
        for answers in ("", "top", "top-0", "top-05", "top--1", "top-5 ", "Logits", "top-1234567"):
            with pytest.raises(ConfigError, match=r"expected logits, top-K such as top-5, label"):
                kind(answers=answers)


def test_losses_alone_are_tuned_by_the_steps_of_zip() -> None:
    for name in ("ogn", "ogn-context"):
        method = find_method(name)
        config = method_config(method, {"answers": "loss"})
        tuned = tuned_config(method, config)
        assert isinstance(tuned, ZipConfig)
        assert needs_of(method, config) == {LOSS, CONTEXTS}
        assert (tuned.step_queries(), tuned.round_size) == (10, 10)
        assert "answers=loss" in tuned.notice
        assert "tuning with ZIP" in tuned.notice
    assert ZipConfig().notice == ""


def test_no_other_method_mixes_or_hides_classes() -> None:
    for name, config in CONFIGS.items():
        if not isinstance(config, AnswersConfig):
            assert (config.mixes, config.keeps_batch, config.top_classes) == (
                False, False, None,
            ), name  # fmt: skip
            assert bool(config.notice) == (name == "ogn with losses only")
            assert config.spends(1234) == 1234
            assert config.images_of(40, 3) == min(40, config.batch_size or 40)
    assert ZipConfig().images_of(1000, 3) == 128


def test_methods_that_fit_logits_see_the_same_images_in_all_rounds() -> None:
    for kind in (OgnConfig, OgnContextConfig):
        for answers in ("logits", "label", "top-5"):
            assert kind(answers=answers).in_effect.keeps_batch
        assert not kind(answers="loss").in_effect.keeps_batch


def test_a_mixtures_prompts_are_as_long_as_its_words() -> None:
    cases: tuple[tuple[dict[str, Json], int], ...] = (
        ({}, 4), ({"init": "two words"}, 2), ({"init": "random"}, 4),
        ({"init": "random", "n_context": 7}, 7),
    )  # fmt: skip
    for settings, n_tokens in cases:
        config = method_config(find_method("ogn"), settings)
        assert config.build(towers(), QUERIES, 1)[1].ask().points.shape == (10, n_tokens)
    for init in ("a photo of a", "two words"):
        with pytest.raises(ConfigError, match="n_context requires init=random"):
            method_config(find_method("ogn"), {"n_context": 2, "init": init})
    with pytest.raises(ConfigError, match="n_context requires init=random"):
        OgnConfig(n_context=4)


def test_a_mixture_tells_what_it_fitted_at_the_end_of_what_it_spends() -> None:
    config = OgnConfig(n_prompts=5, most_prompts=30)
    _, optimizer = config.build(towers(), QUERIES, 1)
    assert isinstance(optimizer, Mixing)
    told = []
    for _ in range(6):
        answer(optimizer, optimizer.ask().points)
        told.append(optimizer.fitted() is not None)
    assert told == [True, True, False, True, False, True]


def test_images_whose_logits_fit_the_memory() -> None:
    # 4 bytes of every class, image and row: twice the rank, and a round's.
    config: OgnConfig | OgnContextConfig = OgnConfig(rank=10, n_prompts=5, memory_mb=1)
    assert config.images_of(10**6, 100) == 10**6 // (4 * 25 * 100)
    assert config.images_of(99, 100) == 99
    assert OgnConfig(rank=10, n_prompts=5, memory_mb=1, batch_size=7).images_of(99, 100) == 7
    assert config.images_of(99, 10**6) == 1
    # The rank gives way to images down to 40, and stays where they are few.
    most = OgnConfig().images_of(16_000, 1000)
    assert most == 512_000_000 // (4 * (2 * 40 + 10) * 1000)
    assert OgnConfig().rank_of(most * 1000) == 40
    assert OgnConfig().rank_of(387 * 1000) == 160
    assert OgnConfig(rank=41).images_of(16_000, 1000) == most
    assert OgnConfig(rank=39).images_of(16_000, 1000) == 512_000_000 // (4 * 88 * 1000)
    # Four rounds of directions, f32, in 256 MB.
    assert OgnContextConfig().images_of(16_000, 1000) == 256_000_000 // (4 * 4 * 10 * 1000)
    # However much memory there is, an answer keeps its logits.
    plenty = (
        OgnConfig(n_prompts=100, rank=1, memory_mb=10**6),
        OgnContextConfig(memory_mb=1e6),
        OgnContextConfig(n_directions=1, memory_mb=1e6),
    )
    for config in plenty:
        n_images = config.images_of(10**6, 1000)
        assert config.round_size * n_images * 1000 <= LOGITS_AT_ONCE
        assert config.round_size * (n_images + 1) * 1000 > LOGITS_AT_ONCE


@pytest.mark.parametrize("n_prompts", [1, 7, 10, 30])
def test_a_mixture_spends_what_is_said_and_ends(n_prompts: int) -> None:
    config = OgnConfig(n_prompts=n_prompts, most_prompts=20, rank=5)
    _, optimizer = config.build(towers(), QUERIES, 1)
    spent = 0
    while optimizer.finished() is None:
        assert spent < 20
        points = optimizer.ask().points
        spent += len(points)
        answer(optimizer, points)
    assert optimizer.finished() == "prompts"
    assert spent == config.spends(QUERIES) == -(-20 // n_prompts) * n_prompts
    assert config.spends(13) == 13
    assert OgnConfig(most_prompts=None).spends(10**6) == 10**6


def test_a_mixture_draws_words_and_never_what_frames_a_text() -> None:
    prompt_map, optimizer = OgnConfig(n_prompts=2000).build(towers(), QUERIES, 1)
    points = optimizer.ask().points
    np.testing.assert_array_equal(points[0], np.arange(N_WORDS))
    drawn = set(points[1:].ravel().astype(int).tolist())
    assert drawn == set(WORDS[1:].tolist())  # rank 1 is the first that is drawn
    contexts = prompt_map(points).contexts
    assert contexts is not None
    np.testing.assert_array_equal(contexts[0], towers().token_table[:N_WORDS])
