"""Split files of the papers: read, written, sampled and divided as their published code does it."""

import json
import random
from pathlib import Path

import pytest

from ztune.data.coop import (
    CoopSplit,
    Item,
    base_and_new,
    divide_classes,
    few_shot,
    hold_out_val,
    read_split,
    write_split,
)
from ztune.data.folders import read_dataset
from ztune.data.split import SplitSettings
from ztune.data.splitter import make_split, to_coop_split
from ztune.errors import ConfigError, DataError


def items(*counts: int, first: int = 0, part: str = "t") -> tuple[Item, ...]:
    """Return the given numbers of items of label 0, 1, ..., interleaved."""
    return tuple(
        Item(f"{label}/{part}{n}.png", label, f"class_{label}")
        for n in range(first, max(counts, default=0))
        for label, count in enumerate(counts)
        if n < count
    )


def written(path: Path, values: object) -> Path:
    path.write_text(json.dumps(values))
    return path


ENTRY = ["a/1.png", 0, "a"]


def test_a_split_is_read_in_its_order_and_written_as_it_was(tmp_path: Path) -> None:
    lists: dict[str, list[list[str | int]]] = {
        "train": [["z/é 2.png", 1, "the_z"], ["a/1.png", 0, "a"]],
        "val": [["a/2.png", "0", "a"]],  # a label may be digits as text
        "test": [["z/3.png", 1, "the_z"]],
    }
    split = read_split(written(tmp_path / "split.json", lists))
    assert split.train == (Item("z/é 2.png", 1, "the_z"), Item("a/1.png", 0, "a"))
    assert split.classes == {0: "a", 1: "the_z"}
    assert split.counts == {"train": 2, "val": 1, "test": 1}
    assert [role for role, _ in split] == ["train", "train", "val", "test"]
    write_split(tmp_path / "again.json", split)
    lists["val"][0][1] = 0
    assert json.loads((tmp_path / "again.json").read_text()) == lists
    assert read_split(tmp_path / "again.json") == split


def test_a_list_may_be_absent_where_it_is_not_needed(tmp_path: Path) -> None:
    path = written(tmp_path / "split.json", {"train": [ENTRY], "val": []})
    assert read_split(path, ("train", "val")).counts == {"train": 1, "val": 0, "test": 0}
    with pytest.raises(DataError, match='"test" is nothing, expected a list'):
        read_split(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "invalid JSON"),
        ("[" * 100000, "invalid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        ("[1]", "expected {"),
        ("{}", '"train" is nothing'),
        ('{"train": 1}', '"train" is int, expected a list'),
        ('{"train": [], "val": [], "test": []}', "contains no images"),
        ('{"train": [["a", 0]], "val": [], "test": []}', "train entry 0: expected .path"),
        ('{"train": [3], "val": [], "test": []}', "train entry 0: expected .path"),
        ('{"train": [["a.png", true, "a"]], "val": [], "test": []}', "label from 0"),
        ('{"train": [["a.png", -1, "a"]], "val": [], "test": []}', "label from 0"),
        ('{"train": [["a.png", 1.5, "a"]], "val": [], "test": []}', "label from 0"),
        ('{"train": [["a.png", 0, " "]], "val": [], "test": []}', "class name"),
        ('{"train": [], "val": [], "test": [["../a.png", 0, "a"]]}', "test entry 0: .*is outside"),
        ('{"train": [["/etc/passwd", 0, "a"]], "val": [], "test": []}', "is outside"),
        ('{"train": [["a/../../b.png", 0, "a"]], "val": [], "test": []}', "is outside"),
        ('{"train": [["a\\u0000.png", 0, "a"]], "val": [], "test": []}', "is outside"),
        ('{"train": [["a\\ud800.png", 0, "a"]], "val": [], "test": []}', "unpaired surrogate"),
        (
            '{"train": [["a.png", 0, "a"]], "val": [["b.png", 0, "b"]], "test": []}',
            'val entry 0: label 0 has two names, "a" and "b"',
        ),
    ],
)
def test_wrong_split_files(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "split.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message) as caught:
        read_split(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_split(tmp_path / "no.json")


def theirs(split: CoopSplit, shots: int, seed: int) -> tuple[list[Item], list[Item]]:
    """Draw as the published code does: the global generator, seeded once before all lists."""
    state = random.getstate()
    random.seed(seed)
    drawn = []
    for source, n in ((split.train, shots), (split.val, min(shots, 4))):
        tracker: dict[int, list[Item]] = {}
        for item in source:
            tracker[item.label] = [*tracker.get(item.label, []), item]
        drawn.append([item for group in tracker.values() for item in random.sample(group, n)])
    random.setstate(state)
    return drawn[0], drawn[1]


@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_few_shot_sets_are_those_that_the_published_code_draws(shots: int, seed: int) -> None:
    shuffled = list(items(40, 17, 16, 25))
    random.Random(7).shuffle(shuffled)  # classes appear in another order than their labels
    split = CoopSplit(tuple(shuffled), items(9, 4, 5, part="v"), items(3, 3, part="e"))
    state = random.getstate()
    drawn = few_shot(split, shots, seed)
    assert random.getstate() == state, "the global generator was used"
    train, val = theirs(split, shots, seed)
    assert drawn == CoopSplit(tuple(train), tuple(val), split.test)
    assert drawn.counts == {"train": 4 * shots, "val": 3 * min(shots, 4), "test": 6}
    assert few_shot(split, shots, seed + 1).train != drawn.train


def test_the_choice_of_a_seed_does_not_change() -> None:
    """What seed 1 draws from five: if this fails, published figures can no longer be repeated."""
    drawn = few_shot(CoopSplit(items(5, 5), items(5, 5, part="v")), 2, 1)
    assert [i.path for i in drawn.train] == ["0/t1.png", "0/t0.png", "1/t2.png", "1/t0.png"]
    assert [i.path for i in drawn.val] == ["0/v3.png", "0/v4.png", "1/v3.png", "1/v4.png"]


def test_a_class_with_too_few_gives_all_and_draws_nothing() -> None:
    split = CoopSplit(items(2, 20), items(1, 6, part="v"))
    drawn = few_shot(split, 8, 1)
    assert [item for item in drawn.train if item.label == 0] == list(items(2))
    generator = random.Random(1)
    expected = generator.sample([item for item in split.train if item.label == 1], 8)
    assert [item for item in drawn.train if item.label == 1] == expected
    assert drawn.counts == {"train": 10, "val": 5, "test": 0}


def test_impossible_shots_and_seeds() -> None:
    with pytest.raises(ConfigError, match="`shots` is 0, expected at least 1"):
        few_shot(CoopSplit(items(3, 3)), 0, 1)
    with pytest.raises(ConfigError, match="`seed` is -1"):
        few_shot(CoopSplit(items(3, 3)), 1, -1)


@pytest.mark.parametrize(("n", "n_base"), [(2, 1), (3, 2), (10, 5), (47, 24)])
def test_the_first_half_of_the_labels_is_base(n: int, n_base: int) -> None:
    order = list(items(*[2] * n))
    random.Random(1).shuffle(order)
    split = CoopSplit(tuple(order), items(*[1] * n, part="v"), items(*[1] * n, part="e"))
    base, new = base_and_new(split)
    names = [f"class_{label}" for label in range(n)]
    assert base.classes == dict(enumerate(names[:n_base]))
    assert new.classes == dict(enumerate(names[n_base:]))
    for role in ("train", "val", "test"):
        assert len(base.of(role)) + len(new.of(role)) == len(split.of(role))
    kept = [item.path for item in order if item.label < n_base]
    assert [item.path for item in base.train] == kept


def test_halves_of_odd_sets() -> None:
    base, new = base_and_new(CoopSplit(test=items(1, 1, 1)))  # for testing only
    assert (base.counts["test"], new.counts["test"]) == (2, 1)
    # A class that cannot be tuned on is in neither half.
    base, new = base_and_new(CoopSplit(items(1, 1), test=items(1, 1, 1)))
    assert (base.counts["test"], new.counts["test"]) == (1, 1)
    with pytest.raises(DataError, match=r"got 1 class\(es\), expected at least 2"):
        base_and_new(CoopSplit(items(3)))


def test_half_of_every_class_trains_a_fifth_validates() -> None:
    classes = {name: [f"{name}/{n}" for n in range(size)] for name, size in (("b", 31), ("a", 8))}
    split = divide_classes(classes, random.Random(3), "here")
    assert split.classes == {0: "b", 1: "a"}
    sizes = [[sum(i.label == label for i in split.of(r)) for label in (0, 1)] for r in
             ("train", "val", "test")]  # fmt: skip
    assert sizes == [[16, 4], [6, 2], [9, 2]]  # 15.5 rounds to the even 16
    assert sorted(item.path for _, item in split) == sorted(p for c in classes.values() for p in c)
    shuffled = classes["b"].copy()
    generator = random.Random(3)
    generator.shuffle(shuffled)
    assert [i.path for i in split.train if i.label == 0] == shuffled[:16]
    with pytest.raises(DataError, match='here: class "c" has 2 images, too few'):
        divide_classes({"c": ["1", "2"]}, random.Random(1), "here")


def test_a_fifth_is_held_out_of_every_class() -> None:
    source = items(10, 13)
    train, val = hold_out_val(source, 0.2, random.Random(5), "here")
    assert [sum(i.label == label for i in val) for label in (0, 1)] == [2, 3]
    assert sorted((*train, *val), key=lambda i: i.path) == sorted(source, key=lambda i: i.path)
    group = [item for item in source if item.label == 0]
    random.Random(5).shuffle(group)
    assert list(val[:2]) == group[:2]
    assert list(train[:8]) == group[2:]
    with pytest.raises(DataError, match='class "class_0" has 2 images, too few for train and'):
        hold_out_val(items(2), 0.2, random.Random(1), "here")


def test_images_of_any_data_set_can_be_drawn_so(tmp_path: Path) -> None:
    for role, n in (("train", 6), ("val", 3), ("test", 2)):
        for name in ("a", "b"):
            (tmp_path / role / name).mkdir(parents=True)
            for place in range(n):
                (tmp_path / role / name / f"{place}.png").write_text(f"{role}{name}{place}")
    dataset = read_dataset(tmp_path)
    split = to_coop_split(dataset)
    assert split.counts == {"train": 12, "val": 6, "test": 4}
    assert {(role, item.path) for role, item in split} == {
        (image.split, image.path) for image in dataset.images
    }
    # And back: the few that were drawn, and no other, are the shots of a run.
    drawn = few_shot(split, 2, 1)
    images = tuple(p for p in dataset.images if p.path in {i.path for _, i in drawn})
    few = type(dataset)(dataset.root, dataset.classes, images)
    made = make_split(few, SplitSettings(shots=2))
    assert {e.path for e in made.entries_of("train")} == {i.path for i in drawn.train}
    assert {e.path for e in made.entries_of("val")} == {i.path for i in drawn.val}
