"""What a person types wrong: exit code 1 and one line that says what to do."""

import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.quantize import quantize_bundle
from runtimes.bundle import load_bundle
from runtimes.ort import OrtPromptEncoder
from runtimes.visual import BorderPrompts, VisualPrompts
from tests.conftest import DIGITS, MINI, Command, Result
from ztune.artifact import MixtureArtifact, read_artifact, write_artifact
from ztune.capabilities import (
    CONTEXTS,
    EVERYTHING,
    FEATURES,
    IMAGE_TOKENS,
    LOGITS,
    LOSS,
    PIXELS,
    TEXTS,
    missing_capability,
)
from ztune.cli import tune
from ztune.cli.output import Output, fail
from ztune.cli.parser import parser_of
from ztune.cli.run_settings import run_config_of, settings_of
from ztune.errors import ConfigError
from ztune.methods.base import TunedMethod
from ztune.methods.bptvlm import BptVlmConfig
from ztune.methods.registry import METHODS, needs_of, needs_of_all, possible_method
from ztune.objective import FewShotObjective
from ztune.types import F32, I32, U8, Batch, Evaluation, Prompts

SMALL = ("--shots", 2, "--queries", 10)


@pytest.fixture
def ztune(ztune: Command) -> Command:
    """Leave remarks out: what is left on standard error is warnings and the error."""
    return lambda *words, quiet=True: ztune(*words, *["--quiet"] * quiet)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return three classes of eight digits."""
    root = tmp_path / "data"
    for name in ("one", "two", "three"):
        (root / name).mkdir(parents=True)
        for image in sorted((DIGITS / name).iterdir())[:8]:
            shutil.copy(image, root / name)
    return root


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MINI, tmp_path / "bundle"))


def refused(result: Result, *parts: str) -> None:
    assert result.code == 1, result.err
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0], lines[0]


def edit(manifest: Path, change: Callable[[dict[str, object]], object]) -> None:
    document = json.loads(manifest.read_text())
    change(document)
    manifest.write_text(json.dumps(document))


def test_bundle_problems(ztune: Command, data: Path, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def tune(which: Path) -> Result:
        shutil.rmtree(out, ignore_errors=True)
        return ztune("tune", which, "--data", data, *SMALL, "--out", out)

    refused(tune(tmp_path / "nowhere"), "nowhere", "does not exist", "ztune export")
    refused(tune(data), "is a folder without bundle.json")
    prompt = bundle / "prompt.onnx"
    whole = prompt.read_bytes()
    prompt.write_bytes(whole[: len(whole) // 2])
    refused(tune(bundle), "prompt.onnx has", "expected 671588", "export again")
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    prompt.write_bytes(changed)
    refused(tune(bundle), "prompt.onnx: SHA-256 differs from bundle.json", "export again")
    prompt.unlink()
    refused(tune(bundle), "prompt.onnx is missing")
    prompt.write_bytes(whole)
    edit(bundle / "bundle.json", lambda d: d.update(version=3))
    refused(tune(bundle), "format version 3 is newer", "upgrade ztune")
    (bundle / "bundle.json").write_text("{")
    refused(tune(bundle), "cannot be read as JSON")


def test_prompt_of_another_bundle(ztune: Command, data: Path, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert ztune("tune", MINI, "--data", data, *SMALL, "--out", out).code == 0
    edit(bundle / "bundle.json", lambda d: d.update(model_id="sha256:other"))
    prompt = out / "prompt.safetensors"
    packed = tmp_path / "c.onnx"
    refused(
        ztune("pack", bundle, "--prompt", prompt, "--out", packed),
        "was made for model", "sha256:other", "tune again",
    )  # fmt: skip
    assert not packed.exists()
    refused(
        ztune("eval", bundle, "--data", data, "--split", "all", "--prompt", prompt),
        "was made for model",
    )
    prompt.write_bytes(prompt.read_bytes()[:100])
    refused(ztune("eval", out), "damaged or not written by ztune")


def test_a_mixture_of_words_that_the_bundle_has_not(
    ztune: Command, data: Path, tmp_path: Path
) -> None:
    out, prompt = tmp_path / "run", tmp_path / "other.safetensors"
    words = ("--shots", 2, "--queries", 2, "--method", "ogn", "--set", "n_prompts=2")
    tuned = ztune("tune", MINI, "--data", data, *words, "--out", out)
    assert tuned.code == 0, tuned.err
    artifact = read_artifact(out / "prompt.safetensors")
    assert isinstance(artifact, MixtureArtifact)
    n_words = len(np.load(MINI / "token_table.npy", mmap_mode="r"))
    last = artifact.tokens.copy()
    last[1, 0] = n_words - 1
    beyond = artifact.tokens.copy()
    beyond[1, 0] = n_words

    names = tmp_path / "names.txt"  # in another order, so that texts are encoded again
    names.write_text("two\nthree\none")

    def evaluated(tokens: I32) -> Result:
        write_artifact(prompt, replace(artifact, tokens=tokens))
        given = ("--prompt", prompt, "--classes", names)
        return ztune("eval", MINI, "--data", data, "--split", "all", *given)

    assert evaluated(last).code == 0
    refused(
        evaluated(beyond),
        f"the mixture has token {n_words}, the bundle's table ends at {n_words - 1}",
        "use the bundle it was tuned on",
    )
    packed = tmp_path / "c.onnx"
    pack = ("pack", MINI, "--prompt", prompt, "--classes", names, "--out", packed)
    refused(ztune(*pack), "the bundle's table ends at")
    assert not packed.exists()
    # Weights that every reader takes, and a sum that no classifier can.
    for large in (3e38, -3e38):
        weights = np.full(len(artifact.weights), large, np.float32)
        write_artifact(prompt, replace(artifact, weights=weights))
        refused(ztune(*pack), "text features are not finite or far too large", "damaged")
        assert not packed.exists()


def test_data_problems(ztune: Command, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def tune(folder: Path, *more: object) -> Result:
        return ztune("tune", MINI, "--data", folder, *SMALL, "--out", out, *more)

    empty = tmp_path / "empty"
    empty.mkdir()
    refused(tune(empty), "contains no images")
    refused(tune(tmp_path / "nowhere"), "does not exist")
    one = tmp_path / "one-class"
    shutil.copytree(data / "one", one / "one")
    refused(tune(one), 'has only one class, "one"')
    refused(tune(data, "--shots", 16), 'class "', "expected at least 16 (--shots)")

    text = data / "one" / "0.jpg"
    text.write_text("not an image")
    # Broken images are named before any other reason, and before anything is written.
    broken = tune(data, "--shots", 9, "--val", 0, "--test-fraction", 0)
    refused(broken, "0.jpg", "--skip-broken")
    assert not out.exists()
    broken = tune(data, "--shots", 9, "--val", 0, "--test-fraction", 0, "--skip-broken")
    refused(broken, 'class "three" has 8 training images')
    for name in ("two", "three"):
        extra = sorted((DIGITS / name).iterdir())[20]
        shutil.copy(extra, data / name)
    kept = tune(data, "--shots", 9, "--val", 0, "--test-fraction", 0, "--skip-broken", "--json")
    assert kept.code == 0, kept.err
    assert kept.json["broken_images"] == 1
    assert kept.json["val_accuracy"] is None
    shutil.rmtree(out)
    text.unlink()

    twin = data / "t_wo", data / "t wo"
    for folder in twin:
        shutil.copytree(data / "one", folder)
    refused(tune(data), '"t wo" and "t_wo" have the same class name')
    shutil.rmtree(twin[0])
    for image in twin[1].iterdir():
        image.unlink()
    for image in sorted((DIGITS / "nine").iterdir())[:8]:
        shutil.copy(image, twin[1])
    (data / "ONE").mkdir()
    for image in sorted((DIGITS / "four").iterdir())[:8]:
        shutil.copy(image, data / "ONE")
    refused(tune(data), "have the same tokens", "'ONE'", "'one'")


def test_output_problems(ztune: Command, data: Path, tmp_path: Path) -> None:
    def tune(out: Path) -> Result:
        return ztune("tune", MINI, "--data", data, *SMALL, "--out", out)

    blocked = tmp_path / "file"
    blocked.write_text("")
    refused(tune(blocked / "run"), "cannot be written")
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine.txt").write_text("")
    refused(tune(occupied), "is not empty", "name another")
    assert (occupied / "mine.txt").exists()
    run = tmp_path / "run"
    assert tune(run).code == 0
    refused(tune(run), "is a finished run", "--overwrite")
    packed = tmp_path / "c.onnx"
    pack = ("pack", MINI, "--prompt", run / "prompt.safetensors", "--out")
    assert ztune(*pack, packed).code == 0
    refused(ztune(*pack, packed), "exists", "--force")
    assert ztune(*pack, packed, "--force").code == 0
    refused(ztune(*pack, tmp_path / "no" / "c.onnx"), "cannot be written")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--queries", 3), ("--queries 3 is less than one step of auto, which costs 10",)),
        (("--method", "magic"), ('unknown method "magic"', "known: auto, ogn, ogn-context, zip")),
        (("--set", "step_size=1"), ('no setting "step_size"', "it has: answers")),
        (("--set", "rank=many"), ("rank is 'many', expected int",)),
        (("--set", "rank"), ('--set is "rank", expected KEY=VALUE',)),
        (("--set", "n_context=30"), ("n_context requires init=random",)),
        (
            ("--set", "n_context=30", "--init", "random"),
            ("is too long", "shorten the context or the name"),
        ),
        (("--provider", "cuda"), ("provider cuda is not in this build", "--provider cpu")),
        (("--provider", "tpu"), ('unknown provider "tpu"',)),
        (("--threads", 0), ("--threads is 0, expected at least 1",)),
        (("--threads", 100000), ("--threads is 100000, expected at most 1024",)),
        (
            ("--memory-limit", 1, "--set", "n_prompts=4000", "--queries", 4000),
            ("--memory-limit is 1 (MB), expected at least",),
        ),
        (("--preset", "best"), ('unknown preset "best"',)),
        (("--template", "a photo"), ("has 0 {}, expected one",)),
        (("--shots", 0), ("--shots is 0",)),
        (("--test-fraction", "most"), ('--test-fraction is "most"',)),
        (("--augment", -1), ("--augment is -1",)),
        (("--seed", -1), ("--seed",)),
        (("--test-data", "nowhere"), ("nowhere", "does not exist")),
        (("--names", "nowhere"), ("nowhere",)),
        (("--resume", "somewhere"), ("does not apply to --resume",)),
    ],
)
def test_wrong_settings(
    words: tuple[object, ...], parts: tuple[str, ...], ztune: Command, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    refused(ztune("tune", MINI, "--data", data, *SMALL, *words, "--out", out), *parts)
    assert not out.exists()


def test_wrong_targets(ztune: Command, data: Path, tmp_path: Path) -> None:
    refused(ztune("tune", MINI, "--out", tmp_path / "x"), "--data is required")
    refused(ztune("tune", "--resume", tmp_path), "is a folder without run.json")
    refused(ztune("eval", tmp_path / "x"), "does not exist")
    refused(ztune("eval", data), "is a folder without run.json and bundle.json")
    refused(ztune("eval", MINI), "--data FOLDER or --split-file")
    refused(ztune("eval", MINI, "--data", data), "has no test images", "--split all")
    names, split = tmp_path / "names.txt", tmp_path / "split.json"
    refused(
        ztune("eval", MINI, "--split-file", split, "--names", names), "--names does not apply to"
    )
    other = tmp_path / "c.onnx"
    other.write_text("no graph")
    refused(ztune("predict", other, data), "cannot be opened")
    shutil.copy(MINI / "image.onnx", other)
    refused(ztune("predict", other, data), "was not packed by ztune")
    refused(ztune("predict", tmp_path / "x.onnx", data), "does not exist")


def test_a_run_without_test_images_says_where_they_could_come_from(
    ztune: Command, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ("--shots", 8, "--queries", 10, "--out", out, "--json")
    done = ztune("tune", MINI, "--data", data, *words, quiet=False)
    assert done.code == 0, done.err
    assert done.json["val_accuracy"] is None
    assert "no test set" in done.err
    assert "no validation images" in done.err
    refused(ztune("eval", out), "has no test images", "--test-data")


@pytest.mark.parametrize(
    "verb", ["export", "tune", "eval", "pack", "predict", "quantize", "doctor"]
)
def test_every_verb_has_help_with_an_example(verb: str, ztune: Command) -> None:
    shown = ztune(verb, "--help")
    assert shown.code == 0
    assert f"example:\n  ztune {verb}" in shown.out
    assert "--json" in shown.out


def test_every_line_of_tunes_example_can_be_asked_for() -> None:
    given = [shlex.split(line)[2:] for line in tune.EXAMPLE.splitlines()]
    for words in given:
        arguments = parser_of("tune").read(words)
        if arguments.resume is None:
            assert run_config_of(arguments, settings_of(arguments)).method_config
    assert any("--set" in words for words in given)


def test_wrong_usage_exits_with_2(ztune: Command) -> None:
    assert ztune("tune", MINI, "--shots", "many").code == 2
    assert ztune().code == 2


def test_debug_shows_where_an_error_comes_from(ztune: Command, tmp_path: Path) -> None:
    assert "Traceback" in ztune("eval", tmp_path / "x", "--debug").err


def test_doctor_finds_a_damaged_bundle(ztune: Command, bundle: Path) -> None:
    sound = ztune("doctor", bundle, "--json")
    assert sound.code == 0, sound.err
    assert sound.json["ok"] is True
    assert sound.json["providers"]["cpu"] is None
    assert sound.json["bundle"]["seconds_per_query"] > 0
    for figures in sound.json["bundle"]["parity"].values():
        assert figures["here"]["max_abs"] < 1e-5
    (bundle / "text.onnx").write_bytes(b"x")
    damaged = ztune("doctor", bundle, "--json")
    assert damaged.code == 1
    assert damaged.json["ok"] is False
    assert "text.onnx has 1 bytes" in damaged.err


def test_names_are_for_data_only(ztune: Command, data: Path, tmp_path: Path) -> None:
    out, packed, names = tmp_path / "run", tmp_path / "c.onnx", tmp_path / "names.txt"
    tuned = ztune("tune", MINI, "--data", data, "--shots", 2, "--val", 1, "--queries", 10,
                  "--test-fraction", 0.5, "--out", out)  # fmt: skip
    assert tuned.code == 0, tuned.err
    assert ztune("pack", MINI, "--prompt", out / "prompt.safetensors", "--out", packed).code == 0
    names.write_text("one\teins\ntwo\tzwei\nthree\tdrei\n")
    refused(ztune("eval", out, "--names", names), "--names does not apply to")
    for target in (MINI, packed):
        given = ("eval", target, "--split-file", out / "split.json", "--names", names)
        refused(ztune(*given), "--names does not apply to")


def test_an_images_name_that_is_not_utf8(ztune: Command, data: Path, tmp_path: Path) -> None:
    from ztune.data.image_files import named_images
    from ztune.errors import DataError

    odd = Path(os.fsdecode(os.fsencode(data / "one") + b"/\xff.jpg"))
    try:
        odd.touch()
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    for named in (odd, data):
        with pytest.raises(DataError, match="not UTF-8"):
            named_images([named])


def test_predicting_a_folder_passes_by_what_the_data_room_passes_by(data: Path) -> None:
    from ztune.data.image_files import named_images

    expected, ignored = named_images([data])
    assert (len(expected), ignored) == (24, [])
    for other in (".hidden/a.jpg", "__MACOSX/a.jpg", "one/._0.jpg", "one/notes.txt"):
        (data / other).parent.mkdir(exist_ok=True)
        (data / other).write_text("")
    assert named_images([data]) == (
        expected,
        [str(data / "one" / f) for f in ("._0.jpg", "notes.txt")],
    )


def test_an_error_is_one_line_that_any_terminal_can_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, err = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(err, encoding="ascii"))
    Output().result({}, ["Straße"])
    Output(as_json=True).result({"class": "Straße"})
    fail("first\n  second: é")
    sys.stdout.flush()
    sys.stderr.flush()
    assert out.getvalue() == b'Stra\\xdfe\n{"class": "Stra\\u00dfe"}\n'
    assert err.getvalue() == b"error: first second: \\xe9\n"


def without_tokens(bundle: Path) -> None:
    """Take from a bundle the image graph that takes extra tokens."""
    (bundle / "image_prompted.onnx").unlink()

    def change(document: dict[str, Any]) -> None:
        del document["visual"]
        del document["files"]["image_prompted.onnx"]
        del document["parity"]["image_prompted"]

    edit(bundle / "bundle.json", change)


def test_a_tower_without_tokens_is_said_before_the_first_query(
    ztune: Command, data: Path, bundle: Path, tmp_path: Path
) -> None:
    without_tokens(bundle)
    out = tmp_path / "run"

    def tune(*words: object) -> Result:
        return ztune(
            "tune", bundle, "--data", data, "--shots", 2, "--queries", 15, "--method", "bptvlm",
            "--set", "text_dim=20", *words, "--out", out,
        )  # fmt: skip

    able = ", ".join(name for name in METHODS if name != "bptvlm")
    for part in ("both", "vision"):
        refused(
            tune("--set", f"part={part}"),
            'method "bptvlm" needs extra tokens in the image tower',
            "export a ViT with --image-tokens",
            f"methods that would work: {able}",
        )
        assert not out.exists()
    assert tune("--set", "part=text").code == 0


def require(
    name: str, given: frozenset[str], needs: Mapping[str, frozenset[str]], hint: str = ""
) -> None:
    if needs[name] - given:
        raise missing_capability(name, given, needs, hint)


def able(given: frozenset[str], method: str, part: str = "both") -> set[str]:
    """Return the methods that are named instead of one that does not work."""
    needs = needs_of_all() | {"bptvlm": needs_of(METHODS["bptvlm"], BptVlmConfig(part=part))}
    with pytest.raises(ConfigError, match=re.escape(f'method "{method}" needs')) as caught:
        require(method, given, needs)
    _, _, named = str(caught.value).partition("methods that would work: ")
    return set(named.split(", ")) - {""}


LOGIT_METHODS = {"ogn", "ogn-context"}
TEXT_METHODS = {"zip", "sharpzo", "cma", "spsa", "spsa-gc", "rgf"}
HEADS = {"gda", "tip-adapter", "lp++", "proker", "linear-probe", "zero-shot"}


def test_access_of_a_text_endpoint() -> None:
    """Losses of text prompts, image features that were read once, and texts' features or not."""
    given = frozenset((LOSS, CONTEXTS, FEATURES))
    for method in ("bptvlm", "blackvip", "bar", *LOGIT_METHODS, *HEADS):
        assert able(given, method) == TEXT_METHODS
    given |= {TEXTS}
    for method in ("bptvlm", "blackvip", "bar", *LOGIT_METHODS):
        assert able(given, method) == TEXT_METHODS | HEADS
    assert able(given | {LOGITS}, "bar") == TEXT_METHODS | HEADS | LOGIT_METHODS | {"auto"}
    assert able(given, "bar", part="text") == TEXT_METHODS | HEADS | {"bptvlm"}
    with pytest.raises(ConfigError, match="changed images in every query, which this runtime"):
        require("blackvip", given, needs_of_all())


def test_access_of_an_oracle_that_gives_losses_alone() -> None:
    given = frozenset((LOSS, CONTEXTS))
    for method in ("bar", "blackvip", "bptvlm", *HEADS):
        assert able(given, method) == TEXT_METHODS
    with pytest.raises(
        ConfigError, match=r'"gda" needs text features, image features, which .* \(ask for them\);'
    ):
        require("gda", given, needs_of_all(), "ask for them")
    # Images may be changed, and yet no logits come back.
    with pytest.raises(ConfigError, match='"bar" needs logits, which this runtime does not'):
        require("bar", given | {PIXELS}, needs_of_all())
    for method in LOGIT_METHODS:
        with pytest.raises(ConfigError, match=f'"{method}" needs logits, which this runtime does'):
            require(method, given, needs_of_all())
        row = METHODS[method]
        assert isinstance(row, TunedMethod)
        needs = needs_of(row, row.config(answers="loss"))
        require(method, given, {**needs_of_all(), method: needs})
    for method in TEXT_METHODS:
        require(method, given, needs_of_all())


def test_auto_runs_what_an_oracle_allows() -> None:
    assert possible_method("auto", EVERYTHING) == "auto"
    given = frozenset((LOSS, CONTEXTS))
    for more in (LOGITS, TEXTS, FEATURES):
        assert possible_method("auto", EVERYTHING - {more}) == ("zip" if more == LOGITS else "ogn")
    assert possible_method("auto", given | {LOGITS}) == "ogn"
    assert possible_method("auto", given) == "zip"
    # Nothing to replace it with: the error names what is missing.
    assert possible_method("auto", frozenset((LOSS,))) == "auto"
    assert possible_method("gda", given) == "gda"


def test_access_of_other_runtimes() -> None:
    assert able(EVERYTHING - {IMAGE_TOKENS}, "bptvlm") == set(METHODS) - {"bptvlm"}
    assert able(frozenset((FEATURES, TEXTS)), "zip") == HEADS
    assert able(frozenset((PIXELS, LOGITS)), "zip") == {"bar"}
    # Images and their losses, and no text tower that takes embeddings.
    given = frozenset((LOSS, PIXELS, TEXTS, FEATURES, IMAGE_TOKENS))
    assert able(given, "zip", part="vision") == {"bptvlm", "blackvip"} | HEADS
    assert able(given, "zip") == {"blackvip"} | HEADS
    with pytest.raises(ConfigError, match="no method would work"):
        require("zip", frozenset(), needs_of_all())
    for method in METHODS:
        require(method, EVERYTHING, needs_of_all())


@pytest.mark.parametrize(
    ("method", "words", "parts"),
    [
        ("zip", ("--queries", 9), ("--queries 9 is less than one step of zip", "costs 10")),
        ("spsa-gc", ("--queries", 9), ("less than one step of spsa-gc", "costs 10")),
        ("rgf", ("--queries", 5), ("less than one step of rgf", "costs 6")),
        ("bar", ("--queries", 5), ("less than one step of bar", "costs 6")),
        ("blackvip", ("--queries", 9), ("less than one step of blackvip", "costs 10")),
        ("bptvlm", ("--queries", 14), ("less than one step of bptvlm", "costs 15")),
        ("cma", ("--queries", 19), ("less than one step of cma", "costs 20")),
        ("sharpzo", ("--queries", 1063), ("less than its first step of sharpzo", "costs 1064")),
        ("ogn", ("--queries", 9), ("--queries 9 is less than one step of ogn", "costs 10")),
        ("ogn", ("--queries", 9, "--set", "answers=loss"), ("one step of ogn", "costs 10")),
        ("ogn-context", ("--queries", 13), ("less than its first step of ogn-context", "14")),
        (
            "ogn",
            ("--set", "answers=top-0"),
            ('answers is "top-0", expected logits, top-K such as top-5, label or loss',),
        ),
        ("ogn-context", ("--set", "answers=probabilities"), ('answers is "probabilities"',)),
        ("ogn", ("--set", "ridge=0"), ("ridge is 0.0, expected more than 0",)),
        ("ogn", ("--set", "init="), ('initial context "" has no tokens',)),
        ("ogn", ("--keep", "best"), ("ogn has no single point to validate", "leave out --keep")),
        ("ogn", ("--patience", 2), ("cross-validates its weights", "and --patience")),
        ("ogn", ("--reference", MINI), ("ogn uses no differences", "leave out --reference")),
        ("ogn", ("--force",), ("ogn uses no differences", "--reference and --force")),
        ("ogn", ("--augment", 2), ("ogn uses the same images in all rounds", "out --augment")),
        (
            "ogn-context",
            ("--augment", 1),
            ("ogn-context uses the same images in all rounds", "leave out --augment"),
        ),
        ("ogn", ("--set", "init=a photo", "--set", "n_context=2"), ("n_context requires init=",)),
        ("ogn", ("--set", "memory_mb=0"), ("memory_mb is 0.0, expected more than 0",)),
        ("ogn", ("--set", "extractor=x"), ('method "ogn" has no setting "extractor"',)),
        ("cma", ("--queries", 50, "--set", "population=60"), ("--queries 50 is less", "costs 60")),
        ("bptvlm", ("--queries", 50, "--set", "population=51"), ("costs 51",)),
        (
            "sharpzo",
            ("--queries", 50, "--set", "population=60", "--set", "intrinsic_dim=4"),
            ("costs 68",),
        ),
        ("cma", ("--queries", 100, "--set", "population=3"), ("population is 3, expected",)),
        (
            "cma",
            ("--queries", 100, "--set", "intrinsic_dim=20000"),
            ("full covariance of 20000 values takes 19", "too much", "separable covariance"),
        ),
        (
            "bptvlm",
            ("--queries", 5000, "--set", "covariance=full"),
            ("full covariance of 4000 values", "hours for 333 generations", "too much"),
        ),
        (
            "sharpzo",
            ("--queries", 30000, "--set", "intrinsic_dim=12000"),
            ("full covariance of 12000 values takes 6.9 GB", "too much"),
        ),
        ("bptvlm", ("--set", "n_tokens=100000"), ("n_tokens is 100000", "at most 4096")),
        (
            "bptvlm",
            ("--set", "n_context=40", "--set", "text_dim=2000000"),
            ("projecting 2000000 values", "too much"),
        ),
        ("cma", ("--set", "keep=first"), ('keep is "first"', "best, mean, running, last")),
        ("rgf", ("--set", "init_std=-1"), ("init_std is -1.0, expected at least 0",)),
        ("bptvlm", ("--set", "sise=3"), ('method "bptvlm" has no setting "sise"', "text_dim")),
        ("gda", ("--set", "alfa=3"), ('no setting "alfa"',)),
        ("zero-shot", ("--set", "alpha=3"), ('no setting "alpha"',)),
        ("bar", ("--set", "perturbaton=3"), ("it has: ", "perturbation", "focal_gamma")),
        ("zip", ("--keep", "first"), ('--keep is "first", expected last or best',)),
        ("zip", ("--patience", 0), ("--patience is 0, expected at least 1",)),
        ("zip", ("--keep", "best", "--validate-every", 0), ("--validate-every is 0",)),
        ("zip", ("--validate-every", 5), ("requires --keep best or --patience",)),
        ("zip", ("--snapshots", -1), ("--snapshots is -1, expected 0 or more",)),
        ("zip", ("--snapshots", "5,x"), ('--snapshots is "5,x"', "query counts as in 25,50")),
        ("zip", ("--snapshots", "0,5"), ('--snapshots is "0,5", expected a number',)),
        ("zip", ("--keep", "best", "--val", 0), ("need validation images (--val)",)),
        ("bar", ("--patience", 3, "--val", 0), ("need validation images (--val)",)),
        ("gda", ("--keep", "best"), ("gda has no steps: leave out --keep",)),
        ("gda", ("--patience", 2), ("gda has no steps: leave out --patience",)),
        ("gda", ("--snapshots", 2), ("gda has no steps: leave out --snapshots",)),
        ("gda", ("--reference", MINI), ("gda has no steps", "leave out --reference and --force")),
        ("bar", ("--reference", MINI), ("bar re-encodes images", "leave out --reference")),
    ],
)
def test_wrong_settings_of_methods(
    method: str,
    words: tuple[object, ...],
    parts: tuple[str, ...],
    ztune: Command,
    data: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    given = ("tune", MINI, "--data", data, "--shots", 2, "--queries", 100, "--method", method)
    refused(ztune(*given, *words, "--out", out), *parts)
    assert not out.exists()


def test_validation_images_that_a_method_asks_for(
    ztune: Command, data: Path, tmp_path: Path
) -> None:
    # All eight images of a class tune, so none is left to validate on.
    out = tmp_path / "run"
    words = (
        "tune", MINI, "--data", data, "--shots", 8, "--method", "zip", "--queries", 100,
        "--out", out,
    )  # fmt: skip
    refused(ztune(*words, "--keep", "best"), "need validation images")
    small = ("--method", "sharpzo", "--set", "intrinsic_dim=10", "--set", "population=4")
    refused(ztune(*words, *small, "--set", "warmup_patience=2"), "need validation images")
    assert not out.exists()


def test_a_coarse_bundle_and_images_that_change(ztune: Command, data: Path, tmp_path: Path) -> None:
    int8 = quantize_bundle(load_bundle(MINI), tmp_path / "int8", "int8").path
    out = tmp_path / "run"
    words = ("tune", int8, "--data", data, "--shots", 2, "--queries", 6, "--method", "bar")
    refused(
        ztune(*words, "--out", out),
        "the signal cannot be measured when images are re-encoded",
        "the bundle is int8",
        "use the fp32 bundle, or continue with --force",
    )
    assert not (out / "prompt.safetensors").exists()
    assert json.loads((out / "run.json").read_text())["status"] == "refused"
    forced = ztune(*words, "--out", out, "--force")
    assert forced.code == 0, forced.err
    assert "warning: the signal cannot be measured when images" in forced.err
    document = json.loads((out / "run.json").read_text())
    assert document["signal"]["forced"] is True
    assert document["queries"] == 6


@pytest.mark.parametrize(
    ("method", "step", "words"),
    [
        ("zip", 10, ()),
        ("cma", 20, ("--set", "intrinsic_dim=30")),
        ("bar", 6, ()),
        ("zip", 10, ("--set", "batch_size=4", "--augment", 2)),
        ("zip", 10, ("--keep", "best", "--validate-every", 1000)),
    ],
    ids=["zip", "cma", "bar", "drawn", "wrapped"],
)
def test_a_loss_that_is_not_finite_names_the_query_and_leaves_a_state_to_go_on_from(
    method: str,
    step: int,
    words: tuple[object, ...],
    ztune: Command,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model answers NaN to the fourth candidate of the third round."""
    given = (
        "tune", MINI, "--data", data, "--shots", 2, "--method", method, "--queries", 5 * step,
        *words,
    )  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert ztune(*given, "--out", whole).code == 0

    third = False
    called = FewShotObjective.__call__

    def watched(objective: FewShotObjective, prompts: Prompts, batch: Batch) -> Evaluation:
        nonlocal third
        third = batch.number == 3
        try:
            return called(objective, prompts, batch)
        finally:
            third = False

    texts, border = OrtPromptEncoder.encode, BorderPrompts.encode

    def broken_texts(encoder: OrtPromptEncoder, contexts: F32) -> F32:
        features = texts(encoder, contexts)
        if third:
            features[3, 1, 0] = np.nan
        return features

    def broken_images(prompts: BorderPrompts, visual: F32, pixels: U8, features: F32) -> F32:
        encoded = border(prompts, visual, pixels, features)
        if third:
            encoded[3, 1, 0] = np.nan
        return encoded

    with monkeypatch.context() as patched:
        patched.setattr(FewShotObjective, "__call__", watched)
        patched.setattr(OrtPromptEncoder, "encode", broken_texts)
        patched.setattr(BorderPrompts, "encode", broken_images)
        refused(
            ztune(*given, "--out", out),
            f"query {2 * step + 4}, batch 3, candidate 4 of {step}: the loss is nan",
            f"saved in {out / 'state.safetensors'}",
        )
        assert (out / "state.safetensors").exists()
        assert not (out / "prompt.safetensors").exists()
        # As long as the cause is there, it is found again at the same place.
        refused(
            ztune("tune", "--resume", out),
            f"query {2 * step + 4}, batch 3, candidate 4 of {step}: the loss is nan",
        )
    done = ztune("tune", "--resume", out)
    assert done.code == 0, done.err
    name = "prompt.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()
    costs = [
        {key: value for key, value in json.loads((run / "run.json").read_text()).items()
         if key in ("queries", "train_loss")}
        for run in (whole, out)
    ]  # fmt: skip
    assert costs[0] == costs[1]


def test_a_model_that_breaks_at_once(
    ztune: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(prompts: VisualPrompts, visual: F32, pixels: U8, features: F32) -> F32:
        return np.full((len(visual), len(pixels), 128), np.inf, dtype=np.float32)

    monkeypatch.setattr(BorderPrompts, "encode", broken)
    out = tmp_path / "run"
    words = ("tune", MINI, "--data", data, "--shots", 2, "--queries", 6, "--method", "bar")
    refused(ztune(*words, "--out", out), "query 1, batch 1, candidate 1 of 6: the loss is nan")
    assert (out / "state.safetensors").exists()


def test_values_that_a_tower_would_answer_although_they_are_no_numbers(
    ztune: Command, data: Path, tmp_path: Path
) -> None:
    # A border's sigmoid makes 0 and 1 of infinities, and the losses stay finite.
    out = tmp_path / "run"
    words = ("--method", "bar", "--set", "step_size=1e300", "--queries", 30)
    result = ztune("tune", MINI, "--data", data, *SMALL, *words, "--out", out)
    refused(result, "query 7, candidate 1 of 6: its values are not finite", "state.safetensors")
    assert (out / "state.safetensors").exists()


def test_a_last_step_into_nowhere_is_told_with_its_query(
    ztune: Command, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ("--method", "zip", "--set", "step_size=1e200", "--set", "clip=false", "--force")
    result = ztune("tune", MINI, "--data", data, *SMALL, *words, "--out", out)
    refused(result, "after query 10 the recommended point has no finite loss", "smaller steps")
    assert (out / "state.safetensors").exists()
