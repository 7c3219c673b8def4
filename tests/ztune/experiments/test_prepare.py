"""From a plan to jobs: what a key depends on and what not, shared runs, copies, what is encoded."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtimes.bundle import load_bundle
from tests.conftest import DIGITS, MINI
from tests.ztune.data_trees import lines
from tests.ztune.test_data_named import built, png
from ztune.cli.output import Output
from ztune.data.split import Split
from ztune.errors import ConfigError, DataError, FormatError, ZtuneError
from ztune.experiments.cells import Cell
from ztune.experiments.jobs import JobResult
from ztune.experiments.plan import read_plan
from ztune.experiments.prepare import CellFilter, Preparation, Prepared, encodings
from ztune.experiments.worker import Settings, Worker
from ztune.io.files import sha256
from ztune.methods.blackvip import BlackVipConfig
from ztune.methods.registry import METHODS, settings_of_result
from ztune.progress import SILENCE, Progress, forward_warnings

HEAD = """
title = "{title}"
seeds = [{seed}]
queries = {queries}
preset = "{preset}"
curve = {curve}
[execution]
threads = {threads}
force = {force}
[models]
mini = "{bundle}"
[data]
digits = {{ path = "{data}", template = "{template}" }}
[methods]
zip = {{ settings = {{ {settings} }} {more} }}
"""
FEW_SHOT = """
[[protocols]]
kind = "few-shot"
data = ["digits"]
shots = [{shots}]
methods = ["zip"]
"""
USUAL: dict[str, object] = {
    "title": "Digits", "seed": 1, "queries": 40, "preset": "default", "curve": 0, "threads": 1,
    "force": "false", "bundle": MINI, "template": "a photo of a {}.", "settings": "rank = 2",
    "more": "", "shots": 2,
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return three classes of sixteen digits, of which about half are kept for testing."""
    root = tmp_path / "digits"
    for name in ("one", "two", "three"):
        (root / name).mkdir(parents=True)
        for image in sorted((DIGITS / name).iterdir())[:16]:
            shutil.copy(image, root / name)
    return root


Prepare = Callable[..., Prepared]
EVERYTHING = CellFilter()


@pytest.fixture
def warnings() -> list[str]:
    """Return what plans that were prepared have warned of."""
    return []


@pytest.fixture
def prepare(tmp_path: Path, warnings: list[str]) -> Prepare:
    """Prepare the text of a plan; folders are of the test alone."""
    n = 0

    def call(
        text: str,
        *,
        provider: str = "cpu",
        root: Path | None = None,
        progress: Progress = SILENCE,
        out: Path | None = None,
        only: CellFilter = EVERYTHING,
    ) -> Prepared:
        nonlocal n
        n += 1
        path = tmp_path / f"plan-{n}.toml"
        path.write_text(text)
        out = out or tmp_path / f"out-{n}"
        preparation = Preparation(read_plan(path), only, root, out, provider, progress)
        with forward_warnings(warnings.append):
            prepared = preparation.prepare()
        assert not out.exists(), "preparation writes nothing"
        return prepared

    return call


def few_shot(data: object, **changes: object) -> str:
    """Return a plan of one cell."""
    return (HEAD + FEW_SHOT).format(**{**USUAL, "data": data, **changes})


def key_of_one(prepared: Prepared) -> str:
    (key,) = prepared.cells.values()
    assert key is not None
    (job,) = prepared.jobs
    assert [cell.key for cell in job.cells] == [key]
    return key


def keys_by_name(prepared: Prepared) -> dict[str, str]:
    return {str(cell): key for cell, key in prepared.cells.items() if key is not None}


def scored_on(prepared: Prepared) -> list[Split]:
    """Return the images that every part of a plan of one run is scored on."""
    return [prepared.tested[p.split_file] for cell in prepared.jobs[0].cells for p in cell.parts]


def file_of(prepared: Prepared, role: str) -> Path:
    """Return the first image that a plan of one cell uses so."""
    (job,) = prepared.jobs
    if role == "test":
        return scored_on(prepared)[0].items("test")[0][0]
    return job.split.file(next(e for e in job.split.entries if e.role == role))


def divided(data: Path, path: Path) -> Path:
    """Write a manifest that says what each image is for, so that others change no role."""
    rows = ["path,label,split"]
    for name in ("one", "two", "three"):
        for n, image in enumerate(sorted((data / name).iterdir())):
            split = "train" if n < 8 else "val" if n < 11 else "test"
            rows.append(f"{image.relative_to(path.parent).as_posix()},{name},{split}")
    path.write_text("\n".join(rows) + "\n")
    return path


# What a key depends on


@pytest.mark.parametrize(
    "changes",
    [
        {"queries": 41},
        {"seed": 2},
        {"shots": 3},
        {"settings": "rank = 3"},
        {"settings": "rank = 2, clip = false"},
        {"preset": "published"},
        {"more": ", augment = 2"},
        {"template": "the digit {}"},
        {"curve": 3},
        {"curve": [3]},
        {"threads": 2},
        {"threads": "1\nmemory_limit = 500"},
        {"force": "true"},
        {"settings": "", "more": ', uses = "spsa"'},
    ],
    ids=str,
)
def test_a_key_changes_with_what_changes_the_figures(
    data: Path, prepare: Prepare, changes: dict[str, object]
) -> None:
    before = key_of_one(prepare(few_shot(data)))
    prepared = prepare(few_shot(data, **changes))
    assert key_of_one(prepared) != before
    assert prepared.jobs[0].run != prepare(few_shot(data)).jobs[0].run


def test_no_two_changes_give_one_key(data: Path, prepare: Prepare) -> None:
    """Values of different settings are not mixed up."""
    ways: list[dict[str, object]] = [
        {}, {"seed": 3}, {"shots": 3}, {"threads": 3}, {"curve": 3}, {"settings": "rank = 3"},
        {"curve": [3]},
        {"more": ", augment = 3"}, {"preset": "published"}, {"queries": 43},
    ]  # fmt: skip
    assert len({key_of_one(prepare(few_shot(data, **way))) for way in ways}) == len(ways)


def test_a_run_changes_with_a_seed_that_draws_the_same(prepare: Prepare, tmp_path: Path) -> None:
    """Where all images are tuned on, a seed is still that of the method."""
    built(tmp_path, "dtd")
    (first,), (second,) = (
        prepare(known(seeds=seed, shots=9), root=tmp_path).jobs for seed in (1, 2)
    )
    assert first.split.entries == second.split.entries
    assert first.run != second.run


def test_a_run_changes_with_the_method_of_equal_settings(data: Path, prepare: Prepare) -> None:
    as_spsa = "step_decay = 0.602, perturbation_decay = 0.101, momentum = 0.0"
    (first,), (second,) = (
        prepare(few_shot(data, settings=as_spsa, more=f', uses = "{name}"')).jobs
        for name in ("spsa", "spsa-gc")
    )
    assert first.run_config.settings == second.run_config.settings
    assert first.run != second.run


def test_a_key_changes_with_the_provider(data: Path, prepare: Prepare) -> None:
    keys = {key_of_one(prepare(few_shot(data), provider=name)) for name in ("cpu", "cuda")}
    assert len(keys) == 2


def test_a_key_changes_with_the_bundle_and_not_with_its_place(
    data: Path, prepare: Prepare, tmp_path: Path
) -> None:
    before = key_of_one(prepare(few_shot(data)))
    copy = Path(shutil.copytree(MINI, tmp_path / "copy"))
    assert key_of_one(prepare(few_shot(data, bundle=copy))) == before
    described = json.loads((copy / "bundle.json").read_text())
    described["source"]["model"] = "another"
    (copy / "bundle.json").write_text(json.dumps(described))
    assert key_of_one(prepare(few_shot(data, bundle=copy))) != before


@pytest.mark.parametrize("role", ["train", "val", "test"])
def test_a_key_changes_with_every_images_bytes(data: Path, prepare: Prepare, role: str) -> None:
    prepared = prepare(few_shot(data))
    with file_of(prepared, role).open("ab") as file:
        file.write(b" ")
    changed = prepare(few_shot(data))
    assert key_of_one(changed) != key_of_one(prepared)
    # The run is the same where only what it is scored on is another.
    assert (changed.jobs[0].run == prepared.jobs[0].run) == (role == "test")


def test_a_key_changes_with_a_test_image_and_the_run_does_not(
    data: Path, prepare: Prepare, tmp_path: Path
) -> None:
    manifest = divided(data, tmp_path / "list.csv")
    before = prepare(few_shot(manifest))
    with manifest.open("a") as file:
        file.write("more.png,one,test\n")
    shutil.copy(sorted((DIGITS / "one").iterdir())[20], tmp_path / "more.png")
    after = prepare(few_shot(manifest))
    assert key_of_one(after) != key_of_one(before)
    assert after.jobs[0].run == before.jobs[0].run
    assert len(scored_on(after)[0].entries) == 16


def test_a_key_changes_with_a_class_name(data: Path, prepare: Prepare) -> None:
    before = prepare(few_shot(data))
    (data / "one").rename(data / "aone")  # the order of classes and the draw stay
    after = prepare(few_shot(data))
    assert [e.sha256 for e in after.jobs[0].split.entries] == [
        e.sha256 for e in before.jobs[0].split.entries
    ]
    assert key_of_one(after) != key_of_one(before)
    assert after.jobs[0].run != before.jobs[0].run


def test_a_target_and_its_template_are_part_of_a_transfers_key(
    data: Path, prepare: Prepare, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(data, tmp_path / "other"))
    for image in other.glob("*/*"):
        with image.open("ab") as file:
            file.write(b" ")
    ways = [prepare(transfers(data, *way)) for way in ((data, "{}"), (data, "a {}"), (other, "{}"))]
    assert len({key for way in ways for key in way.cells.values()}) == 3 * 2
    assert len({job.run for way in ways for job in way.jobs}) == 1, "what is tuned is the same"


# What a key does not depend on


@pytest.mark.parametrize(
    "changes", [{"title": "Another"}, {"more": ", curve = 0"}, {"more": ', uses = "zip"'}], ids=str
)
def test_a_key_does_not_change_with_what_is_said(
    data: Path, prepare: Prepare, changes: dict[str, object]
) -> None:
    assert prepare(few_shot(data, **changes)).cells == prepare(few_shot(data)).cells


def test_settings_count_as_they_are_in_effect(data: Path, prepare: Prepare) -> None:
    """A setting that is written out and equal to the default is the default."""
    assert prepare(few_shot(data, settings="rank = 5")).cells == prepare(
        few_shot(data, settings="")
    ).cells  # fmt: skip
    assert prepare(few_shot(data, settings="rank = 5, clip = true")).cells == prepare(
        few_shot(data, settings="clip = true, rank = 5")
    ).cells  # fmt: skip


def test_a_key_changes_with_an_extractors_content_and_not_its_place(
    data: Path, prepare: Prepare, tmp_path: Path
) -> None:
    def prepared(settings: str) -> Prepared:
        text = few_shot(data, settings=settings)
        return prepare(text.replace("zip", "blackvip"))

    plain = prepared("")
    assert "extractor" not in settings_of_result(METHODS["blackvip"], BlackVipConfig())
    for name, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / f"{name}.onnx").write_text(content)
    first, second, third = (prepared(f'extractor = "{name}.onnx"') for name in "abc")
    assert key_of_one(first) == key_of_one(second)
    assert len({key_of_one(one) for one in (plain, first, third)}) == 3
    assert first.jobs[0].run_config.extractor == tmp_path / "a.onnx"
    with pytest.raises(ConfigError, match=r'extractor ".*/none.onnx" cannot be read: No such file'):
        prepared('extractor = "none.onnx"')


def test_a_key_does_not_change_with_folders(data: Path, prepare: Prepare, tmp_path: Path) -> None:
    before = prepare(few_shot(data))
    moved = Path(shutil.copytree(data, tmp_path / "elsewhere" / "called-otherwise"))
    shutil.rmtree(data)
    after = prepare(few_shot(moved))  # another place, another plan file, another OUT
    assert after.cells == before.cells
    assert [job.run for job in after.jobs] == [job.run for job in before.jobs]
    assert after.jobs[0].split.roots == {"data": moved.resolve()}
    assert file_of(after, "train").is_file()
    assert file_of(after, "test").is_file()


def test_lists_of_an_earlier_place_are_replaced(
    data: Path, prepare: Prepare, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare(few_shot(data), out=out)
    moved = data.rename(tmp_path / "moved")
    again = prepare(few_shot(moved), out=out)
    assert file_of(again, "test").is_file()
    assert file_of(again, "test").is_relative_to(moved.resolve())


MANY = """
title = "Many"
queries = 40
{order}
[models]
mini = "{bundle}"
[data]
digits = {{ path = "{data}", template = "a photo of a {{}}." }}
[methods]
{methods}
{protocols}
"""


def test_a_key_does_not_change_with_other_cells_and_their_order(
    data: Path, prepare: Prepare
) -> None:
    def plan(seeds: str, shots: str, methods: list[str], kinds: list[str]) -> str:
        protocols = "".join(
            f'[[protocols]]\nkind = "{kind}"\nshots = [{shots}]\n' for kind in kinds
        )
        return MANY.format(
            order=f"seeds = [{seeds}]", bundle=MINI, data=data, methods="\n".join(methods),
            protocols=protocols,
        )  # fmt: skip

    kinds = ["few-shot"]
    one = keys_by_name(prepare(plan("1", "2", ["gda = {}"], kinds)))
    many = prepare(plan("1, 2", "1, 2", ["zip = {}", "gda = {}"], kinds))
    turned = prepare(plan("2, 1", "2, 1", ["gda = {}", "zip = {}"], kinds))
    assert len(many.cells) == 8
    assert keys_by_name(many) == keys_by_name(turned)
    assert list(many.cells) != list(turned.cells)
    assert one.items() < keys_by_name(many).items()
    assert {job.run for job in many.jobs} == {job.run for job in turned.jobs}
    # In the plan's order: seed by seed, and in it shots by shots.
    assert [(c.seed, c.shots, c.method) for c in many.cells] == [
        (seed, shots, method) for seed in (1, 2) for shots in (1, 2) for method in ("zip", "gda")
    ]


def test_cells_that_are_named_twice_are_one(data: Path, prepare: Prepare) -> None:
    text = few_shot(data) + FEW_SHOT.format(**USUAL)
    assert prepare(text).cells == prepare(few_shot(data)).cells
    assert len(prepare(text).jobs[0].cells) == 1


# Runs that cells share


def transfers(data: Path, target: Path, template: str = "the digit {}") -> str:
    entry = f'again = {{ path = "{target}", template = "{template}" }}\n'
    head = HEAD.format(**{**USUAL, "data": data, "curve": 4})
    text = head.replace("[methods]", entry + "[methods]")
    for kind in ("cross-data-set", "out-of-distribution"):
        text += f'[[protocols]]\nkind = "{kind}"\nsource = "digits"\ntargets = ["again"]\n'
        text += "shots = [2]\n"
    return text


def test_transfers_of_one_source_share_a_run(data: Path, prepare: Prepare) -> None:
    prepared = prepare(transfers(data, data))
    (job,) = prepared.jobs
    assert [cell.cell.protocol for cell in job.cells] == ["cross-data-set", "out-of-distribution"]
    assert len(prepared.cells) == 2
    assert [cell.key for cell in job.cells] == list(prepared.cells.values())
    assert not any(cell.curve for cell in job.cells)
    for cell in job.cells:
        (part,) = cell.parts
        assert (part.name, part.templates) == ("again", ("the digit {}",))
    assert job.run_config.templates == ("a photo of a {}.",)


def test_labels_of_one_configuration_share_a_run(data: Path, prepare: Prepare) -> None:
    text = few_shot(data).replace("[[", 'again = { uses = "zip", settings = { rank = 2 } }\n[[', 1)
    text = text.replace('methods = ["zip"]', 'methods = ["zip", "again"]')
    prepared = prepare(text)
    (job,) = prepared.jobs
    assert [cell.cell.method for cell in job.cells] == ["zip"]
    assert set(prepared.cells.values()) == {job.cells[0].key}
    assert [cell.method for cell in prepared.cells] == ["zip", "again"]


def test_every_job_is_what_its_cells_are_called(data: Path, prepare: Prepare) -> None:
    text = MANY.format(
        order="seeds = [1, 2]", bundle=MINI, data=data, methods="zip = {}\ngda = {}",
        protocols='[[protocols]]\nkind = "few-shot"\nshots = [1, 2]\n',
    )  # fmt: skip
    prepared = prepare(text)
    assert len(prepared.jobs) == 8
    found: dict[Cell, str] = {}
    for job in prepared.jobs:
        for one in job.cells:
            found[one.cell] = one.key
            request = job.run_config
            assert (one.cell.method, one.cell.shots, one.cell.seed) == (
                request.method, request.shots, request.seed,
            )  # fmt: skip
            assert len(job.split.entries_of("train")) == 3 * one.cell.shots
            assert request.augment == 0
            assert job.bundle_digest
    assert found == prepared.cells


def test_what_a_plan_wants_of_execution_reaches_the_requests(data: Path, prepare: Prepare) -> None:
    text = few_shot(data, threads=3, force="true", curve=5, preset="published")
    (job,) = prepare(text.replace("threads", "memory_limit = 500\nthreads")).jobs
    request = job.run_config
    assert (request.threads, request.memory_limit, request.force) == (3, 500, True)
    assert (request.snapshots, request.augment, request.provider) == (5, 16, "cpu")
    assert job.cells[0].curve


def test_a_curve_may_list_its_query_counts(data: Path, prepare: Prepare) -> None:
    (job,) = prepare(few_shot(data, curve=[40, 5, 20, 5])).jobs
    assert job.run_config.snapshot_marks(1000) == [5, 20, 40]
    key = key_of_one(prepare(few_shot(data, curve=[5, 20, 40])))
    assert key == job.cells[0].key, "their order does not matter"


def test_only_methods_with_a_limit_are_forced(data: Path, prepare: Prepare) -> None:
    """Others refuse to be: a plan that forces zip must not make ogn and gda fail."""
    text = few_shot(data, force="true").replace("[[", "ogn = {}\ngda = {}\n[[", 1)
    prepared = prepare(text.replace('["zip"]', '["zip", "ogn", "gda"]'))
    assert [(job.run_config.method, job.run_config.force) for job in prepared.jobs] == [
        ("zip", True), ("ogn", False), ("gda", False),
    ]  # fmt: skip


# Requested cells


@pytest.mark.parametrize(
    ("only", "takes"),
    [
        (CellFilter(), True),
        (CellFilter(methods=("zip", "gda"), data=("digits",), shots=(4, 2), seeds=(1,)), True),
        (CellFilter(methods=("gda",)), False),
        (CellFilter(data=("other",)), False),
        (CellFilter(shots=(4,)), False),
        (CellFilter(methods=("zip",), seeds=(2,)), False),
        (CellFilter(seeds=()), False),
    ],
)
def test_only_some_cells(only: CellFilter, takes: bool) -> None:
    assert only.matches(Cell("few-shot", "mini", "digits", "zip", 2, 1)) == takes


# What is said


def test_copies_in_published_lists_are_counted_and_kept(
    prepare: Prepare, tmp_path: Path, warnings: list[str]
) -> None:
    built(tmp_path, "dtd")
    plain = prepare(known(), root=tmp_path)
    assert not warnings
    train, val = (file_of(plain, role) for role in ("train", "val"))
    (before,) = scored_on(plain)
    for copy, source in zip(before.items("test"), (train, val), strict=False):
        copy[0].write_bytes(source.read_bytes())
    prepared = prepare(known(), root=tmp_path)
    (warning,) = warnings
    assert warning.startswith("dtd: test: 2 test images are byte-identical to a tuning image")
    (job,) = prepared.jobs
    (split,) = scored_on(prepared)
    assert len(split.entries) == len(before.entries), "they stay"
    assert len(job.split.entries) == len(plain.jobs[0].split.entries)
    tuned_on = {entry.sha256 for entry in job.split.entries}
    assert sum(entry.sha256 in tuned_on for entry in split.entries) == 2


def test_copies_are_counted_seed_by_seed(
    prepare: Prepare, tmp_path: Path, warnings: list[str]
) -> None:
    """One copy of an image that only some seeds draw."""
    built(tmp_path, "dtd")
    plan = known(seeds="1, 2, 3, 4, 5")
    prepared = prepare(plan, root=tmp_path)
    drawn: list[set[Path]] = [
        {job.split.file(entry) for entry in job.split.entries_of("train")} for job in prepared.jobs
    ]
    sometimes = sorted(drawn[0].union(*drawn) - drawn[0].intersection(*drawn))[0]
    file_of_test = scored_on(prepared)[0].items("test")[-1][0]
    file_of_test.write_bytes(sometimes.read_bytes())
    prepare(plan, root=tmp_path)
    (warning,) = warnings
    assert "dtd: test: 0 to 1 test images" in warning


def test_copies_in_ones_own_images_are_refused(data: Path, prepare: Prepare) -> None:
    first, second = (file_of(prepare(few_shot(data)), role) for role in ("train", "test"))
    second.write_bytes(first.read_bytes())
    if first.parent == second.parent:  # one class, and the copy is left out
        assert prepare(few_shot(data)).cells
    other = next((data / "two").iterdir())
    other.write_bytes(first.read_bytes())
    with pytest.raises(DataError, match="the same image has two classes"):
        prepare(few_shot(data))


def test_what_is_unusual_is_said_once(
    prepare: Prepare, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    built(tmp_path, "dtd")
    prepare(known(seeds="1, 2", shots="2, 9"), root=tmp_path, progress=Output())
    said = capfd.readouterr().err.splitlines()
    short = [line for line in said if "have fewer than 9 training images" in line]
    assert len(short) == 1
    assert short[0].startswith("dtd: 9 shots: 2 class(es)")
    assert len([line for line in said if "drawn by ztune" in line]) == 1
    assert not [line for line in said if "2 shots" in line]


# Data sets by name


NAMED = """
seeds = [{seeds}]
queries = 40
[models]
mini = "{bundle}"
[data]
{data}
[methods]
gda = {{}}
[[protocols]]
kind = "few-shot"
shots = [{shots}]
"""


def known(data: str = "dtd = {}", seeds: object = 1, shots: object = 1) -> str:
    """Return a plan on a data set by name."""
    return NAMED.format(bundle=MINI, data=data, seeds=seeds, shots=shots)


def test_a_data_set_by_name_is_found_below_the_root(prepare: Prepare, tmp_path: Path) -> None:
    built(tmp_path / "all", "dtd")
    text = known()
    prepared = prepare(text, root=tmp_path / "all")
    (job,) = prepared.jobs
    assert job.split.classes == ("banded", "zigzagged")
    assert job.run_config.templates == ("{} texture.",), "the published one"
    own = prepare(text.replace("dtd = {}", 'dtd = { template = "a {}" }'), root=tmp_path / "all")
    assert own.jobs[0].run_config.templates == ("a {}",)
    assert key_of_one(own) != key_of_one(prepared)


def test_a_data_set_by_name_needs_a_root(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = known()
    with pytest.raises(ConfigError, match=r'data "dtd" of the plan needs `root=DIR`'):
        prepare(text)
    with pytest.raises(DataError, match=r'root ".*nowhere" does not exist'):
        prepare(text, root=tmp_path / "nowhere")
    # A folder of that name next to the plan is not used.
    built(tmp_path, "dtd")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="needs `root=DIR`"):
        prepare(text)


def test_a_path_wins_over_a_known_name(data: Path, prepare: Prepare, tmp_path: Path) -> None:
    built(tmp_path / "all", "dtd")
    text = known(f'dtd = {{ path = "{data}" }}')
    for root in (None, tmp_path / "all"):
        (job,) = prepare(text, root=root).jobs
        assert job.split.classes == ("one", "three", "two")
        assert job.run_config.templates == ("a photo of a {}.",)


def test_class_names_of_a_file(data: Path, prepare: Prepare, tmp_path: Path) -> None:
    lines(tmp_path, "names.txt", "one\tthe first", "two\tthe second", "three\tthe third")
    entry = f'digits = {{ path = "{data}", names = "names.txt" }}'
    (job,) = prepare(known(entry)).jobs
    assert job.split.classes == ("the first", "the second", "the third")


# What cannot be prepared


def test_an_image_that_cannot_be_read(data: Path, prepare: Prepare, tmp_path: Path) -> None:
    manifest = divided(data, tmp_path / "list.csv")
    lost = file_of(prepare(few_shot(manifest)), "test")
    lost.unlink()
    with pytest.raises(DataError, match=r"list.csv.*missing image"):
        prepare(few_shot(manifest))
    # A folder of a known name lists its images; this one vanishes after the lists were read.
    built(tmp_path, "dtd")
    text = known()
    preparation = prepare(text, root=tmp_path)
    image = file_of(preparation, "test")
    image.unlink()
    image.mkdir()
    with pytest.raises(DataError, match=rf"{image.parent.name}/{image.name}"):
        prepare(text, root=tmp_path)


def test_an_image_that_vanishes_is_named(
    data: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = file_of(prepare(few_shot(data)), "val")

    def vanished(path: Path) -> str:
        if path == lost:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return sha256(path)

    monkeypatch.setattr("ztune.data.splitter.sha256", vanished)
    with pytest.raises(DataError, match=rf'image ".*{lost.name}" cannot be read: No such file'):
        prepare(few_shot(data))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bundle": "nowhere"}, FormatError, "nowhere"),
        ({"data": "nowhere"}, DataError, r'data ".*nowhere" does not exist'),
        ({"shots": 2, "queries": 1}, ConfigError, r'method "zip" of the plan: .* is less than'),
    ],
)
def test_what_cannot_be_used_is_named(
    data: Path, prepare: Prepare, changes: dict[str, object], error: type[ZtuneError], message: str
) -> None:
    with pytest.raises(error, match=message):
        prepare(few_shot(**{"data": data, **changes}))


def test_a_part_of_one_class_stops_the_plan(data: Path, prepare: Prepare) -> None:
    text = few_shot(data).replace("few-shot", "base-to-new")
    with pytest.raises(DataError, match=r"test images of 1 new class"):
        prepare(text)


# What is encoded


def images_of(prepared: Prepared) -> tuple[set[str], set[str]]:
    """Return the digests that the jobs tune with as they are, and test on."""
    tuned, tested = set(), set()
    for job in prepared.jobs:
        tuned |= {
            e.sha256 for e in job.split.entries if e.role == "val" or not job.run_config.augment
        }
        for cell in job.cells:
            for part in cell.parts:
                tested |= {e.sha256 for e in prepared.tested[part.split_file].entries}
    return tuned, tested


def test_every_image_is_encoded_once(
    data: Path, prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results"
    text = few_shot(data, shots="1, 2, 4", seed="1, 2") + (
        '[[protocols]]\nkind = "few-shot"\nmethods = ["zip"]\nshots = [3]\nseeds = [9]\n'
    )
    prepared = prepare(text, out=out)
    monkeypatch.setattr("ztune.experiments.prepare._LEAST_ENCODED", 7)
    tasks = encodings(prepared.jobs, prepared.tested)
    assert {task.bundle_digest for task in tasks} == {load_bundle(MINI).digest}
    assert {task.bundle for task in tasks} == {MINI}
    assert {task.cache for task in tasks} == {
        out / "cache" / "digits" / n for n in ("tune", "test")
    }
    tuned, tested = images_of(prepared)
    for cache, wanted in (("tune", tuned), ("test", tested)):
        parts = [task.items for task in tasks if task.cache.name == cache]
        digests = [digest for items in parts for _, digest in items]
        assert len(digests) == len(set(digests))
        assert set(digests) == wanted
        assert [len(items) for items in parts[:-1]] == [7] * (len(parts) - 1)
        assert 0 < len(parts[-1]) <= 7
    assert all(sha256(path) == digest for task in tasks for path, digest in task.items)


def test_targets_are_encoded_in_the_plans_order(data: Path, prepare: Prepare) -> None:
    """Not in that of some hash, which differs from process to process."""
    names = [f"target-{n}" for n in (4, 1, 5, 0, 3, 2, 7, 6)]
    targets = "".join(f'{name} = {{ path = "{data}" }}\n' for name in sorted(names))
    text = HEAD.format(**{**USUAL, "data": data}).replace("[methods]", targets + "[methods]")
    listed = ", ".join(f'"{name}"' for name in names)
    text += f'[[protocols]]\nkind = "cross-data-set"\nsource = "digits"\ntargets = [{listed}]\n'
    text += "shots = [2]\n"
    prepared = prepare(text)
    tasks = encodings(prepared.jobs, prepared.tested)
    assert [task.cache.parent.name for task in tasks] == ["digits", *names]


def test_views_are_not_encoded_before(data: Path, prepare: Prepare) -> None:
    """Random views belong to a run's seed; only what is taken as it is can be shared."""
    prepared = prepare(few_shot(data, preset="published"))
    digests = {
        digest
        for task in encodings(prepared.jobs, prepared.tested)
        if task.cache.name == "tune"
        for _, digest in task.items
    }
    (job,) = prepared.jobs
    assert digests == {entry.sha256 for entry in job.split.entries_of("val")}


def test_tasks_are_of_512_images_or_as_many_as_make_32_tasks(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "many"
    image = png(5)
    for name in ("a", "b"):
        (root / "train" / name).mkdir(parents=True)
        (root / "val" / name).mkdir(parents=True)
        (root / "test" / name).mkdir(parents=True)
        for n in range(2):
            (root / "train" / name / f"{n}.png").write_bytes(image + f"{name}t{n}".encode())
            (root / "val" / name / f"{n}.png").write_bytes(image + f"{name}v{n}".encode())
        for n in range(513):
            (root / "test" / name / f"{n}.png").write_bytes(image + f"{name}{n}".encode())
    prepared = prepare(few_shot(root))
    tasks = encodings(prepared.jobs, prepared.tested)
    sizes: dict[str, list[int]] = {}
    for task in tasks:
        sizes.setdefault(task.cache.name, []).append(len(task.items))
    assert sizes == {"tune": [8], "test": [512, 512, 2]}
    monkeypatch.setattr("ztune.experiments.prepare._MOST_ENCODINGS", 2)
    few = [task for task in encodings(prepared.jobs, prepared.tested) if task.cache.name == "test"]
    assert [len(task.items) for task in few] == [513, 513]


def test_data_that_lie_twice_are_encoded_for_each_name(data: Path, prepare: Prepare) -> None:
    """Caches are by the name of the data set, so that one may be removed alone."""
    prepared = prepare(transfers(data, data))
    tasks = encodings(prepared.jobs, prepared.tested)
    caches: list[Any] = [task.cache.relative_to(task.cache.parents[1]).as_posix() for task in tasks]
    assert sorted(caches) == ["again/test", "digits/tune"]
    assert encodings((), {}) == []


# Some cells of a plan


def test_what_is_not_asked_for_is_not_read(data: Path, prepare: Prepare) -> None:
    """A data set of the plan that is not there yet is no obstacle to the others.

    What is read gets all of its keys: some of a table's from now and some from before might be of
    different images.
    """
    text = few_shot(data, seed="1, 2")
    text = text.replace("[methods]", f'absent = {{ path = "{data}-absent" }}\n[methods]')
    text += '[[protocols]]\nkind = "few-shot"\ndata = ["absent"]\nshots = [2]\nseeds = [1]\n'
    with pytest.raises(DataError, match="does not exist"):
        prepare(text)
    prepared = prepare(text, only=CellFilter(data=("digits",), seeds=(2,)))
    keyed = {cell: key for cell, key in prepared.cells.items() if key is not None}
    assert {(cell.data, cell.seed) for cell in keyed} == {("digits", 1), ("digits", 2)}
    assert {(c.data, c.seed) for c in prepared.cells} == {
        ("digits", 1), ("digits", 2), ("absent", 1),
    }  # fmt: skip
    assert len(prepared.jobs) == 2
    assert prepared.found.keys() == {"digits"}
    assert keyed == prepare(few_shot(data, seed="1, 2")).cells


def test_nothing_asked_for_is_an_error(data: Path, prepare: Prepare) -> None:
    with pytest.raises(ConfigError, match="no cell of the plan matches `methods`, `data`"):
        prepare(few_shot(data), only=CellFilter(seeds=(7,)))


def test_queries_do_not_matter_to_a_head(data: Path, prepare: Prepare) -> None:
    for method, settings, same in (("gda", "", True), ("zip", "rank = 2", False)):
        texts = [
            few_shot(data, queries=n, settings=settings).replace("zip", method) for n in (50, 60)
        ]
        keys = [key_of_one(prepare(text)) for text in texts]
        assert (keys[0] == keys[1]) == same


def test_a_worker_with_another_version_of_a_methods_package_refuses(
    data: Path, prepare: Prepare, tmp_path: Path
) -> None:
    (job,) = prepare(few_shot(data)).jobs
    assert job.package is None
    worker = Worker(Settings(tmp_path / "out", "cpu", 1, None))
    answer = worker.perform(replace(job, package="ztune-zip 1.0"))
    assert isinstance(answer, JobResult)
    (reason,) = answer.reasons.values()
    assert "zip is of ztune here, expected ztune-zip 1.0 as at the start of the bench" in reason


def test_remarks_are_collected(prepare: Prepare, tmp_path: Path) -> None:
    built(tmp_path, "dtd")
    prepared = prepare(known(shots="1, 9"), root=tmp_path)
    remarks = prepared.found["dtd"].remarks
    assert "drawn by ztune" in remarks[0]
    assert remarks[-1].startswith("9 shots: 2 class(es) have")
    assert prepared.found["dtd"].known_as is None
