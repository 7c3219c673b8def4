"""Tasks of the four protocols: what is drawn, what is tested, and what is said about it."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import DIGITS
from tests.ztune.data_trees import TREES
from tests.ztune.test_data_named import built
from ztune.data.coop import CoopSplit, Item, base_and_new, display_name, few_shot
from ztune.data.folders import ListedImage, Listing, read_dataset
from ztune.data.named import NAMED
from ztune.data.sources import read_source
from ztune.data.split import SplitSettings
from ztune.data.splitter import make_split
from ztune.errors import ConfigError, DataError
from ztune.experiments.protocols import (
    PROTOCOLS,
    TRANSFERS,
    Source,
    classes_of,
    remarks_on,
    split_of,
    task_of,
)

ROOT = Path("/data")


def items(part: str, *names: str, n: int = 6) -> tuple[Item, ...]:
    """Return n images of every name, labels in the order of the names, interleaved."""
    return tuple(
        Item(f"{label}/{part}{i}.png", label, name)
        for i in range(n)
        for label, name in enumerate(names)
    )


def source(*names: str, name: str = "pets", train: int = 6, val: int = 5, test: int = 3) -> Source:
    lists = CoopSplit(
        items("a", *names, n=train), items("v", *names, n=val), items("e", *names, n=test)
    )
    return published(name, lists)


def published(name: str, lists: CoopSplit) -> Source:
    """Return a data set with published lists."""
    classes = tuple(sorted({display_name(item.name) for _, item in lists}))
    images = tuple(
        ListedImage(i.path, classes.index(display_name(i.name)), role) for role, i in lists
    )
    listing = Listing(ROOT / name, classes, images, lists=lists)
    return Source(name, listing, ("a photo of a {}.",))


def lists_of(source: Source) -> CoopSplit:
    assert source.listing.lists is not None
    return source.listing.lists


def known(root: Path, name: str) -> Source:
    """Return a data set known by name, built small."""
    built(root, name)
    return Source(name, read_source(name, root, tuned=False), (NAMED[name].template,))


def digest(path: Path) -> str:
    return f"digest of {path}"


# Few-shot


@pytest.mark.parametrize("shots", [1, 2, 16])
@pytest.mark.parametrize("seed", [1, 2])
def test_few_shots_are_the_published_draw_and_all_test_images_stay(shots: int, seed: int) -> None:
    pets = source("dog", "cat", "eel")
    task = task_of("few-shot", pets, (), shots, seed)
    drawn = few_shot(lists_of(pets), shots, seed)
    assert task.drawn == CoopSplit(drawn.train, drawn.val)
    assert (task.protocol, task.source, task.shots, task.seed) == ("few-shot", pets, shots, seed)
    (part,) = task.parts
    assert (part.name, part.source, part.items) == ("test", pets, lists_of(pets).test)
    assert task.classes == part.classes == ("cat", "dog", "eel")


@pytest.mark.parametrize("name", [n for n, tree in TREES.items() if tree.counts[0]])
def test_every_known_data_set_that_can_be_tuned_on(tmp_path: Path, name: str) -> None:
    data = known(tmp_path, name)
    task = task_of("few-shot", data, (), 2, 1)
    assert task.classes == tuple(sorted(set(TREES[name].classes)))
    split = split_of(task, digest)
    per_class = 2 if name != "fgvcaircraft" else 1  # its tree has one image of each
    assert len(split.entries_of("train")) == per_class * len(TREES[name].classes)
    assert split.roots == {"data": data.root}
    assert all((data.root / entry.path).is_file() for entry in split.entries)


def test_shots_of_ones_own_images_are_those_of_tune() -> None:
    listing = read_dataset(DIGITS)
    split = make_split(listing, SplitSettings(4, seed=3))
    task = task_of("few-shot", Source("digits", listing, ("{}",)), (), 4, 3)
    for role in ("train", "val"):
        drawn = [item.path for item in task.drawn.of(role)]
        assert drawn == [entry.path for entry in split.entries_of(role)]
    (part,) = task.parts
    assert [item.path for item in part.items] == [e.path for e in split.entries_of("test")]
    assert split_of(task, digest).sampler == "hash"
    # A transfer tests on the same images, whatever is tuned on.
    other = Source("digits", listing, ("{}",))
    transfer = task_of("cross-data-set", source("hen", "cow"), (other,), 1, 1)
    assert {i.path for i in transfer.parts[0].items} == {i.path for i in part.items}
    assert transfer.parts[0].classes == listing.classes


def test_ones_own_images_must_suffice_for_a_test_set() -> None:
    listing = read_dataset(DIGITS)
    few = dataclasses.replace(listing, images=listing.images[::20])
    with pytest.raises(DataError, match='data set "digits": no test set: class'):
        task_of("few-shot", Source("digits", few, ("{}",)), (), 4, 1)


# Base to new


@pytest.mark.parametrize(
    ("names", "base", "new"),
    [
        (("dog", "cat", "eel", "ape"), {"dog", "cat"}, {"eel", "ape"}),
        (("dog", "cat", "eel", "ape", "bee"), {"dog", "cat", "eel"}, {"ape", "bee"}),
    ],
)
def test_the_first_labels_are_base_whatever_their_names(
    names: tuple[str, ...], base: set[str], new: set[str]
) -> None:
    pets = source(*names)
    task = task_of("base-to-new", pets, (), 2, 1)
    first, second = task.parts
    assert (first.name, second.name) == ("base", "new")
    assert first.source is second.source is pets
    assert first.classes == task.classes == tuple(sorted(base))
    assert second.classes == tuple(sorted(new))
    for part in task.parts:
        wanted = [item.path for item in lists_of(pets).test if item.name in part.classes]
        assert [item.path for item in part.items] == wanted


def test_shots_are_drawn_of_all_classes_before_these_are_divided() -> None:
    pets = source("dog", "cat", "eel", "ape")
    base, new = base_and_new(few_shot(lists_of(pets), 2, 3))
    task = task_of("base-to-new", pets, (), 2, 3)
    assert task.drawn == CoopSplit(base.train, base.val)
    assert [part.items for part in task.parts] == [base.test, new.test]
    whole = task_of("few-shot", pets, (), 2, 3)
    assert {item.path for _, item in task.drawn} < {item.path for _, item in whole.drawn}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("dog", "cat"), 'data set "pets" has test images of 1 base class'),
        (("dog", "cat", "eel"), 'data set "pets" has test images of 1 new class'),
        (("dog",), r"got 1 class\(es\), expected at least 2"),
    ],
)
def test_halves_of_one_class_are_refused(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task_of("base-to-new", source(*names), (), 1, 1)


# Transfers


@pytest.mark.parametrize("protocol", TRANSFERS)
def test_transfers_tune_on_the_source_and_test_on_all_of_the_targets(protocol: str) -> None:
    pets, farm, zoo = source("dog", "cat"), source("hen", "cow", name="farm"), source(
        "ape", "dog", name="zoo", train=0, val=0
    )  # fmt: skip
    task = task_of(protocol, pets, (zoo, farm), 1, 1)
    assert task.drawn == CoopSplit(
        *(few_shot(lists_of(pets), 1, 1).of(r) for r in ("train", "val"))
    )
    assert [part.name for part in task.parts] == ["zoo", "farm"]
    assert [part.items for part in task.parts] == [lists_of(zoo).test, lists_of(farm).test]
    assert [part.classes for part in task.parts] == [("ape", "dog"), ("cow", "hen")]
    assert [part.source for part in task.parts] == [zoo, farm]


def test_variants_of_imagenet_by_name(tmp_path: Path) -> None:
    imagenet = known(tmp_path, "imagenet")
    targets = [known(tmp_path, name) for name in ("imagenetr", "imageneta")]
    task = task_of("out-of-distribution", imagenet, targets, 2, 1)
    assert [part.classes for part in task.parts] == [("sunglasses", "tench")] * 2
    assert set(task.parts[0].classes) < set(task.classes)
    assert not [remark for remark in remarks_on(task) if "variant" in remark]


def test_a_source_must_have_images_to_tune_with() -> None:
    untrained = source("dog", "cat", train=0)
    for protocol in PROTOCOLS:
        targets = (source("hen", "cow", name="farm"),) if protocol in TRANSFERS else ()
        with pytest.raises(DataError, match='"pets" has only test images, none to tune on'):
            task_of(protocol, untrained, targets, 1, 1)


@pytest.mark.parametrize("names", [(), ("hen",), ("a_hen", "a hen")])
def test_a_target_must_have_two_classes(names: tuple[str, ...]) -> None:
    farm = source(*names, name="farm")
    n = min(len(names), 1)
    with pytest.raises(DataError, match=f'"farm" has test images of {n} farm class'):
        task_of("cross-data-set", source("dog", "cat"), (farm,), 1, 1)


def test_impossible_shots_and_seeds_are_refused() -> None:
    with pytest.raises(ConfigError, match="`shots` is 0"):
        task_of("few-shot", source("dog", "cat"), (), 0, 1)
    with pytest.raises(ConfigError, match="`seed` is -1"):
        task_of("few-shot", source("dog", "cat"), (), 1, -1)


# Names


def test_class_names_are_shown_as_templates_take_them() -> None:
    pets = source("wild_cat", "cafe\u0301", "dog  house")  # a decomposed accent
    assert task_of("few-shot", pets, (), 1, 1).classes == ("café", "dog house", "wild cat")
    assert classes_of(()) == ()


def test_two_labels_of_one_name_become_one_class(tmp_path: Path) -> None:
    imagenet = known(tmp_path, "imagenet")  # its tree has two labels that are called crane
    task = task_of("few-shot", imagenet, (), 2, 1)
    assert task.classes == ("crane", "sunglasses", "tench")
    split = split_of(task, digest)
    assert split.classes == task.classes
    labels = [entry.label for entry in split.entries_of("train")]
    assert labels == [0, 0, 0, 0, 1, 1, 2, 2], "each label gives its shots"
    assert [split.classes[label] for label in labels].count("crane") == 4
    part = task.parts[0]
    assert (len(part.items), part.classes) == (4, task.classes)


def test_one_name_may_stand_in_both_halves() -> None:
    """Halves go by label, as CoCoOp makes them; a name is merged in each half alone."""
    task = task_of("base-to-new", source("dog", "crane", "crane", "eel"), (), 1, 1)
    assert [part.classes for part in task.parts] == [("crane", "dog"), ("crane", "eel")]


# Remarks


def test_nothing_is_said_about_what_is_usual() -> None:
    pets = source("dog", "cat", "eel", "ape")
    for protocol in ("few-shot", "base-to-new"):
        assert remarks_on(task_of(protocol, pets, (), 4, 1)) == []
    other = source("dog", "cat", name="sketches")
    assert remarks_on(task_of("out-of-distribution", pets, (other,), 4, 1)) == []
    # Another data set has other classes; that is the protocol.
    farm = source("hen", "cow", name="farm")
    assert remarks_on(task_of("cross-data-set", pets, (farm,), 4, 1)) == []


def test_classes_with_fewer_images_than_shots_are_told_of() -> None:
    pets = source("dog", "cat", "eel", "ape")
    rare = [item for item in lists_of(pets).train if item.name != "cat" or item.path == "1/a0.png"]
    rare = [item for item in rare if item.name != "eel" or item.path in ("2/a1.png", "2/a2.png")]
    few = published("pets", dataclasses.replace(lists_of(pets), train=tuple(rare)))
    task = task_of("few-shot", few, (), 4, 1)
    assert [item.name for item in task.drawn.train].count("cat") == 1
    (remark,) = remarks_on(task)
    assert remark.startswith("2 class(es) have fewer than 4 training images")
    assert remark.endswith('(fewest: 1, "cat"); all are used')
    assert remarks_on(task_of("few-shot", few, (), 1, 1)) == []
    # Of classes that are not tuned on nothing is said.
    assert len(remarks_on(task_of("base-to-new", few, (), 4, 1))) == 1
    assert remarks_on(task_of("base-to-new", few, (), 4, 1))[0].startswith("1 class(es)")


def test_data_without_validation_images_are_told_of(tmp_path: Path) -> None:
    (remark,) = remarks_on(task_of("few-shot", source("dog", "cat", val=0), (), 2, 1))
    assert remark.startswith("no validation images")
    imagenet = task_of("few-shot", known(tmp_path, "imagenet"), (), 1, 1)
    assert any("no validation images" in remark for remark in remarks_on(imagenet))


def test_classes_of_a_variant_that_the_source_lacks_are_told_of() -> None:
    pets = source("dog", "cat")
    many = source("dog", *(f"thing {n}" for n in range(7)), name="sketches")
    farm = source("cat", "dog", name="farm")
    (remark,) = remarks_on(task_of("out-of-distribution", pets, (farm, many), 1, 1))
    assert remark.startswith("7 of 8 classes of sketches are missing in pets: thing 0, thing 1")
    assert "thing 4" in remark
    assert "thing 5" not in remark, "a few names are enough"


def test_classes_without_test_images_are_told_of() -> None:
    """They stay answers, wrong ones: without them figures would look better than they are."""
    pets = source("dog", "cat", "eel", "ape", "bee")
    tested = tuple(item for item in lists_of(pets).test if item.name != "cat")
    untested = published("pets", dataclasses.replace(lists_of(pets), test=tested))
    for protocol, part in (("few-shot", ""), ("base-to-new", "base ")):
        task = task_of(protocol, untested, (), 1, 1)
        assert "cat" in task.classes
        assert "cat" in task.parts[0].classes
        (remark,) = remarks_on(task)
        assert remark.startswith(f"1 {part}class(es) have no test images, and remain")
        assert remark.endswith(": cat")


# The split of a run


def test_a_runs_split_is_the_draw_by_role_and_class() -> None:
    pets = source("dog", "cat", "ape")
    task = task_of("few-shot", pets, (), 2, 5)
    split = split_of(task, digest)
    assert split.classes == ("ape", "cat", "dog")
    assert split.roots == {"data": pets.root}
    assert split.settings is not None
    assert (split.settings.shots, split.settings.seed) == (2, 5)
    assert split.sampler == "coop"
    assert [(e.role, e.label) for e in split.entries] == [
        (role, label) for role in ("train", "val") for label in (0, 0, 1, 1, 2, 2)
    ]
    for name, label in (("ape", 0), ("cat", 1), ("dog", 2)):
        for role in ("train", "val"):
            shots = [item.path for item in task.drawn.of(role) if item.name == name]
            entries = [e for e in split.entries_of(role) if e.label == label]
            assert [entry.path for entry in entries] == shots, "shots stay in the order drawn"
    for entry in split.entries:
        assert entry.sha256 == digest(pets.root / entry.path)
        assert split.file(entry) == pets.root / entry.path


def test_what_a_protocol_lists_twice_stays_twice() -> None:
    twice = Item("1/same.png", 1, "cat")
    lists = CoopSplit(
        (Item("0/a.png", 0, "dog"), Item("0/b.png", 0, "dog"), twice, twice),
        (Item("0/v.png", 0, "dog"), twice),
        items("e", "dog", "cat"),
    )
    pets = published("pets", lists)
    split = split_of(task_of("few-shot", pets, (), 2, 1), digest)
    same = [(e.role, e.label) for e in split.entries if e.path == "1/same.png"]
    assert same == [("train", 0), ("train", 0), ("val", 0)]
    assert len(split.entries) == 6


# Whatever the lists

_ITEM = st.tuples(st.integers(0, 7), st.integers(0, 30))


@st.composite
def sources(draw: st.DrawFn) -> Source:
    """Return lists of any shape: gaps, repetitions, classes of one list alone, shared names."""
    names = draw(st.lists(st.sampled_from("abcdef"), min_size=8, max_size=8))
    lists = [
        tuple(
            Item(f"{label}/{number}.png", label, names[label])
            for label, number in draw(st.lists(_ITEM, max_size=40))
        )
        for _ in range(3)
    ]
    name = draw(st.sampled_from(("first", "second")))
    return published(name, CoopSplit(*lists))


@settings(max_examples=300, deadline=None)
@given(sources(), sources(), st.sampled_from(PROTOCOLS), st.integers(1, 6), st.integers(0, 3))
def test_no_test_image_is_drawn_unless_the_lists_say_so(
    tuned: Source, other: Source, protocol: str, shots: int, seed: int
) -> None:
    targets = (other,) if protocol in TRANSFERS else ()
    try:
        task = task_of(protocol, tuned, targets, shots, seed)
    except DataError:
        return
    assert not task.drawn.test
    listed = {tuned.root / item.path for item in (*lists_of(tuned).train, *lists_of(tuned).val)}
    drawn = {tuned.root / item.path for _, item in task.drawn}
    assert drawn <= listed
    for part in task.parts:
        named = {part.source.root / item.path for item in lists_of(part.source).test}
        tested = {part.source.root / item.path for item in part.items}
        assert tested <= named
        assert drawn & tested <= listed & named
        assert len(part.classes) >= 2
    remarks_on(task)
    # What is drawn depends on no test image: with others in their place it is the same.
    moved = tuple(Item(f"moved/{i.path}", i.label, i.name) for i in lists_of(tuned).test)
    elsewhere = published(tuned.name, dataclasses.replace(lists_of(tuned), test=moved))
    again = task_of(protocol, elsewhere, targets, shots, seed)
    assert again.drawn == task.drawn
    if other.root != tuned.root or protocol not in TRANSFERS:
        parts = {part.source.root / item.path for part in again.parts for item in part.items}
        assert drawn.isdisjoint(parts)


def test_every_known_name_is_a_source_or_a_target(tmp_path: Path) -> None:
    for_testing = [name for name in NAMED if not TREES[name].counts[0]]
    assert for_testing == ["imagenetv2", "imagenetsketch", "imageneta", "imagenetr"]
    for name in for_testing:
        with pytest.raises(DataError, match="only test images, none to tune on"):
            task_of("few-shot", known(tmp_path, name), (), 1, 1)
