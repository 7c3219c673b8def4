"""Names that a terminal would act on, wherever they come from: shown, and without effect."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import grpc
import numpy as np
import pytest

from tests.conftest import DIGITS, MINI, Command, Result
from tests.servers.fake import FailedError, FakeModel, FakeServer, Tensor
from ztune.cli.main import main
from ztune.cli.output import Output, Table, with_options
from ztune.cli.parser import VERBS
from ztune.io.tensors import write_tensors

NAMES = ("\x1b]0;pwned\x07", "\x1b[2J", "two\nerror: three", "\u202eeno", "\x9b31m :dog: [red]")
# A class's name is what a tokenizer reads: its white space is single spaces.
SHOWN = (r"\x1b]0;pwned\x07", r"\x1b[2J", "two error: three", r"\u202eeno", r"\x9b31m :dog: [red]")
FILES = (*SHOWN[:2], r"two\nerror: three", SHOWN[3])
SECRET = "s3cr3t"
SMALL = ("--shots", 2, "--queries", 10, "--method", "ogn")


def harmless(result: Result, *shown: str) -> None:
    """See that a terminal only shows what was said, and that it was said."""
    said = result.out + result.err
    assert [sign for sign in said if not sign.isprintable() and sign != "\n"] == []
    assert "\nerror: three" not in said
    for part in shown:
        assert part in said


def images(root: Path, names: tuple[str, ...] = NAMES, n: int = 16) -> Path:
    """Return a folder of classes of digits."""
    for name, digit in zip(names, ("one", "two", "three", "four", "five"), strict=True):
        (root / name).mkdir(parents=True)
        for image in sorted((DIGITS / digit).iterdir())[:n]:
            shutil.copy(image, root / name)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("data") / "\x1b[31mdata")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run on classes with such names."""
    out = tmp_path_factory.mktemp("run") / "\x1b[31mrun"
    words = ("tune", MINI, "--data", data, *SMALL, "--test-fraction", 0.5, "--out", out)
    assert main([str(word) for word in (*words, "--quiet")]) == 0
    return out


@pytest.fixture(scope="module")
def classifier(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "c.onnx"
    words = ("pack", MINI, "--prompt", run / "prompt.safetensors", "--out", out, "--quiet")
    assert main([str(word) for word in words]) == 0
    return out


def test_tune_shows_names(ztune: Command, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "\x1b[31mrun"
    words = ("tune", MINI, "--data", data, *SMALL, "--out", out)
    done = ztune(*words)
    assert done.code == 0, done.err
    harmless(done, r"\x1b[31mrun")
    harmless(ztune(*words), "error: ", r"\x1b[31mrun")  # it is there
    few = ztune(*words, "--shots", 20, "--out", tmp_path / "other")
    assert few.code == 1
    harmless(few)
    assert sum(one in few.err for one in SHOWN) == 1


def test_eval_shows_names(ztune: Command, run: Path, data: Path, classifier: Path) -> None:
    every = ("--data", data, "--split", "all")
    for words in ((run,), (MINI, *every), (classifier, *every)):
        done = ztune("eval", *words)
        assert done.code == 0, done.err
        harmless(done, *SHOWN)


def test_json_holds_names_without_effect(ztune: Command, run: Path) -> None:
    done = ztune("eval", run, "--json", "--quiet")
    harmless(done)
    assert set(done.json["per_class"]) == {" ".join(name.split()) for name in NAMES}


def test_json_has_no_controls(capfd: pytest.CaptureFixture[str]) -> None:
    document = {"a\x7f\x9b": "\x1b\x85\u202e\n"}
    Output(as_json=True).result(document)
    said = capfd.readouterr().out
    assert said.removesuffix("\n").isprintable()
    assert json.loads(said) == document


def test_predict_shows_names(ztune: Command, classifier: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for name in NAMES[:4]:
        shutil.copy(next((DIGITS / "one").iterdir()), files / f"{name}.png")
    done = ztune("predict", classifier, files, "--top", 5)
    assert done.code == 0, done.err
    harmless(done, *SHOWN, *(f"{name}.png" for name in FILES))
    (files / "\x1b[31m.png").write_text("no image")
    broken = ztune("predict", classifier, files)
    assert broken.code == 1
    harmless(broken, r"\x1b[31m.png")
    harmless(ztune("predict", classifier, tmp_path / "\x1b[32m"), r"\x1b[32m")


def test_a_data_check_shows_names(ztune: Command, tmp_path: Path) -> None:
    root = images(tmp_path / "\x1b[31mroot" / "dtd" / "images")
    harmless(ztune("data", "check", "dtd", "--root", root.parent.parent), r"\x1b[31mroot")
    harmless(ztune("data", "check", "\x1b[2J", "--root", tmp_path), r"\x1b[2J")


def test_doctor_shows_names(ztune: Command, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(MINI, tmp_path / "\x1b[31mbundle"))
    sound = ztune("doctor", bundle)
    assert sound.code == 0, sound.err
    harmless(sound, r"\x1b[31mbundle")
    (bundle / "text.onnx").write_bytes(b"x")
    harmless(ztune("doctor", bundle), r"\x1b[31mbundle")
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["precision"] = "\x1b[2J"
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    harmless(ztune("doctor", bundle), r"\x1b[2J")


def test_names_in_a_file_of_tensors(ztune: Command, run: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "p.safetensors"
    write_tensors(prompt, {"\x1b[2J": np.zeros(1, np.float32)}, {"\x1b[31m": "\x1b[32m"})
    words = ("eval", MINI, "--data", DIGITS, "--split", "all", "--prompt", prompt)
    harmless(ztune(*words), "error: ")
    content = (run / "prompt.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["\x1b[2J"] = {"dtype": "\x9b0m", "shape": [0], "data_offsets": [0, 0]}
    changed = json.dumps(header).encode()
    prompt.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])
    result = ztune(*words)
    assert result.code == 1
    harmless(result, "error: ")


def bad(*_: Any) -> NoReturn:
    raise FailedError(grpc.StatusCode.INVALID_ARGUMENT, "\x1b]0;pwned\x07\nerror: three")


HARMFUL = Tensor("\x1b[2J", "\x9b0m", [-1])
BYTES = Tensor("content", "UINT8", [-1])


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"image": FakeModel([HARMFUL], [HARMFUL], bad), "\x1b[2J": FakeModel([], [], bad)},
        {"image": FakeModel([], [], bad), "client": FakeModel([HARMFUL], [BYTES], bad)},
        {name: FakeModel([HARMFUL], [HARMFUL], bad) for name in ("image", "prompt", "client")},
    ],
)
@pytest.mark.parametrize("half", [(), ("--client", MINI)])
def test_what_a_server_says_is_shown(
    parts: dict[str, FakeModel],
    half: tuple[object, ...],
    ztune: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models = {f"mini_{name}": model for name, model in parts.items()}
    with FakeServer(models, name="\x1b[31m", version="\x1b[32m", extensions=["\x1b[33m"]) as server:
        where = f"triton://{server.grpc}/mini"
        for words in (
            ("doctor", where),
            ("tune", where, "--data", DIGITS, "--shots", 2, "--out", tmp_path / "run"),
            ("eval", where, "--data", DIGITS, "--split", "all"),
        ):
            result = ztune(*words, *half)
            assert result.code == 1
            harmless(result, "error: ")


PLAN = """
title = "\\u001b]0;pwned\\u0007"
seeds = [1]
queries = 10
[models]
"\\u001b[31mmini" = "{bundle}"
[data]
"\\u001b[2Jdigits" = {{ path = "{data}" }}
[methods]
"\\u202ecos" = {{ uses = "gda" }}
"=1+1" = {{ uses = "zero-shot" }}
[[protocols]]
kind = "few-shot"
shots = [2]
"""


def test_bench_shows_labels(ztune: Command, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.toml", tmp_path / "out"
    data = images(tmp_path / "data", n=8)
    plan.write_text(PLAN.format(bundle=MINI, data=data))
    done = ztune("bench", plan, "--out", out, "--provider", "cpu")
    assert done.code == 0, done.err
    harmless(done, r"\x1b[2Jdigits")
    (report,) = (out / "report").iterdir()
    for name in ("report.md", "tables.csv", "cells.csv", "tables.tex"):
        text = (report / name).read_text()
        assert [sign for sign in text if not sign.isprintable() and sign != "\n"] == []
        assert "u202ecos" in text, name


def test_compare_shows_names(ztune: Command, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "\x1b[31mout"
    words = ("compare", MINI, "--data", data, "--methods", "gda,sharpzo", "--seeds", 1)
    settings = ("--shots", 2, "--queries", 10, "--template", "`\x1b[2J` of {}")
    done = ztune(*words, *settings, "--out", out)
    assert done.code == 1, "sharpzo's first step costs more"
    harmless(done, r"\x1b[31mdata on mini", r"\x1b[31mout", "sharpzo failed")
    text = (out / "compare.md").read_text()
    assert [sign for sign in text if not sign.isprintable() and sign != "\n"] == []
    assert text.startswith(r"# \\x1b\[31mdata on mini")
    assert r": ``ztune compare" in text


@pytest.mark.parametrize(
    "words",
    [
        ("\x1b[2J",),
        ("tune", "--\x1b[2J"),
        ("tune", str(MINI), "--shots", "\x1b[2J"),
        ("data", "\x1b[2J\u202e\n"),
    ],
)
def test_a_wrong_usage_shows_what_was_typed(words: tuple[str, ...], ztune: Command) -> None:
    result = ztune(*words)
    assert result.code == 2
    harmless(result, r"\x1b[2J")


def test_a_traceback_shows_names(ztune: Command, tmp_path: Path) -> None:
    result = ztune("eval", tmp_path / "\x1b[2J", "--debug")
    assert result.err.startswith("Traceback (most recent call last):\n  File ")
    harmless(result, r"\x1b[2J")


def test_an_uncaught_error_shows_names() -> None:
    program = r"""
import sys
import ztune.cli.methods as verb
from ztune.cli.main import main
def broken(*_):
    raise RuntimeError("\x1b[2J https://me:s3cr3t@host")
verb.run = broken
main(["methods"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    harmless(Result(1, done.stdout, done.stderr), "Traceback", r"\x1b[2J https://***@host")


def test_a_stop_shows_names(
    ztune: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ztune.training.TrainingRun.finish", stopped)
    result = ztune("tune", MINI, "--data", data, *SMALL, "--out", tmp_path / "\x1b[2J")
    assert result.code == 130
    harmless(result, r"\x1b[2J", "ztune tune --resume")


def test_progress_shows_names_on_a_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with Output().activity("[red]\x1b]0;pwned\x07", 2) as ticker:
        ticker.update(1, "\x9b31m")
        ticker._progress.refresh()
    said = capfd.readouterr().err
    assert r"[red]\x1b]0;pwned\x07" in said
    assert r"\x9b31m" in said
    assert not set(said) & set("\x07\x9b")


def test_a_table_of_rich_adds_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    rows = [(":dog: [red]", "\x1b[2J")]
    Output().result({}, [Table("\x1b[1m", ("\x1b[3m", "b"), rows), ":cat: [bold]"])
    said = capfd.readouterr().out
    for part in (":dog: [red]", r"\x1b[2J", r"\x1b[1m", r"\x1b[3m", ":cat: [bold]"):
        assert part in said


ADDRESS = f"https://user:{SECRET}@host.invalid:8001/mini"
ADDRESSES = (
    ADDRESS,
    f"https://{SECRET}@host.invalid/mini",
    f"triton://user:{SECRET}@127.0.0.1:1/mini",
    f"https://user:{SECRET}%40host.invalid/mini",
)
Words = Callable[[str], tuple[object, ...]]
TAKING: dict[str, Words] = {
    "tune bundle": lambda url: ("tune", url, "--data", DIGITS, "--out", "run"),
    "tune data": lambda url: ("tune", MINI, "--data", url, "--out", "run"),
    "tune out": lambda url: ("tune", MINI, "--data", DIGITS, *SMALL, "--out", url),
    "tune resume": lambda url: ("tune", "--resume", url),
    "tune endpoint": lambda url: (
        "tune", "triton://127.0.0.1:1/mini", "--data", DIGITS, "--endpoint", url, "--out", "run",
    ),
    "eval target": lambda url: ("eval", url, "--data", DIGITS),
    "eval bundle": lambda url: ("eval", MINI, "--bundle", url, "--data", DIGITS),
    "pack bundle": lambda url: ("pack", url, "--prompt", "p", "--out", "c.onnx"),
    "pack prompt": lambda url: ("pack", MINI, "--prompt", url, "--out", "c.onnx"),
    "pack out": lambda url: ("pack", MINI, f"--out={url}", "--prompt", "p"),
    "predict classifier": lambda url: ("predict", url, DIGITS),
    "predict images": lambda url: ("predict", "c.onnx", url),
    "quantize bundle": lambda url: ("quantize", url, "--precision", "int8", "--out", "q"),
    "doctor bundle": lambda url: ("doctor", url),
    "compare bundle": lambda url: ("compare", url, "--data", DIGITS, "--out", "out"),
    "compare data": lambda url: ("compare", MINI, "--data", url, "--out", "out"),
    "bench plan": lambda url: ("bench", url, "--out", "out"),
    "bench ray": lambda url: ("bench", "plan.toml", "--out", "out", "--ray", url),
    "data root": lambda url: ("data", "check", "dtd", "--root", url),
    "data name": lambda url: ("data", "check", url, "--root", "data"),
    "methods": lambda url: ("methods", url),
    "export model": lambda url: ("export", "--model", url, "--out", "b"),
    "export pretrained": lambda url: (
        "export", "--model", "ViT-B-32", "--pretrained", url, "--out", "b",
    ),
    "export-triton bundle": lambda url: ("export-triton", url, "--out", "r"),
}  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("words", TAKING.values(), ids=TAKING)
def test_a_password_on_the_command_line_is_kept_nowhere(
    words: Words, address: str, ztune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for more in ((), ("--json",), ("--debug",)):
        result = ztune(*words(address), *more)
        assert result.code == 1
        assert result.out == ""
        assert result.err.startswith("error: URLs must not contain a user or")
        assert SECRET not in result.err
    assert list(tmp_path.iterdir()) == []


def test_every_verb_is_given_one() -> None:
    assert {name.split()[0] for name in TAKING} == set(VERBS)


# What is not known to open_clip, it names in its own writing, without slashes.
@pytest.mark.parametrize("verb", [name for name in TAKING if name != "export model"])
def test_an_address_that_lost_a_slash_is_shown_without_its_password(
    verb: str, ztune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = ztune(*TAKING[verb](ADDRESS.replace("//", "/")))
    assert SECRET not in result.out + result.err


def test_a_saved_address_is_shown_without_its_password(
    ztune: Command, run: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    document = json.loads((copied / "run.json").read_text())
    document["run_config"]["bundle"] = ADDRESS
    (copied / "run.json").write_text(json.dumps(document))
    for words in (("eval", copied), ("tune", "--resume", copied)):
        assert SECRET not in ztune(*words, "--debug").err


def test_arguments_are_shown_as_options_and_names_as_they_are() -> None:
    options = {"keep": "--keep", "bundle": "BUNDLE"}
    for text, shown in (
        ("leave out `keep`", "leave out --keep"),
        ("use `keep=best` or `keep`", "use --keep best or --keep"),
        ("name the `bundle`", "name the BUNDLE"),
        ("raise `memory_limit=3`", "raise memory_limit=3"),
        ('class "`keep`" has no image', 'class "`keep`" has no image'),
        ('"/tmp/`keep`" does not exist, see `keep`', '"/tmp/`keep`" does not exist, see --keep'),
        ("ztune eval 'a `keep`' (or `keep`)", "ztune eval 'a `keep`' (or --keep)"),
        ("the run's `keep` isn't `keep=best`", "the run's --keep isn't --keep best"),
    ):
        assert with_options(text, options.get) == shown


def test_the_doctor_says_options(ztune: Command) -> None:
    said = ztune("doctor", MINI)
    assert "`" not in said.out + said.err
    assert "--provider cpu" in said.out or "cuda" not in said.out
