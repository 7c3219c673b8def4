"""Text features on disk: what is encoded again, with the same bytes, and what may go wrong."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from export.quantize import quantize_bundle
from runtimes.bundle import load_bundle
from runtimes.ort import OrtPromptGraph
from runtimes.prompts import embed, token_table
from runtimes.providers import Execution
from runtimes.tokenizer import Tokenizer
from tests.conftest import MINI
from ztune import text_cache
from ztune.data.cache import trim
from ztune.progress import forward_warnings
from ztune.text_cache import StoredTextEncoder, TextStore
from ztune.types import F32, I64

SIZE = 6
NAMES = ("cat", "dog", "emu")


class Fake:
    """Encodes class c and context x as a function of both, and records its calls."""

    embed_dim = SIZE
    whole_calls = False

    def __init__(self, names: Sequence[str] = NAMES, calls: list[tuple[str, ...]] | None = None):
        self.class_keys = tuple(names)
        self.calls: list[tuple[str, ...]] = [] if calls is None else calls

    def encode(self, contexts: F32) -> F32:
        self.calls.append(self.class_keys)
        sums = contexts.sum(axis=(1, 2))
        codes = np.array([sum(name.encode()) for name in self.class_keys])
        grid = sums[:, None, None] * codes[:, None] + np.arange(SIZE)
        return np.asarray(np.sin(grid), np.float32)

    def part(self, classes: I64) -> "Fake":
        return Fake([self.class_keys[c] for c in classes], self.calls)


class Together(Fake):
    """Features depend on the whole call."""

    whole_calls = True


def contexts(seed: int = 0, n: int = 4) -> F32:
    return np.random.default_rng(seed).standard_normal((n, 3, 5)).astype(np.float32)


def store(folder: Path) -> TextStore:
    return TextStore(folder, ("bundle", "cpu"))


def encoded(fake: Fake, given: F32, folder: Path) -> tuple[int, list[tuple[str, ...]]]:
    """Encode with a store, check the bytes; return what was found and the calls made."""
    plain = type(fake)(fake.class_keys).encode(given)
    one = StoredTextEncoder(fake, store(folder))
    assert one.encode(given).tobytes() == plain.tobytes()
    return one.take_n_found(), fake.calls


def test_only_what_is_new_is_encoded(tmp_path: Path) -> None:
    assert encoded(Fake(), contexts(), tmp_path) == (0, [NAMES])
    assert encoded(Fake(), contexts(), tmp_path) == (12, [])
    # A class added, one dropped, another order.
    more = ("emu", "ant", "cat")
    assert encoded(Fake(more), contexts(), tmp_path) == (8, [("ant",)])
    assert encoded(Fake((*more, "dog")), contexts(), tmp_path) == (16, [])
    # Other contexts, and some of the same: a class is encoded as a whole.
    assert encoded(Fake(), contexts(1), tmp_path) == (0, [NAMES])
    assert encoded(Fake(), contexts()[1:3], tmp_path) == (6, [])
    mixed = np.concatenate([contexts()[:1], contexts(2, 1)])
    assert encoded(Fake(), mixed, tmp_path) == (0, [NAMES])
    # Another bundle.
    other = StoredTextEncoder(Fake(), TextStore(tmp_path, ("other", "cpu")))
    other.encode(contexts())
    assert other.take_n_found() == other.take_n_found() == 0


def test_where_bytes_depend_on_the_call_only_equal_calls_are_found(tmp_path: Path) -> None:
    assert encoded(Together(), contexts(), tmp_path) == (0, [NAMES])
    assert encoded(Together(), contexts(), tmp_path) == (12, [])
    assert encoded(Together(), contexts()[:2], tmp_path) == (0, [NAMES])
    for file in list(tmp_path.iterdir())[:1]:
        file.unlink()
    assert encoded(Together(), contexts(), tmp_path) == (0, [NAMES])


@pytest.mark.parametrize("damage", ["flip", "cut", "other size", "not finite"])
def test_damaged_records_are_encoded_again(damage: str, tmp_path: Path) -> None:
    encoded(Fake(), contexts(), tmp_path)
    for path in tmp_path.iterdir():
        content = bytearray(path.read_bytes())
        if damage == "flip":
            content[60] ^= 1
        path.write_bytes(content[:-5] if damage == "cut" else content)
    if damage == "other size":
        for path in tmp_path.iterdir():
            path.unlink()
        rows = StoredTextEncoder(Wide(), store(tmp_path))
        rows.encode(contexts())
    if damage == "not finite":
        broken = np.full((4, 3, 5), np.nan, np.float32)
        StoredTextEncoder(Fake(), store(tmp_path)).encode(broken)
        assert encoded(Fake(), contexts(), tmp_path) == (12, [])
        fake = Fake()
        StoredTextEncoder(fake, store(tmp_path)).encode(broken)
        assert fake.calls == [NAMES]
        return
    assert encoded(Fake(), contexts(), tmp_path) == (0, [NAMES])
    assert encoded(Fake(), contexts(), tmp_path) == (12, [])


class Wide(Fake):
    """Another tower, with features of another size."""

    embed_dim = SIZE + 1

    def encode(self, contexts: F32) -> F32:
        return np.ones((len(contexts), len(self.class_keys), SIZE + 1), np.float32)


@pytest.mark.parametrize("at", ["folder", "log"])
def test_a_folder_that_cannot_be_used_is_no_error(at: str, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    if at == "folder":
        folder.write_text("a file")
    else:
        encoded(Fake(), contexts(), folder)
        for path in list(folder.iterdir()):
            path.unlink()
            path.mkdir()
    warned: list[str] = []
    with forward_warnings(warned.append):
        assert encoded(Fake(), contexts(), folder) == (0, [NAMES])
    assert len(warned) == 1
    assert "text features are not kept" in warned[0]


def test_two_runs_at_once_lose_nothing(tmp_path: Path) -> None:
    one, other = (StoredTextEncoder(Fake(), store(tmp_path)) for _ in range(2))
    for seed in range(6):
        (one if seed % 2 else other).encode(contexts(seed))
    for seed in range(6):
        assert encoded(Fake(), contexts(seed), tmp_path) == (12, [])


def test_a_store_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 4 * (4 + 32 + 4 + 4 * SIZE + 4)  # of a class's four contexts
    monkeypatch.setattr(text_cache, "MOST_LOG_BYTES", 2 * size)
    for seed in range(3):
        encoded(Fake(), contexts(seed), tmp_path)
    # The third run finds logs of two, and the fourth starts them again.
    assert {path.stat().st_size for path in tmp_path.iterdir()} == {3 * size}
    encoded(Fake(), contexts(9), tmp_path)
    assert {path.stat().st_size for path in tmp_path.iterdir()} == {size}
    monkeypatch.setattr(text_cache, "_MOST_BYTES", 3 * 4 * SIZE * 4)
    one = StoredTextEncoder(Fake(), store(tmp_path))
    for seed in (10, 11):
        one.encode(contexts(seed))
    assert encoded(Fake(), contexts(10), tmp_path) == (12, [])
    assert encoded(Fake(), contexts(11), tmp_path) == (0, [NAMES])


def test_the_logs_unused_for_longest_are_removed_first(tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / f"{number}.features"
        path.write_bytes(bytes(100))
        os.utime(path, (1000 + number, 1000 + number))
    (tmp_path / "notes.txt").write_bytes(bytes(1000))
    os.utime(tmp_path / "0.features", (2000, 2000))
    trim(tmp_path, 400)
    assert len(list(tmp_path.iterdir())) == 5
    trim(tmp_path, 250)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"notes.txt", "0.features", "3.features"}
    trim(tmp_path / "missing", 0)


WORDS = ("cat", "deer", "yellow school bus", "retriever", "black bicycle", "sea")


def graph(memory_limit: int | None = None, threads: int = 1) -> OrtPromptGraph:
    bundle = load_bundle(MINI)
    return OrtPromptGraph(bundle, Tokenizer(bundle), Execution("cpu", threads, memory_limit))


@pytest.mark.parametrize("memory_limit", [None, 2])
def test_a_part_of_the_classes_has_the_bytes_of_the_whole(memory_limit: int | None) -> None:
    opened = graph(memory_limit)
    rng, table = np.random.default_rng(0), token_table(opened.bundle)
    given = embed(table, rng.integers(300, 800, (6, 4)))
    encoder = opened.encoder(WORDS, 4, 6)
    whole = encoder.encode(given)
    parts: tuple[list[int], ...] = ([0], [2], [5], [3, 1], [4, 0, 2], [5, 4, 3, 2, 1])
    for classes in parts:
        part = encoder.part(np.array(classes))
        for n in (6, 3, 1):
            assert part.encode(given[:n]).tobytes() == whole[:n, classes].tobytes(), (classes, n)


def test_class_keys_tell_names_apart_that_have_other_bytes(tmp_path: Path) -> None:
    opened = graph()
    keys = opened.encoder(WORDS, 4, 6).class_keys
    assert len(set(keys)) == len(WORDS)
    # Other names matter only through the length to which they are padded.
    same = opened.encoder((WORDS[2], WORDS[0]), 4, 1).class_keys
    assert same == (keys[2], keys[0])
    alone = [opened.encoder((name,), 4, 1).class_keys[0] for name in WORDS]
    assert not set(alone) & set(keys)
    given = embed(token_table(opened.bundle), np.arange(300, 308).reshape(2, 4))
    for names in (WORDS, WORDS[:2], WORDS[:1], WORDS[2:], WORDS[1:3]):
        encoder = opened.encoder(names, 4, 2)
        stored = StoredTextEncoder(encoder, store(tmp_path))
        assert stored.encode(given).tobytes() == encoder.encode(given).tobytes()
        again = StoredTextEncoder(encoder, store(tmp_path))
        assert again.encode(given).tobytes() == encoder.encode(given).tobytes()
        assert again.take_n_found() == 2 * len(names)


def test_in_low_precision_calls_that_are_split_otherwise_are_others(tmp_path: Path) -> None:
    bundle = quantize_bundle(load_bundle(MINI), tmp_path / "int8", "int8")
    given = np.random.default_rng(0).integers(300, 800, (10, 4))
    contexts = embed(token_table(bundle), given)
    for memory_limit in (None, 2):
        opened = OrtPromptGraph(bundle, Tokenizer(bundle), Execution("cpu", 1, memory_limit))
        encoder = opened.encoder(WORDS, 4, 10)
        stored = StoredTextEncoder(encoder, store(tmp_path / "texts"))
        assert stored.encode(contexts).tobytes() == encoder.encode(contexts).tobytes()
        assert stored.take_n_found() == 0


def test_a_graph_is_opened_when_a_text_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a graph was opened")

    given = embed(token_table(load_bundle(MINI)), np.arange(300, 308).reshape(2, 4))
    expected = StoredTextEncoder(graph().encoder(WORDS, 4, 2), store(tmp_path)).encode(given)
    monkeypatch.setattr("runtimes.ort.open_session", refuse)
    stored = StoredTextEncoder(graph().encoder(WORDS, 4, 2), store(tmp_path))
    assert stored.encode(given).tobytes() == expected.tobytes()
