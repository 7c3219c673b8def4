"""What a verb takes, is declared once; what it does not take, is answered with what is near."""

import importlib.metadata
import re
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

import pytest

from tests.conftest import ROOT, Command
from ztune.cli import options, parser, server
from ztune.cli.parser import VERBS, module_of, parser_of
from ztune.run_config import RunConfig


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("tune", "--shotz", "4"), "unknown option --shotz (did you mean --shots?)"),
        (("tune", "--shotz=4"), "unknown option --shotz (did you mean --shots?)"),
        (("pack", "--promt", "p"), "unknown option --promt (did you mean --prompt?)"),
        (("quantize", "--rank"), "unknown option --rank"),
        (
            ("predict", "c.onnx", "--pixel-queries", "3"),
            "unknown option --pixel-queries (--pixel-queries is an option of compare)",
        ),
        (
            ("tune", "m", "--seeds", "1,2"),
            "unknown option --seeds (did you mean --seed? --seeds is an option of bench, compare)",
        ),
        (("methods", "zip", "gda"), 'unexpected "gda"'),
        (("methods", "-x"), 'unexpected "-x"'),
        (
            ("tune", "--max", "4"),
            "ambiguous option: --max could match --max-pixels, --max-inflight, --max-request",
        ),
        (
            ("tune", "m", "--endpoint", "http://h:1"),
            "option --endpoint was removed: put the servers behind one URL, a Kubernetes Service "
            "or a proxy (docs/serving.md)",
        ),
        (
            ("tune", "triton://h:1/m", "triton://g:1/m"),
            'unexpected "triton://g:1/m": put the servers behind one URL, a Kubernetes Service '
            "or a proxy (docs/serving.md)",
        ),
        (
            ("eval", "m", "--shared-memory=on"),
            "option --shared-memory was removed: leave it out, tensors are always sent over "
            "the network",
        ),
        *(
            (
                (verb, "m", "--extractor", "f.onnx"),
                "option --extractor was removed: tune with --set extractor=FILE (compare: --set "
                "blackvip.extractor=FILE); eval and pack take the file from the run",
            )
            for verb in ("tune", "eval", "pack", "compare", "predict")
        ),
        (("tune", "--shots", "many"), "argument --shots: expected a number or all, got 'many'"),
        (("tune", "--\x1b[2J"), r"unknown option --\x1b[2J"),
        (("pack",), "the following arguments are required: BUNDLE, --prompt, --out"),
    ],
)
def test_a_wrong_word_is_answered_by_its_verb(
    words: tuple[str, ...], error: str, ztune: Command
) -> None:
    told = ztune(*words)
    assert (told.code, told.out) == (2, "")
    *usage, said, see = told.err.splitlines()
    assert " ".join(usage).startswith(f"usage: ztune {words[0]} ")
    assert len(usage) <= 3
    assert said == f"ztune {words[0]}: error: {error}"
    assert see == f"see: ztune {words[0]} --help"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((), "a verb is missing"),
        (("tnue",), 'unknown verb "tnue" (did you mean tune?)'),
        (("quantise", "--help"), 'unknown verb "quantise" (did you mean quantize?)'),
        (("",), 'unknown verb ""'),
        (("\x1b[2J",), r'unknown verb "\x1b[2J"'),
        (("--versoin",), "unknown option --versoin (did you mean --version?)"),
        (("--shots", "4"), "unknown option --shots"),
    ],
)
def test_a_wrong_verb_is_answered_with_the_nearest(
    words: tuple[str, ...], error: str, ztune: Command
) -> None:
    told = ztune(*words)
    assert (told.code, told.out) == (2, "")
    assert told.err.splitlines()[1:] == [f"ztune: error: {error}", "see: ztune --help"]


def test_the_beginning_of_an_option_is_enough(ztune: Command) -> None:
    assert "BUNDLE is required" in ztune("tune", "--quer", "4").err
    assert parser_of("tune").read(["--quer", "4"]).queries == 4


def test_the_help_lists_all_verbs(ztune: Command) -> None:
    shown = ztune("--help")
    assert shown.code == 0
    listed = re.findall(r"^  (\S+) +(.+)$", shown.out.partition("verbs:\n")[2], re.MULTILINE)
    assert dict(listed) == VERBS


@pytest.mark.parametrize("is_installed", [True, False])
def test_the_version_is_the_projects(
    is_installed: bool, ztune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> NoReturn:
        raise importlib.metadata.PackageNotFoundError(name)

    if not is_installed:  # a checkout on the path
        monkeypatch.setattr(importlib.metadata, "version", absent)
    project = (ROOT / "pyproject.toml").read_text()
    told = ztune("--version")
    assert (told.code, told.err) == (0, "")
    assert f'\nversion = "{told.out.strip().removeprefix("ztune ")}"\n' in project


@pytest.mark.parametrize("verb", VERBS)
def test_the_usage_names_what_there_is(verb: str) -> None:
    of_verb = parser_of(verb)
    named = {word for form in module_of(verb).USAGE for word in re.findall(r"--[a-z-]+", form)}
    assert named <= of_verb._option_string_actions.keys()
    required = {
        action.option_strings[-1]
        for action in of_verb.own
        if action.required and action.option_strings
    }
    assert required <= named
    assert all(action.help for action in of_verb._actions)
    for form in module_of(verb).USAGE:
        assert len(f"usage: ztune {verb} {form}") < 80


DATA = {"tune": "data and files", "compare": "data"}


def test_tune_and_compare_begin_with_what_is_most_needed(ztune: Command) -> None:
    for verb in ("tune", "compare"):
        shown = ztune(verb, "--help").out
        titles = re.findall(r"^(\w.*):$", shown, re.MULTILINE)
        assert titles[:5] == [
            "positional arguments",
            "most needed",
            DATA[verb],
            "method",
            "machine",
        ]
        first = shown.partition("most needed:\n")[2].partition("\n\n")[0]
        assert len(re.findall(r"^  --", first, re.MULTILINE)) == 10


def test_a_run_takes_its_fields_and_no_list_beside_them() -> None:
    taken = {field.name for field in fields(RunConfig)} - {"server"}
    own = {action.dest for action in parser_of("tune").own} - {*server.SERVER}
    assert own == taken | {"out", "overwrite", "resume", "init", "max_pixels"}
    for verb in ("compare", "doctor"):
        own = {action.dest for action in parser_of(verb).own} - {*server.SERVER}
        assert own - taken <= {"out", "init", "methods", "seeds", "pixel_queries", "max_pixels"}


def test_every_field_of_a_server_is_an_option() -> None:
    for verb in ("tune", "eval", "doctor"):
        group = next(g for g in parser_of(verb)._action_groups if str(g.title).startswith("server"))
        assert {action.dest for action in group._group_actions} == {*server.SERVER}


def test_shared_options_are_those_that_several_verbs_add() -> None:
    declared = re.compile(r'"(--[a-z-]+)"')
    for flag in options._DECLARED:
        adding = [
            verb
            for verb in VERBS
            if flag in parser_of(verb)._option_string_actions
            and flag in declared.findall(Path(str(module_of(verb).__file__)).read_text())
        ]
        assert len(adding) > 1, f"{flag} is declared for {adding}"


def test_given_is_what_differs_from_the_default() -> None:
    arguments = parser_of("tune").read(["m", "--seed=3", "--provider", "auto", "--force", "--json"])
    assert arguments.given == {"seed": "--seed", "force": "--force"}
    words = ["t", "--template", "a {}.", "--set", "rank=2"]
    assert parser_of("tune").read(words).given == {"settings": "--set", "templates": "--template"}


def test_an_argument_of_the_library_is_shown_as_an_option() -> None:
    find = parser.option_finder(parser_of("pack"), "pack")
    assert find("prompt") == "--prompt"
    assert find("bundle") == "BUNDLE"
    assert find("split_file") == "--split-file", "of another verb"
    assert find("templates") == "--template"
    assert find("nothing") is None
    assert parser.option_finder(parser_of("bench"), "bench")("templates") is None


def test_an_empty_word_is_refused(ztune: Command) -> None:
    for words in (("tune", ""), ("predict", "c.onnx", ""), ("export-triton", "x", "--name", "")):
        done = ztune(*words)
        assert done.code == 2
        assert "an argument is empty" in done.err
