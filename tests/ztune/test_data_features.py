"""The feature cache with kills, corruption and concurrent writers, and reproducible features."""

import errno
import hashlib
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from ztune.data.cache import FeatureCache, OptionalCache, OptionalLog, key_of
from ztune.data.features import Features, Views, encode_files
from ztune.errors import DataError
from ztune.progress import forward_warnings
from ztune.types import F32, U8, RandomView

Items = list[tuple[Path, str]]


@dataclass
class FakeEncoder:
    """Images are text files; a feature is a function of text and view alone."""

    identity: str = "fake"
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    stop_after: int | None = None

    def read(self, path: Path, view: RandomView | None) -> U8:
        self.reads.append(path.name)
        text = path.read_text()
        if text == "broken":
            raise DataError(f'image "{path}" cannot be read: broken')
        levels = list(hashlib.sha256(text.encode()).digest()[:12])
        shift = 0 if view is None else int(view.rng.integers(256))
        return (np.array(levels, np.int64) + shift).astype(np.uint8).reshape(2, 2, 3)

    def encode(self, pixels: U8) -> F32:
        if self.stop_after is not None and len(self.shapes) >= self.stop_after:
            raise KeyboardInterrupt
        self.shapes.append(pixels.shape)
        values = pixels.reshape(len(pixels), 12).astype(np.float32) + 1
        unit: F32 = values / np.linalg.norm(values, axis=1, keepdims=True)
        return unit


def make_items(root: Path, n: int, broken: tuple[int, ...] = ()) -> Items:
    items = []
    for i in range(n):
        path = root / f"{i:03}.png"
        path.write_text("broken" if i in broken else f"image {i}")
        items.append((path, hashlib.sha256(f"{i}".encode()).hexdigest()))
    return items


def run(encoder: FakeEncoder, items: Items, folder: Path, n_views: int = 0, seed: int = 0,
        skip_broken: bool = False) -> Features:  # fmt: skip
    cache = FeatureCache(folder)
    return encode_files(
        encoder, items, cache, Views(n_views, seed), batch_size=4, skip_broken=skip_broken
    )


def test_features_in_order_and_from_the_cache(tmp_path: Path) -> None:
    items, encoder = make_items(tmp_path, 10), FakeEncoder()
    first = run(encoder, items, tmp_path / "cache")
    assert first.values.shape == (1, 10, 12)
    assert first.values.dtype == np.float32
    assert first.kept.all()
    assert first.n_encoded == 10
    assert encoder.shapes == [(4, 2, 2, 3)] * 3
    direct = encoder.encode(np.stack([encoder.read(path, None) for path, _ in items]))
    np.testing.assert_array_equal(first.values[0], direct)
    again = FakeEncoder()
    second = run(again, items, tmp_path / "cache")
    assert (second.n_encoded, again.reads) == (0, [])
    np.testing.assert_array_equal(first.values, second.values)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_random_views_depend_on_image_seed_and_number_alone(tmp_path: Path) -> None:
    items = make_items(tmp_path, 7)
    views = run(FakeEncoder(), items, tmp_path / "a", n_views=3, seed=5).values
    assert views.shape == (3, 7, 12)
    turned = run(FakeEncoder(), items[::-1], tmp_path / "b", n_views=5, seed=5).values
    np.testing.assert_array_equal(views, turned[:3, ::-1])
    assert not np.array_equal(views[0], views[1])
    other = run(FakeEncoder(), items, tmp_path / "a", n_views=3, seed=6)
    assert other.n_encoded == 21
    assert not np.array_equal(views, other.values)
    # More views of the same seed: only those are encoded.
    assert run(FakeEncoder(), items, tmp_path / "a", n_views=5, seed=5).n_encoded == 14


def test_another_encoder_shares_nothing(tmp_path: Path) -> None:
    items = make_items(tmp_path, 3)
    run(FakeEncoder(), items, tmp_path / "c")
    assert run(FakeEncoder("other"), items, tmp_path / "c").n_encoded == 3
    assert key_of("a", "bc") != key_of("ab", "c")


def test_one_image_twice_is_encoded_once(tmp_path: Path) -> None:
    items = make_items(tmp_path, 3)
    features = run(FakeEncoder(), items + items, tmp_path / "c")
    assert features.n_encoded == 3
    np.testing.assert_array_equal(features.values[:, :3], features.values[:, 3:])


def test_progress_counts_views(tmp_path: Path) -> None:
    items, calls = make_items(tmp_path, 5), list[tuple[int, int]]()
    cache = FeatureCache(tmp_path / "c")
    run(FakeEncoder(), items[:1], tmp_path / "c", n_views=2)
    encode_files(
        FakeEncoder(), items, cache, Views(2), 4, progress=lambda *done: calls.append(done)
    )
    assert calls == [(4, 10), (8, 10), (10, 10)] or calls[-1] == (10, 10)


def test_broken_images_stop_the_run_or_are_left_out(tmp_path: Path) -> None:
    items = make_items(tmp_path, 9, broken=(0, 5))
    with pytest.raises(DataError, match=r"000\.png.*`skip_broken`"):
        run(FakeEncoder(), items, tmp_path / "c")
    features = run(FakeEncoder(), items, tmp_path / "c", n_views=2, skip_broken=True)
    assert features.kept.tolist() == [i not in (0, 5) for i in range(9)]
    assert features.values.shape == (2, 7, 12)
    whole = [item for i, item in enumerate(items) if i not in (0, 5)]
    np.testing.assert_array_equal(
        features.values, run(FakeEncoder(), whole, tmp_path / "d", n_views=2).values
    )
    with pytest.raises(DataError, match="none of 1 image"):
        run(FakeEncoder(), items[:1], tmp_path / "c", skip_broken=True)


def test_values_that_are_not_finite_are_named_and_not_kept(tmp_path: Path) -> None:
    class Overflowing(FakeEncoder):
        def encode(self, pixels: U8) -> F32:
            return np.full((len(pixels), 12), np.inf, np.float32)

    items = make_items(tmp_path, 3)
    with pytest.raises(DataError, match=r"000\.png.*not finite"):
        run(Overflowing(), items, tmp_path / "c")
    assert run(FakeEncoder(), items, tmp_path / "c").n_encoded == 3


def test_no_more_images_are_read_than_needed(tmp_path: Path) -> None:
    encoder = FakeEncoder(stop_after=1)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        run(encoder, make_items(tmp_path, 200), tmp_path / "c")
    assert len(encoder.reads) < 20
    assert threading.active_count() == before
    assert run(FakeEncoder(), make_items(tmp_path, 200), tmp_path / "c").n_encoded == 196


# The file


def test_killed_at_every_byte(tmp_path: Path) -> None:
    items = make_items(tmp_path, 6)
    whole = run(FakeEncoder(), items, tmp_path / "whole")
    (log,) = (tmp_path / "whole").iterdir()
    content = log.read_bytes()
    cut_folder = tmp_path / "cut"
    cut_folder.mkdir()
    size = len(content) // 6
    for length in range(len(content)):
        (cut_folder / log.name).write_bytes(content[:length])
        features = run(FakeEncoder(), items, cut_folder)
        np.testing.assert_array_equal(features.values, whole.values)
        assert features.n_encoded == 6 - length // size
        assert run(FakeEncoder(), items, cut_folder).n_encoded == 0


def test_damage_at_every_byte(tmp_path: Path) -> None:
    items = make_items(tmp_path, 6)
    whole = run(FakeEncoder(), items, tmp_path)
    (log,) = tmp_path.glob("*.features")
    content = log.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0x5A
        log.write_bytes(damaged)
        features = run(FakeEncoder(), items, tmp_path)
        assert features.n_encoded == 1
        np.testing.assert_array_equal(features.values, whole.values)


def test_only_wanted_records_are_read_whatever_the_others_are(tmp_path: Path) -> None:
    log = FeatureCache(tmp_path).log("a")
    rows = {key_of(str(i)): np.full(3, i, np.float32) for i in range(6)}
    for key, row in rows.items():
        log.append({key: row})
    content = bytearray(log.path.read_bytes())
    size = len(content) // 6
    wanted = {key_of("1"), key_of("5"), key_of("none")}
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        log.path.write_bytes(damaged)
        hit = place // size
        expected = [i for i in (1, 5) if i != hit]
        found = log.read(wanted)
        assert found.keys() == {key_of(str(i)) for i in expected}
        assert all((found[key_of(str(i))] == i).all() for i in expected)
    log.path.write_bytes(content)
    assert log.read(set()) == {}
    assert log.read().keys() == rows.keys()


def test_a_record_with_wrong_values_and_a_right_sum_is_not_used(tmp_path: Path) -> None:
    log = FeatureCache(tmp_path).log("x")
    log.append({key_of("bad"): np.array([1, np.nan], np.float32)})
    log.append({key_of("good"): np.array([1, 2], np.float32)})
    assert list(log.read()) == [key_of("good")]
    log.path.write_bytes(b"zft1" * 1000)
    assert log.read() == {}


WRITER = """
import sys
from pathlib import Path
import numpy as np
from ztune.data.cache import FeatureCache, key_of
log = FeatureCache(Path(sys.argv[1])).log("shared")
for batch in range(100):
    names = [f"{sys.argv[2]} {batch} {i}" for i in range(16)]
    log.append({key_of(n): np.full(64, batch, np.float32) for n in names})
    if sys.argv[2] == "killed" and batch == 50:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_several_processes_share_one_cache(tmp_path: Path) -> None:
    names = ("a", "b", "killed")
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name]) for name in names
    ]
    codes = [writer.wait(timeout=60) for writer in writers]
    assert codes[:2] == [0, 0]
    assert codes[2] != 0
    records = FeatureCache(tmp_path).log("shared").read()
    assert len(records) == (100 + 100 + 51) * 16
    for batch in range(100):
        assert (records[key_of(f"a {batch} 3")] == batch).all()


def test_a_cache_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be created"):
        FeatureCache(tmp_path / "file" / "cache").log("x")
    log = FeatureCache(tmp_path).log("x")
    log.path.mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        log.read()
    with pytest.raises(DataError, match="cannot be written"):
        log.append({key_of("k"): np.ones(3, np.float32)})


def test_a_full_disk_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(file: int, block: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = FeatureCache(tmp_path).log("x")
    with monkeypatch.context() as patch, pytest.raises(DataError, match="No space left"):
        patch.setattr("ztune.data.cache.os.write", write)
        log.append({key_of("k"): np.ones(3, np.float32)})


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="this system follows every link")
def test_a_cache_is_not_written_through_a_link(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"mine")
    log = FeatureCache(tmp_path / "cache").log("x")
    log.path.symlink_to(other)
    with pytest.raises(DataError, match="cannot be written"):
        log.append({key_of("k"): np.ones(3, np.float32)})
    assert other.read_bytes() == b"mine"


def test_the_data_room_needs_numpy_alone() -> None:
    code = (
        "import sys, ztune.data.features, ztune.data.folders; "
        "print([m for m in ('PIL', 'torch', 'runtimes', 'export') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("n", [1, 8, 23, 24, 25, 50])
def test_several_batches_a_call_give_the_same_features(tmp_path: Path, n: int) -> None:
    items, one, several = make_items(tmp_path, n), FakeEncoder(), FakeEncoder()
    alone = encode_files(one, items, FeatureCache(tmp_path / "one"))
    together = encode_files(several, items, FeatureCache(tmp_path / "several"), at_once=3)
    np.testing.assert_array_equal(together.values, alone.values)
    assert together.n_encoded == alone.n_encoded == n
    # Whole batches, at most three per call.
    sizes = [shape[0] for shape in several.shapes]
    assert sizes == [24] * (n // 24) + [-(-(n % 24) // 8) * 8] * (n % 24 > 0)
    # The cache knows no difference.
    again = encode_files(several, items, FeatureCache(tmp_path / "one"), at_once=3)
    assert again.n_encoded == 0


def test_a_log_that_cannot_be_read_is_not_used(tmp_path: Path) -> None:
    log = OptionalCache(tmp_path).log("x")
    assert isinstance(log, OptionalLog)
    log.log.path.mkdir()
    warned: list[str] = []
    with forward_warnings(warned.append):
        assert log.read() == {}
        log.append({bytes(32): np.ones(3, np.float32)})
    assert len(warned) == 1
    assert "features are not kept" in warned[0]
