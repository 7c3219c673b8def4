"""Roles never overlap, shots are nested and filled first, and no image changes between roles."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import DIGITS
from ztune.data.coop import CoopSplit, Item
from ztune.data.folders import ListedImage, Listing, read_dataset
from ztune.data.manifests import SplitName
from ztune.data.split import Split, SplitSettings
from ztune.data.splitter import digest_images, make_split
from ztune.errors import ConfigError, DataError, FormatError

ROLES: tuple[SplitName, ...] = ("train", "val", "test")
Counts = dict[str, int]


def make(counts: Counts, parts: dict[SplitName, Counts] | None = None) -> Listing:
    """Return a data set that is nowhere on disk."""
    classes = tuple(sorted(counts))
    images = []
    both: list[tuple[SplitName | None, Counts]] = [*parts.items()] if parts else [(None, counts)]
    for split, numbers in both:
        for name, n in numbers.items():
            paths = [f"{split}/{name}/{i}.png" for i in range(n)]
            images += [ListedImage(path, classes.index(name), split) for path in paths]
    images.sort(key=lambda image: image.path)
    return Listing(Path("/data"), classes, tuple(images))


def digest(path: Path) -> str:
    """Return a digest for an image that is nowhere on disk."""
    return hashlib.sha256("/".join(path.parts[2:]).encode()).hexdigest()


def split_of(counts: Counts, **settings: Any) -> Split:
    return made(make(counts), SplitSettings(**settings))


def made(listing: Listing, settings: SplitSettings, test_data: Listing | None = None) -> Split:
    return make_split(listing, settings, test_data, digest)


def paths(split: Split, role: SplitName, name: str | None = None) -> list[str]:
    return [
        entry.path for entry in split.entries_of(role) if name in (None, split.classes[entry.label])
    ]


def sizes(split: Split, role: SplitName) -> list[int]:
    return [len(paths(split, role, name)) for name in split.classes]


many = st.dictionaries(st.sampled_from("abcdef"), st.integers(6, 40), min_size=2)


@given(many, st.integers(1, 6), st.none() | st.just(0), st.integers(0, 5), st.integers(0, 5))
def test_roles_never_overlap(
    counts: Counts, shots: int, n_val: int | None, seed: int, split_seed: int
) -> None:
    split = split_of(counts, shots=shots, n_val=n_val, seed=seed, split_seed=split_seed)
    assert len({entry.path for entry in split.entries}) == len(split.entries)
    assert sizes(split, "train") == [shots] * len(counts)
    wanted = min(shots, 4) if n_val is None else n_val
    left = [n - t for n, t in zip(counts_of(counts), sizes(split, "test"), strict=True)]
    assert all(n <= wanted for n in sizes(split, "val"))
    assert sizes(split, "val") == [min(wanted, n - shots) for n in left]
    if split.entries_of("test"):
        assert min(counts.values()) >= 2 * (shots + wanted)
        assert min(sizes(split, "test")) > 0
    else:
        assert any(note.startswith("no test set") for note in split.notes)


def counts_of(counts: Counts) -> list[int]:
    return [counts[name] for name in sorted(counts)]


def by_role(split: Split) -> tuple[set[str], set[str]]:
    """Return the digests of the images that tune, and of those that test."""
    test = {entry.sha256 for entry in split.entries_of("test")}
    return {entry.sha256 for entry in split.entries} - test, test


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(30, 60), min_size=2),
    st.integers(1, 8),
    st.integers(0, 5),
    st.sampled_from(["auto", 0.2, 0.7]),
    st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 10**6)), min_size=1, max_size=40),
)
def test_more_images_move_none_between_training_and_test(
    counts: Counts, shots: int, seed: int, share: Any, more: list[tuple[str, int]]
) -> None:
    settings = SplitSettings(shots, 0, share, seed=seed)
    listing = make(counts)
    classes = tuple(sorted({*listing.classes, *(name for name, _ in more)}))
    shifted = [replace(p, label=classes.index(listing.classes[p.label])) for p in listing.images]
    added = [ListedImage(f"new/{name}/{n}.png", classes.index(name), None) for name, n in {*more}]
    images = tuple(sorted([*shifted, *added], key=lambda image: image.path))
    try:
        before = made(listing, settings)
        after = made(replace(listing, classes=classes, images=images), settings)
    except DataError:  # a class has too few images
        return
    if before.entries_of("test") and after.entries_of("test"):
        (tuned, tested), (tuned_after, tested_after) = by_role(before), by_role(after)
        assert tested <= tested_after
        assert tuned.isdisjoint(tested_after)
        assert tested.isdisjoint(tuned_after)


def test_one_more_image_never_moves_another_of_the_digits() -> None:
    listing = read_dataset(DIGITS)
    images = listing.images
    whole = make_split(listing, SplitSettings(16))
    for left_out in (0, len(images) // 2, len(images) - 1):
        fewer = replace(listing, images=images[:left_out] + images[left_out + 1 :])
        before = make_split(fewer, SplitSettings(16))
        assert by_role(before)[1] <= by_role(whole)[1]
        assert by_role(before)[0].isdisjoint(by_role(whole)[1])
        assert by_role(before)[1].isdisjoint(by_role(whole)[0])
    assert not whole.notes


@given(many, st.integers(0, 5))
def test_shots_are_nested(counts: Counts, seed: int) -> None:
    of = {n: split_of(counts, shots=n, seed=seed, test_fraction=0) for n in (2, 6)}
    for name in counts:
        assert paths(of[2], "train", name) == paths(of[6], "train", name)[:2]


@given(many, st.integers(0, 5))
def test_another_class_changes_nothing_for_the_others(counts: Counts, seed: int) -> None:
    settings = {"shots": 3, "seed": seed, "test_fraction": 0.2}
    before, after = split_of(counts, **settings), split_of({**counts, "New": 30}, **settings)
    for role in ROLES:
        for name in counts:
            assert paths(before, role, name) == paths(after, role, name)


def test_the_test_half_is_the_same_for_every_seed_and_shot_count() -> None:
    counts = {"a": 61, "b": 60}
    base = paths(split_of(counts, shots=1), "test")
    assert 45 < len(base) < 75
    for shots, seed in ((1, 2), (4, 1), (16, 7)):
        assert paths(split_of(counts, shots=shots, seed=seed), "test") == base
    assert paths(split_of(counts, shots=1, split_seed=1), "test") != base
    trains = [set(paths(split_of(counts, shots=4, seed=seed), "train")) for seed in (1, 2)]
    assert trains[0] != trains[1]


def test_an_images_turn_depends_on_its_content_alone() -> None:
    dataset = make({"a": 30, "b": 30})
    renamed = {f"{29 - i % 30:02}{p.path}": p for i, p in enumerate(dataset.images)}
    images = tuple(replace(image, path=path) for path, image in renamed.items())
    contents = {Path("/data", path): digest(Path("/data", p.path)) for path, p in renamed.items()}
    other = make_split(
        replace(dataset, images=images), SplitSettings(4), digest=contents.__getitem__
    )
    same = made(dataset, SplitSettings(4))
    assert same.entries_of("test")
    for role in ROLES:
        of = [sorted(entry.sha256 for entry in split.entries_of(role)) for split in (same, other)]
        assert of[0] == of[1]


def test_headline_case_sixteen_images_and_sixteen_shots() -> None:
    split = split_of({"a": 16, "b": 16, "c": 16}, shots=16)
    assert [sizes(split, role) for role in ROLES] == [[16] * 3, [0] * 3, [0] * 3]
    assert len(split.notes) == 2
    assert split.notes[0].startswith('no test set: class "a" has 16 images')
    assert "40 in every class" in split.notes[0]
    assert split.notes[1] == "no validation images: all are shots"


def test_validation_takes_what_is_left() -> None:
    split = split_of({"a": 18, "b": 19}, shots=16)
    assert sizes(split, "val") == [2, 3]
    assert "2 to 3 images per class instead of 4" in split.notes[1]
    assert not split_of({"a": 70, "b": 71}, shots=16).notes


def test_auto_keeps_none_where_the_hash_leaves_too_few_to_tune_with() -> None:
    counts = {f"{n:02}": 40 for n in range(60)}
    split = split_of(counts, shots=16)
    left = [
        sum(not is_tested(f"None/{name}/{i}.png") for i in range(40)) for name in sorted(counts)
    ]
    assert min(left) < 16, "the case that this test is about"
    name = sorted(counts)[next(i for i, n in enumerate(left) if n < 16)]
    n = left[sorted(counts).index(name)]
    assert split.notes[0] == (
        f'no test set: class "{name}" would have {40 - n} test and {n} training images of 40, '
        "expected at least 1 and 16 (add a test folder, or use "
        "`test_data`)"
    )
    assert sizes(split, "train") == [16] * 60
    # Requested validation images must remain as well.
    asked = {"a": 60, "b": 60}
    assert split_of(asked, shots=16, n_val=4).entries_of("test")
    assert not split_of(asked, shots=16, n_val=14).entries_of("test")


def is_tested(path: str) -> bool:
    """Return whether an image is held out when half are; docs/data.md has the rule."""
    content = digest(Path("/data", path))
    turn = hashlib.sha256(f"test:0:{content}".encode()).hexdigest()
    return int(turn[:16], 16) < 2**63


def test_test_fraction() -> None:
    split = split_of({"a": 400, "b": 200}, shots=4, test_fraction=0.3)
    for n, expected, spread in zip(sizes(split, "test"), (120, 60), (37, 26), strict=True):
        assert abs(n - expected) < spread  # four standard deviations of a draw
    tested = {f"None/{name}/{i}.png" for name in "ab" for i in range(200)}
    half = split_of({"a": 200, "b": 200}, shots=4, test_fraction=0.5)
    assert {*paths(half, "test")} == {path for path in tested if is_tested(path)}
    few = split_of({"a": 9, "b": 9}, shots=4, test_fraction=1e-9)
    assert few.notes == ('2 class(es) have no test images: "a"',)
    assert split_of({"a": 99, "b": 99}, shots=1, test_fraction=0).notes == (
        "no test set: `test_fraction` is 0",
    )


@pytest.mark.parametrize(
    ("counts", "settings", "message"),
    [
        (
            {"a": 16, "b": 15},
            {"shots": 16},
            'class "b" has 15 training images, .* 16 ',
        ),
        (
            {"a": 20, "b": 20},
            {"shots": 16, "test_fraction": 0.5},
            r'"a" has \d+ training images \(20 minus \d+ for testing\).* 16 \(`shots`\); 2 such',
        ),
        ({"a": 17, "b": 20}, {"shots": 16, "n_val": 4}, '"a" has 1 images left for validation'),
    ],
)
def test_too_few_images(counts: Counts, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_of(counts, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"shots": 0},
        {"shots": "some"},
        {"shots": 2.5},
        {"shots": 1, "n_val": -1},
        {"shots": 1, "test_fraction": 1.0},
        {"shots": 1, "test_fraction": float("nan")},
        {"shots": 1, "seed": -1},
    ],
)
def test_impossible_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="`"):
        SplitSettings(**settings)


# All images


def all_of(counts: Counts, **settings: Any) -> Split:
    return split_of(counts, shots="all", **settings)


sizes_of_any = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 80), min_size=2)


@given(sizes_of_any, st.none() | st.integers(0, 6), st.integers(0, 5))
def test_all_images_are_used_and_only_large_classes_are_tested(
    counts: Counts, n_val: int | None, seed: int
) -> None:
    split = all_of(counts, n_val=n_val, seed=seed)
    assert len({entry.path for entry in split.entries}) == sum(counts.values())
    trained, validated, tested = (sizes(split, role) for role in ROLES)
    for n, n_train, own_val, n_test in zip(
        counts_of(counts), trained, validated, tested, strict=True
    ):
        assert (n_test > 0) == (n >= 40)
        assert n_train >= 1
        left = n - n_test
        assert own_val == (min(n_val or 0, left // 5) if left >= 16 else 0)


@given(
    sizes_of_any,
    st.lists(st.tuples(st.sampled_from("abcdefg"), st.integers(0, 10**6)), min_size=1, max_size=40),
)
def test_with_all_images_more_of_them_move_none_of_another_class(
    counts: Counts, more: list[tuple[str, int]]
) -> None:
    listing, settings = make(counts), SplitSettings("all")
    classes = tuple(sorted({*listing.classes, *(name for name, _ in more)}))
    shifted = [replace(p, label=classes.index(listing.classes[p.label])) for p in listing.images]
    added = [ListedImage(f"new/{name}/{n}.png", classes.index(name), None) for name, n in {*more}]
    before = made(listing, settings)
    after = made(replace(listing, classes=classes, images=(*shifted, *added)), settings)
    new_counts = dict.fromkeys(classes, 0) | counts
    for name, _ in {*more}:
        new_counts[name] += 1
    for name, n in counts.items():
        if n < 40 <= new_counts[name]:
            continue  # from now on half of this class is for testing
        for role in ROLES:
            assert {*paths(before, role, name)} <= {*paths(after, role, name)}


def test_what_is_told_of_all_images() -> None:
    assert all_of({"a": 39, "b": 1}).notes == (
        "no test set: no class has 40 images or more (add a test folder, or use `test_data`)",
    )
    assert all_of({"a": 40, "b": 5, "c": 39}).notes == (
        '2 of 3 classes have no test images, since they have fewer than 40 images: "b", "c"',
    )
    assert all_of({"a": 40, "b": 41}).notes == ()
    assert all_of({"a": 20, "b": 15}, n_val=4).notes[1] == (
        "validation: 0 to 4 images per class instead of 4: at most a fifth of a class, and none of "
        "fewer than 16"
    )
    with pytest.raises(DataError, match=r"has 0 training images \(1 minus 1 for testing\), .* 1 "):
        all_of({"a": 1, "b": 99}, test_fraction=0.9)


def test_all_images_of_data_with_splits() -> None:
    counts = {"a": 60, "b": 2}
    dataset = make(counts, {"train": counts, "val": {"a": 3, "b": 9}, "test": counts})
    split = made(dataset, SplitSettings("all"))
    assert [sizes(split, role) for role in ROLES] == [[60, 2], [3, 9], [60, 2]]
    split = made(dataset, SplitSettings("all", n_val=2))
    assert sizes(split, "val") == [2, 2]
    split = made(make(counts), SplitSettings("all"), replace(make(counts), root=Path("/other/x")))
    assert [sizes(split, role) for role in ROLES] == [[60, 2], [0, 0], [60, 2]]


def test_all_images_of_published_lists() -> None:
    of_role = {
        role: tuple(Item(f"{role}/{name}/{i}.png", label, name) for i in range(n))
        for role, n in (("train", 30), ("val", 7), ("test", 9))
        for label, name in ((0, "a"),)
    }
    lists = CoopSplit(
        *(
            own + tuple(replace(i, label=1, name="b", path=f"b{i.path}") for i in own)
            for own in of_role.values()
        )
    )
    listing = Listing(
        Path("/data"),
        ("a", "b"),
        tuple(ListedImage(item.path, item.label, role) for role, item in lists),
        lists=lists,
    )
    split = made(listing, SplitSettings("all"))
    assert [sizes(split, role) for role in ROLES] == [[30, 30], [7, 7], [9, 9]]
    assert sizes(made(listing, SplitSettings("all", n_val=0)), "val") == [0, 0]
    assert not split.notes


# Splits of the data's own, and `test_data`


def test_given_splits_are_kept() -> None:
    counts = {"a": 20, "b": 20}
    dataset = make(counts, {"train": counts, "val": {"a": 3, "b": 9}, "test": counts})
    split = made(dataset, SplitSettings(16))
    assert [sizes(split, role) for role in ROLES] == [[16, 16], [3, 4], [20, 20]]
    for role in ROLES:
        assert all(path.startswith(role) for path in paths(split, role))
    with pytest.raises(DataError, match="omit `test_fraction`"):
        made(dataset, SplitSettings(16, test_fraction=0.5))


def test_without_val_folder_validation_comes_from_train() -> None:
    counts = {"a": 20, "b": 20}
    split = made(make(counts, {"train": counts}), SplitSettings(16))
    assert sizes(split, "val") == [4, 4]
    assert split.notes == (
        "no test set: the data has none (add a test folder, or use `test_data`)",
    )


def test_test_data() -> None:
    dataset = make({"a": 40, "b": 40})
    other = replace(make({"a": 3, "b": 2}, {"test": {"a": 3, "b": 2}}), root=Path("/other"))
    split = made(dataset, SplitSettings(16), other)
    assert sizes(split, "test") == [3, 2]
    assert {entry.root for entry in split.entries_of("test")} == {"test"}
    assert split.items("test")[0][0] == Path("/other/test/a/0.png")
    assert split.items("train")[0][0].is_relative_to("/data")
    assert split.labels("test").tolist() == [0, 0, 0, 1, 1]
    assert not split.notes


def test_test_data_replaces_test_folders() -> None:
    counts = {"a": 20, "b": 20}
    dataset = make(counts, {"train": counts, "test": counts})
    other = make({"a": 3, "b": 2})
    split = made(dataset, SplitSettings(16), other)
    assert sizes(split, "test") == [3, 2]
    assert split.notes == ("test images of the data, not used: 40",)


def test_wrong_test_data() -> None:
    data = make({"a": 9, "b": 9})
    settings = SplitSettings(4)
    with pytest.raises(DataError, match=r"missing: b; unknown: c, d"):
        made(data, settings, make({"a": 1, "c": 1, "d": 1}))
    with pytest.raises(DataError, match="splits but no test images"):
        made(data, settings, make({"a": 1, "b": 1}, {"train": {"a": 1, "b": 1}}))
    with pytest.raises(DataError, match=r"two roles.*18 such pair"):
        made(data, settings, data)


# The same bytes twice


def with_copies(listing: Listing, settings: SplitSettings, *paths: str) -> Split:
    """Split it with these images equal."""
    equal = {listing.root / path for path in paths}
    return make_split(
        listing, settings, digest=lambda path: "0" * 64 if path in equal else digest(path)
    )


def test_copies_in_one_class_count_once() -> None:
    copies = ("None/a/3.png", "None/a/7.png")
    split = with_copies(make({"a": 17, "b": 16}), SplitSettings(16), *copies)
    assert "None/a/7.png" not in paths(split, "train")
    assert split.notes[0] == 'exact duplicates of another image, omitted: 1 ("None/a/7.png")'
    with pytest.raises(DataError, match='"a" has 15 training images'):
        with_copies(make({"a": 16, "b": 16}), SplitSettings(16), *copies)


def test_one_image_in_two_classes_or_roles() -> None:
    with pytest.raises(
        DataError, match=r'two classes: "/data/None/a/3.png" \(train, class "a"\) and'
    ):
        with_copies(make({"a": 16, "b": 16}), SplitSettings(1), "None/a/3.png", "None/b/3.png")
    counts = {"a": 16, "b": 16}
    data = make(counts, {"train": counts, "test": counts})
    equal = ("train/a/3.png", "train/a/4.png", "test/a/5.png")
    with pytest.raises(DataError, match=r"two roles: .*/test/a/5.png.*; 2 such pair") as caught:
        with_copies(data, SplitSettings(1), *equal)
    assert "train/a/3.png" in str(caught.value)


# split.json


def on_disk(root: Path) -> Split:
    for name in "ab":
        (root / name).mkdir(parents=True)
        for i in range(20):
            (root / name / f"{i}.png").write_text(f"{name}{i}")
    dataset = read_dataset(root)
    return make_split(dataset, SplitSettings(4, n_val=2))


def test_split_file_round_trip(tmp_path: Path) -> None:
    split = on_disk(tmp_path)
    values = json.loads(json.dumps(split.to_json()))
    assert Split.from_json(values, "split.json") == split
    split.check_unchanged()


def test_changed_images_are_named(tmp_path: Path) -> None:
    split = on_disk(tmp_path)
    first, second = split.items("train")[0][0], split.items("test")[0][0]
    unused = set(tmp_path.rglob("*.png")) - {split.file(entry) for entry in split.entries}
    for path in unused:
        path.unlink()
    split.check_unchanged()
    first.write_text("other")
    second.unlink()
    with pytest.raises(
        DataError, match=r"has changed since the split was made, 2 of \d+"
    ) as caught:
        split.check_unchanged()
    assert str(first) in str(caught.value)
    first.unlink()
    with pytest.raises(DataError, match=r"cannot be read \(No such file"):
        split.check_unchanged()


def test_an_image_that_vanishes_while_hashing(tmp_path: Path) -> None:
    on_disk(tmp_path)
    dataset = read_dataset(tmp_path)
    (tmp_path / "a" / "3.png").unlink()
    with pytest.raises(DataError, match=r"a/3\.png.* cannot be read: No such file"):
        digest_images(dataset)


def without_train(values: Any) -> None:
    values["entries"] = [e for e in values["entries"] if (e["class"], e["role"]) != ("b", "train")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format="other"), r"\$\.format: expected .ztune-split., got .other."),
        (lambda v: v.update(version=2), "newer than this ztune"),
        (lambda v: v.update(roots={"data": "relative"}), "absolute"),
        (lambda v: v.update(roots={"test": "/x"}), 'one of them named "data"'),
        (lambda v: v["entries"][3].update(root="test"), r"entries\[3\]: no such root or class"),
        (lambda v: v.update(classes=["b", "a"]), "sorted and different"),
        (lambda v: v.update(classes=["a"]), "at least two"),
        (lambda v: v.update(entries={}), r"\$\.entries: expected array, got object"),
        (lambda v: v.update(sampler="dice"), r"\$\.sampler: expected coop or hash, got .dice."),
        (without_train, "a class has no train images"),
        (lambda v: v["entries"].append(v["entries"][0]), "listed twice"),
        (lambda v: v["entries"][3].update(path="../x"), r"entries\[3\]: path '../x' leaves"),
        (lambda v: v["entries"][3].update(path="/x"), "leaves its root"),
        (
            lambda v: v["entries"][3].update(sha256="x"),
            r"\$\.entries\[3\]\.sha256: expected str matching",
        ),
        (lambda v: v["entries"][3].update({"class": "c"}), r"entries\[3\]: no such root or class"),
        (
            lambda v: v["entries"][3].update(role="spy"),
            r"entries\[3\]\.role: expected .*, got .spy.",
        ),
        (
            lambda v: v["settings"].update(shots=0),
            "`shots` is 0, expected all, or a number of at least 1",
        ),
        (lambda v: v["settings"].update(test_fraction=2), "`test_fraction` is 2"),
        (
            lambda v: v["settings"].update(test_fraction=None),
            r"\$\.settings\.test_fraction: expected .*, got null",
        ),
    ],
)
def test_wrong_split_files(tmp_path: Path, change: Any, message: str) -> None:
    values = json.loads(json.dumps(on_disk(tmp_path).to_json()))
    change(values)
    with pytest.raises(FormatError, match=message) as caught:
        Split.from_json(values, "run/split.json")
    assert str(caught.value).startswith("run/split.json")


def test_images_to_score_on_need_no_settings(tmp_path: Path) -> None:
    split = on_disk(tmp_path)
    tested = replace(split, entries=split.entries_of("test"), settings=None)
    values = json.loads(json.dumps(tested.to_json()))
    assert values["settings"] is None
    assert Split.from_json(values, "tested.json") == tested
    values["entries"][0]["path"] = "../x"
    with pytest.raises(FormatError, match="leaves its root"):
        Split.from_json(values, "tested.json")


def test_a_split_file_of_before_the_samplers_is_read(tmp_path: Path) -> None:
    split = on_disk(tmp_path)
    values = json.loads(json.dumps(split.to_json()))
    del values["sampler"]
    assert Split.from_json(values, "split.json") == split
