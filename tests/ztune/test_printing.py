"""What is printed of a text that anyone may have written."""

import shlex
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztune.printing import holds_password, printable, printable_lines, quoted

ANY = st.text(st.characters(exclude_categories=()))
"""Lone surrogates and controls, too."""
CLEAN = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp", "Cf")))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;pwned\x07", r"\x1b]0;pwned\x07"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b2J\x85\x7f\0", r"\x9b2J\x85\x7f\x00"),
        ("one\ntwo\r\tthree", r"one\ntwo\r\tthree"),
        ("\u202egnp.exe\u2066\u2069", r"\u202egnp.exe\u2066\u2069"),
        ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
        ("\udcff.jpg", r"\udcff.jpg"),
    ],
)
def test_what_a_terminal_would_act_on_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "", "a photo of a {}.", "Straße, naïve, 猫, кошка, חתול, قطة, बिल्ली", "e\u0301",
        "👩\u200d👩\u200d👧 🏴\U000e0067\U000e0062\U000e007f ❤\ufe0f",
        "می\u200cخواهم", r"C:\new\x1b",
        ":dog: [bold]x[/bold]", "62.0 ± 2.0", "me@example.org", "C:/a@b",
        "triton://host:8001/mini", "https://host:8001/mini@x", "https://[::1]:80/a@b",
        "https://example.org/@me?a@b",
    ],
)  # fmt: skip
def test_all_else_stays_as_it_is(text: str) -> None:
    assert printable(text) == text
    assert not holds_password(text)


@given(ANY)
def test_nothing_that_a_terminal_acts_on_is_left(text: str) -> None:
    shown = printable(text)
    assert not {unicodedata.category(sign) for sign in shown} & {"Cc", "Cs", "Zl", "Zp"}
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert printable(shown) == shown
    shown.encode()


@given(CLEAN.filter(lambda text: ":/" not in text))
def test_any_other_text_is_left(text: str) -> None:
    assert printable(text) == text


@given(st.lists(ANY))
def test_lines_stay_lines(lines: list[str]) -> None:
    whole = "\n".join(lines)
    assert printable_lines(whole).split("\n") == [printable(one) for one in whole.split("\n")]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:s3cr3t@host/x", "https://***@host/x"),
        ("https://s3cr3t@host", "https://***@host"),
        ("triton://user:s3cr3t@127.0.0.1:8001/m", "triton://***@127.0.0.1:8001/m"),
        ("https://me%40here:s3cr3t@host", "https://***@host"),
        ("https://user:s3cr3t%40host", "https://***@host"),
        ("https://user:s3@cr3t@host", "https://***@host"),
        ("https://user:s3/cr3t@host/x", "https://***@host/x"),
        ("https://user:s3?#cr3t@host", "https://***@host"),
        ("https://user:s3\ncr3t@host", "https://***@host"),
        ('"https:/user:s3cr3t@host" does not exist', '"https:/***@host" does not exist'),
        ("/home/me/https:/user:s3cr3t@host", "/home/me/https:/***@host"),
        ("https://a:s3cr3t@x,https://b:s3cr3t@y", "https://***@x,https://***@y"),
    ],
)
def test_an_address_is_shown_without_user_and_password(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown
    assert holds_password(text.replace("\n", ""))


@pytest.mark.parametrize("text", ["a://b:c" * 100_000, "aa:/" * 200_000 + "@", "a" * 1_000_000])
def test_a_long_text_is_no_trouble(text: str) -> None:
    assert len(printable(text)) == len(text) or "***" in printable(text)


@given(CLEAN.filter(bool))
def test_a_suggested_command_has_a_path_as_one_word(path: str) -> None:
    words = shlex.split(f"ztune eval {quoted(path)} --json")
    assert words[2].removeprefix("./") == path.removeprefix("./")
    assert not words[2].startswith("-")
    assert [*words[:2], *words[3:]] == ["ztune", "eval", "--json"]


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("runs/photos", "runs/photos"),
        ("my run's", "'my run'\"'\"'s'"),
        ("two  spaces", "'two  spaces'"),
        ("$(rm -r x)", "'$(rm -r x)'"),
        ("-x", "./-x"),
    ],
)
def test_paths_that_a_shell_would_take_apart(path: str, shown: str) -> None:
    assert quoted(Path(path)) == shown
