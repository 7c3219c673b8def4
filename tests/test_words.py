"""The project uses its field's words: no line has a word of `tests.words.USUAL`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.words import OLD_FORMATS, ROOT, prose_files, source_files, stilted


@pytest.mark.parametrize(
    "path", [*source_files(), *prose_files()], ids=lambda path: str(path.relative_to(ROOT))
)
def test_usual_words(path: Path) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {word!r}, usual: {usual}"
        for number, word, usual, _ in stilted(path)
        if path != OLD_FORMATS
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "usual"),
    [
        ("Broken pictures are skipped.", "image"),
        ("It is no number.", "is not a ..."),
        ("The run was carried out.", "run"),
        ("There is no image, and it is no longer used.", ""),
        ("# It is\n# no number.", "is not a ..."),
        ("There\nis no image.", ""),
    ],
)
def test_what_counts(tmp_path: Path, line: str, usual: str) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"An image is not a view.\n{line}\n")
    found = list(stilted(path))
    assert {number for number, *_ in found} == ({2} if usual else set())
    assert not usual or found[0][2] == usual
