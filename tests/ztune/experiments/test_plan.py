"""Plans of a bench: every key of the format, every mistake, and the plans that are shipped."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import query_images
from benchmarks.query_images import SETS
from tests.conftest import ROOT
from ztune.data.named import NAMED, find_spec
from ztune.errors import ConfigError, DataError
from ztune.experiments.plan import (
    DataPlan,
    ExecutionPlan,
    Found,
    MethodPlan,
    Plan,
    ProtocolPlan,
    read_plan,
)
from ztune.experiments.protocols import PROTOCOLS, TRANSFERS
from ztune.io.toml import parse_toml
from ztune.methods.registry import find_method

PLANS = sorted((ROOT / "plans").glob("*.toml"))

TOP = 'title = "A plan"\nseeds = [1]\nqueries = 100\n'
DATA = "[data]\ndtd = {}\neurosat = {}\n"
METHODS = "[methods]\nzip = {}\ngda = {}\n"
FEW_SHOT = '[[protocols]]\nkind = "few-shot"\n'
LEAST = DATA + METHODS + FEW_SHOT
CROSS = '[[protocols]]\nkind = "cross-data-set"\nsource = "dtd"\ntargets = ["eurosat"]\n'


def plan_of(folder: Path, text: str) -> Plan:
    path = folder / "a-plan.toml"
    path.write_text(text)
    return read_plan(path)


def refused(folder: Path, text: str) -> str:
    """Return why a plan is refused; the reason is one line, and names the file once."""
    with pytest.raises(ConfigError) as caught:
        plan_of(folder, text)
    message = str(caught.value)
    assert message.startswith(f'plan "{folder / "a-plan.toml"}"')
    assert message.count("a-plan.toml") == 1
    assert "\n" not in message
    return message.partition('a-plan.toml"')[2].lstrip(": ")


# What a plan says


FULL = """
title = "All of it"
seeds = [3, 1]
queries = 700
preset = "tuned"
curve = 5

[execution]
provider = "cpu"
threads = 2
memory_limit = 300
force = true

[models]
small = "../models/mini"
large = "bundles/large"

[data]
dtd = {}
food101 = { template = "a dish of {}" }
photos = { path = "photos", template = "a photo of {}.", names = "names.txt" }

[methods]
zip = { curve = 0 }
again = { uses = "zip", queries = 50, preset = "published", augment = 3, settings = { rank = 2 } }
gda = {}

[[protocols]]
kind = "few-shot"
data = ["photos", "dtd"]
shots = [16, 1]

[[protocols]]
kind = "base-to-new"
seeds = [7]
methods = ["gda"]

[[protocols]]
kind = "cross-data-set"
source = "dtd"
targets = ["photos", "food101"]
shots = [4]
methods = ["again", "zip"]

[[protocols]]
kind = "out-of-distribution"
source = "photos"
targets = ["dtd"]
"""


def test_every_key_is_read(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, FULL)
    assert plan.path == tmp_path / "a-plan.toml"
    assert plan.title == "All of it"
    assert plan.execution == ExecutionPlan("cpu", 2, 300, force=True)
    assert plan.models == {"small": "../models/mini", "large": "bundles/large"}
    assert plan.data == {
        "dtd": DataPlan(),
        "food101": DataPlan(template="a dish of {}"),
        "photos": DataPlan("photos", "a photo of {}.", "names.txt"),
    }
    assert plan.methods == {
        "zip": MethodPlan("zip", 700, "tuned", 0),
        "again": MethodPlan("zip", 50, "published", 5, 3, {"rank": 2}),
        "gda": MethodPlan("gda", 700, "tuned", 5),
    }
    everything = ("zip", "again", "gda")
    assert plan.protocols == (
        ProtocolPlan("few-shot", (16, 1), (3, 1), everything, ("photos", "dtd")),
        ProtocolPlan("base-to-new", (16,), (7,), ("gda",), ("dtd", "food101", "photos")),
        ProtocolPlan(
            "cross-data-set", (4,), (3, 1), ("again", "zip"), (), "dtd", ("photos", "food101")
        ),
        ProtocolPlan("out-of-distribution", (16,), (3, 1), everything, (), "photos", ("dtd",)),
    )
    assert [one.sources for one in plan.protocols] == [
        ("photos", "dtd"), ("dtd", "food101", "photos"), ("dtd",), ("photos",),
    ]  # fmt: skip


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, LEAST)
    assert (plan.title, plan.models) == ("a-plan", {})
    assert plan.execution == ExecutionPlan("auto", 1, None, force=False)
    assert plan.methods == {name: MethodPlan(name, 5000, "default", 0) for name in ("zip", "gda")}
    assert plan.protocols == (
        ProtocolPlan("few-shot", (16,), (1, 2, 3), ("zip", "gda"), ("dtd", "eurosat")),
    )


def test_a_method_may_be_there_under_several_labels(tmp_path: Path) -> None:
    text = DATA + '[methods]\n"zip-1" = { uses = "zip", settings = { rank = 1 } }\nzip = {}\n'
    plan = plan_of(tmp_path, text + FEW_SHOT)
    assert plan.protocols[0].methods == ("zip-1", "zip")
    assert plan.methods["zip-1"].uses == plan.methods["zip"].uses == "zip"
    assert plan.methods["zip-1"].settings == {"rank": 1}


@pytest.mark.parametrize(
    ("entry", "views"),
    [
        ("zip = {}", 0),
        ('zip = { preset = "published" }', 16),
        ('zip = { preset = "published", augment = 0 }', 0),
        ('zip = { preset = "published", augment = 4 }', 4),
        ('zip = { preset = "tuned" }', 0),
        ("zip = { augment = 2 }", 2),
        ('sharpzo = { preset = "published" }', 0),
        ('sharpzo = { preset = "published-code" }', 1),
        ('zip = { preset = "published-code" }', 16),
        ('gda = { preset = "published" }', 10),
        ('tip-adapter = { preset = "published" }', 10),
        ('"lp++" = { preset = "published" }', 0),
        ("gda = { augment = 2 }", 2),
    ],
)
def test_views_are_those_of_the_preset_or_as_many_as_asked_for(
    tmp_path: Path, entry: str, views: int
) -> None:
    (method,) = plan_of(tmp_path, f"{DATA}[methods]\n{entry}\n{FEW_SHOT}").methods.values()
    assert method.views == views


def test_paths_are_relative_to_the_plans_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plans").mkdir()
    plan = plan_of(tmp_path / "plans", LEAST)
    assert plan.resolved("../photos") == (tmp_path / "photos").resolve()
    assert plan.resolved("/data/photos") == Path("/data/photos").resolve()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plan.resolved("~/photos") == (tmp_path / "photos").resolve()
    monkeypatch.chdir(tmp_path)  # a plan that is named from another folder
    assert read_plan(Path("plans/a-plan.toml")).resolved("x") == (tmp_path / "plans/x").resolve()


@pytest.mark.parametrize("path", ["a\0b", "~nobody-of-this-name/photos"])
def test_what_is_no_path_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match=r"a-plan.toml.*invalid path"):
        plan_of(tmp_path, LEAST).resolved(path)


def test_numbers_may_be_written_as_toml_writes_them(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, f"queries = 5_000\nseeds = [0x10]\ncurve = 3.0\n{LEAST}")
    assert plan.methods["zip"] == MethodPlan("zip", 5000, "default", 3)
    assert isinstance(plan.methods["zip"].curve, int)
    assert plan.protocols[0].seeds == (16,)


def test_a_curve_may_list_its_query_counts(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, f"curve = 12\n{LEAST}".replace("zip = {}", "zip = { curve = [9, 4] }"))
    assert (plan.methods["gda"].snapshots, plan.methods["zip"].snapshots) == (12, "4,9")


# What it must not say


@pytest.mark.parametrize(
    ("text", "unknown", "known"),
    [
        (
            "querys = 5\n" + LEAST, "querys",
            "title, seeds, queries, preset, curve, execution, models, data, methods, protocols",
        ),
        (
            LEAST.replace("dtd = {}", "dtd = { root = 1 }"), "root",
            "path, template, names, nested, test_data, test_fraction, split_seed, val, "
            "skip_broken, skip_conflicts, settings",
        ),
        (
            LEAST.replace("zip = {}", "zip = { budget = 1 }"), "budget",
            "uses, queries, preset, curve, augment, settings",
        ),
        (LEAST.replace("zip = {}", "zip = { settings = { ranks = 1 } }"), "ranks", "rank"),
        (LEAST + "shot = 4\n", "shot", "kind, shots, seeds, methods, data, source, targets"),
        (
            "[execution]\nthread = 4\n" + LEAST, "thread",
            "provider, threads, memory_limit, force, isolate",
        ),
    ],
)  # fmt: skip
def test_an_unknown_key_lists_the_known_ones(
    tmp_path: Path, text: str, unknown: str, known: str
) -> None:
    message = refused(tmp_path, text)
    assert f'"{unknown}"' in message
    there = message.partition("; it has: ")[2].split(", ")
    assert there == known.split(", ") or (unknown == "ranks" and known in there)


@pytest.mark.parametrize("lacking", ["data", "methods", "protocols"])
def test_what_a_plan_must_have(tmp_path: Path, lacking: str) -> None:
    parts = {"data": DATA, "methods": METHODS, "protocols": FEW_SHOT}
    parts.pop(lacking)
    assert refused(tmp_path, "".join(parts.values())) == f'lacks "{lacking}"'
    empty = {"protocols": "protocols = []\n", "data": "[data]\n", "methods": "[methods]\n"}
    assert refused(tmp_path, empty[lacking] + "".join(parts.values())) == f'lacks "{lacking}"'


def top(line: str) -> str:
    return line + "\n" + LEAST


def data(entry: str) -> str:
    return f"[data]\n{entry}\n{METHODS}{FEW_SHOT}"


def method(entry: str) -> str:
    return f"{DATA}[methods]\n{entry}\n{FEW_SHOT}"


def protocol(lines: str) -> str:
    return f"{DATA}{METHODS}[[protocols]]\n{lines}\n"


def execution(line: str) -> str:
    return f"[execution]\n{line}\n{LEAST}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # of the whole
        (top("title = 5"), "title is 5, expected str"),
        (top('title = ["a"]'), "title is"),
        (top('queries = "many"'), "methods \"zip\": queries is 'many', expected int"),
        (top("queries = true"), 'methods "zip": queries is True, expected int'),
        (top("queries = 1.5"), 'methods "zip": queries is 1.5, expected int'),
        (top("queries = nan"), "queries is nan, expected a finite number"),
        (top("queries = 1e400"), "queries is inf, expected a finite number"),
        (top("queries = 1979-05-27"), 'methods "zip": queries is datetime.date'),
        (top("queries = [5]"), 'methods "zip": queries is [5], expected int'),
        (top("queries = 0"), 'methods "zip": queries is 0, expected at least 1'),
        (top("queries = -5"), 'methods "zip": queries is -5, expected at least 1'),
        (top("curve = -1"), 'methods "zip": curve is -1, expected at least 0'),
        (top("curve = []"), 'methods "zip": curve is [], expected a number, or query counts'),
        (top("curve = [0, 5]"), 'methods "zip": curve is [0, 5], expected a number, or'),
        (
            top('curve = ["x"]'),
            "methods \"zip\": curve is ['x'], expected int or a list of integers",
        ),
        (
            top('preset = "best"'),
            'methods "zip": unknown preset "best" (expected default,',
        ),
        (top("preset = 1"), 'methods "zip": preset is 1, expected str'),
        (top("seeds = 1"), "protocols[0]: seeds is 1"),
        (top('seeds = ["1"]'), "protocols[0]: seeds is"),
        (top("seeds = [true]"), "protocols[0]: seeds is"),
        (top("seeds = [1.0]"), "protocols[0]: seeds is"),
        (top("seeds = []"), "protocols[0]: shots, seeds, methods and data must not be empty"),
        (top("seeds = [1, 2, 1]"), "protocols[0]: seeds has a duplicate entry"),
        (top("seeds = [-1]"), "protocols[0]: expected shots of at least 1 and seeds of at least 0"),
        (top('models = "../models/mini"'), "models is"),
        (top("models = { mini = 1 }"), "models is"),
        (top('models = { mini = { path = "x" } }'), "models is"),
        (top("execution = 1"), "execution is 1, expected a table"),
        (execution("threads = 0"), "execution: threads is 0, expected at least 1"),
        (execution('threads = "all"'), "execution: threads is 'all', expected int"),
        (execution("memory_limit = 0"), "execution: memory_limit is 0, expected at least 1"),
        (execution("provider = 1"), "execution: provider is 1, expected str"),
        (execution("force = 2"), "execution: force is 2, expected bool"),
        # of data
        (f"data = 1\n{METHODS}{FEW_SHOT}", "data is 1, expected a table"),
        (data("dtd = 1"), 'data "dtd" is 1, expected a table'),
        (data('dtd = "/data/dtd"'), "data \"dtd\" is '/data/dtd', expected a table"),
        (data("photos = { path = 1 }"), 'data "photos": path is 1, expected str'),
        (data("photos = {}"), 'data "photos": unknown data set "photos" (known: caltech101,'),
        (data('photos = { template = "{}" }'), 'data "photos": unknown data set "photos"'),
        (data('dtd = { template = "a texture" }'), 'data "dtd": template "a texture": expected'),
        (
            data('dtd = { template = "{} or {}" }'),
            'data "dtd": template "{} or {}": expected {} exactly once',
        ),
        (data('dtd = { template = "" }'), 'data "dtd": template "": expected {} exactly once'),
        (data('dtd = { names = "n.txt" }'), 'data "dtd": names applies only with path'),
        (data('"../up" = { path = "x" }'), 'data "../up": invalid name'),
        (data(f'"{"x" * 256}" = {{ path = "x" }}'), f'data "{"x" * 256}": invalid name'),
        (data('"a\\\\b" = { path = "x" }'), 'data "a\\b": invalid name'),
        (data('"/tmp/x" = { path = "x" }'), 'data "/tmp/x": invalid name'),
        (data('".." = { path = "x" }'), 'data "..": invalid name'),
        (data('"" = { path = "x" }'), 'data "": invalid name'),
        # of methods
        (f"methods = [1]\n{DATA}{FEW_SHOT}", "methods is [1], expected a table"),
        (method("zip = 1"), 'methods "zip" is 1, expected a table'),
        (
            method("zop = {}"),
            'methods "zop": unknown method "zop" (did you mean zip?);',
        ),
        (
            method('zip = { uses = "zop" }'),
            'methods "zip": unknown method "zop" (did you mean zip?);',
        ),
        (method("zip = { uses = 1 }"), 'methods "zip": uses is 1, expected str'),
        (method("zip = { queries = 0 }"), 'methods "zip": queries is 0, expected at least 1'),
        (method("zip = { curve = -1 }"), 'methods "zip": curve is -1, expected at least 0'),
        (method("zip = { augment = -1 }"), 'methods "zip": augment is -1, expected at least 0'),
        (method('zip = { augment = "x" }'), "methods \"zip\": augment is 'x', expected int"),
        (method('zip = { preset = "x" }'), 'methods "zip": unknown preset "x" (expected default,'),
        (method("zip = { settings = 1 }"), 'methods "zip": settings is 1, expected a table'),
        (method('zip = { settings = { rank = "x" } }'), 'methods "zip": method "zip": rank is'),
        (method("zip = { settings = { rank = -1 } }"), 'methods "zip": rank is -1'),
        (method('"a,b" = { uses = "zip" }'), 'methods "a,b": invalid name'),
        (method('" zip" = { uses = "zip" }'), 'methods " zip": invalid name'),
        # of protocols
        (f"protocols = 1\n{DATA}{METHODS}", "protocols is"),
        (f"protocols = [1]\n{DATA}{METHODS}", "protocols is"),
        (f'{DATA}{METHODS}[protocols]\nkind = "few-shot"\n', "protocols is"),
        (protocol("shots = [1]"), 'protocols[0] lacks "kind"'),
        (protocol("kind = 1"), "protocols[0]: kind is 1, expected str"),
        (protocol('kind = ["few-shot"]'), "protocols[0]: kind is"),
        (
            protocol('kind = "few"'),
            'protocols[0]: kind is "few", expected few-shot or base-to-new or cross-data-set or '
            "out-of-distribution",
        ),
        (LEAST + "shots = 4\n", "protocols[0]: shots is 4"),
        (LEAST + 'shots = ["4"]\n', "protocols[0]: shots is"),
        (LEAST + "shots = []\n", "protocols[0]: shots, seeds, methods and data must not be empty"),
        (LEAST + "shots = [0]\n", "protocols[0]: expected shots of at least 1"),
        (LEAST + "shots = [4, 4]\n", "protocols[0]: shots has a duplicate entry"),
        (LEAST + "seeds = []\n", "protocols[0]: shots, seeds, methods and data must not be empty"),
        (
            LEAST + "seeds = [-1]\n",
            "protocols[0]: expected shots of at least 1 and seeds of at least 0",
        ),
        (LEAST + "methods = []\n", "protocols[0]: shots, seeds, methods and data must not"),
        (LEAST + 'methods = "zip"\n', "protocols[0]: methods is 'zip'"),
        (LEAST + 'methods = ["zip", "zip"]\n', "protocols[0]: methods has a duplicate entry"),
        (
            LEAST + 'methods = ["zop"]\n',
            'protocols[0]: "zop" is not in [methods] (expected zip, gda)',
        ),
        (LEAST + "data = []\n", "protocols[0]: shots, seeds, methods and data must not be empty"),
        (LEAST + 'data = ["dtd", "dtd"]\n', "protocols[0]: data has a duplicate entry"),
        (
            LEAST + 'data = ["svhn"]\n',
            'protocols[0]: "svhn" is not in [data] (expected dtd, eurosat)',
        ),
        (LEAST + FEW_SHOT + "shots = [0]\n", "protocols[1]: expected shots of at least 1"),
        (LEAST + 'source = "dtd"\n', "protocols[0]: few-shot takes data, not source"),
        (LEAST + 'targets = ["dtd"]\n', "protocols[0]: few-shot takes data, not source"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    assert refused(tmp_path, text).startswith(message)


@pytest.mark.parametrize("kind", TRANSFERS)
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "takes source and targets, not data"),
        ('source = "dtd"', "takes source and targets, not data"),
        ('targets = ["dtd"]', "takes source and targets, not data"),
        ('source = "dtd"\ntargets = []', "takes source and targets, not data"),
        ('source = "dtd"\ntargets = ["eurosat"]\ndata = ["dtd"]', "takes source and targets, not"),
        ('source = "dtd"\ntargets = ["eurosat", "dtd"]', 'the source "dtd" is among the targets'),
        ('source = "dtd"\ntargets = ["eurosat", "eurosat"]', "targets has a duplicate entry"),
        ('source = "svhn"\ntargets = ["dtd"]', '"svhn" is not in [data] (expected dtd, eurosat)'),
        ('source = "dtd"\ntargets = ["svhn"]', '"svhn" is not in [data] (expected dtd, eurosat)'),
        ('source = ["dtd"]\ntargets = ["eurosat"]', "source is"),
        ('source = "dtd"\ntargets = "eurosat"', "targets is"),
    ],
)
def test_what_is_wrong_with_a_transfer(tmp_path: Path, kind: str, lines: str, message: str) -> None:
    found = refused(tmp_path, protocol(f'kind = "{kind}"\n{lines}'))
    assert found.startswith("protocols[0]: ")
    assert message in found


@pytest.mark.parametrize("more", ["", "seeds = [3, 4]\n"])
def test_transfers_that_would_share_cells_are_refused(tmp_path: Path, more: str) -> None:
    """Their cells are called alike, and in a table one would hide the other."""
    text = f"{DATA}svhn = {{}}\n{METHODS}{CROSS}"
    other = CROSS.replace("eurosat", "svhn") + more
    message = refused(tmp_path, text + other)
    assert message.startswith("protocols[0] and protocols[1] share cells of cross-data-set")
    # Apart in seeds, shots or methods they share none.
    for apart in ("seeds = [4]\n", "shots = [1]\n"):
        plan_of(tmp_path, text + CROSS.replace("eurosat", "svhn") + apart)
    only_gda = CROSS.replace("eurosat", "svhn") + 'methods = ["gda"]\n'
    plan_of(tmp_path, text + 'methods = ["zip"]\n' + only_gda)
    # The same cells twice are one, and those of the other transfer others.
    plan_of(tmp_path, text + CROSS)
    plan_of(tmp_path, text + other.replace("cross-data-set", "out-of-distribution"))


# Files that are no plans


@pytest.mark.parametrize(
    "text",
    ["[data", "a = ", "a = 1\na = 2", "{}", "a = " + "[" * 100_000, "a = 1" + "0" * 5000, "a = '"],
)
def test_what_is_no_toml(tmp_path: Path, text: str) -> None:
    assert refused(tmp_path, text).startswith("invalid TOML (")
    with pytest.raises(ConfigError, match=r"^here: invalid TOML \("):
        parse_toml(text, "here")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    with pytest.raises(ConfigError, match=r'plan ".*plan.toml" does not exist'):
        read_plan(path)
    with pytest.raises(ConfigError, match=f'plan "{re.escape(str(tmp_path))}" is not a file'):
        read_plan(tmp_path)
    path.write_bytes(LEAST.encode("utf-16"))
    with pytest.raises(DataError, match=r'plan ".*plan.toml" is not UTF-8 text'):
        read_plan(path)
    path.write_bytes(b"\xef\xbb\xbf" + LEAST.encode())  # as some editors begin a file
    assert list(read_plan(path).data) == ["dtd", "eurosat"]
    path.write_text("")
    with pytest.raises(ConfigError, match='lacks "data"'):
        read_plan(path)


# What a report knows of it


def test_the_document_holds_no_folder_of_data_or_models(tmp_path: Path) -> None:
    text = FULL.replace('"photos", template', f'"{tmp_path}/photos", template')
    text = text.replace("names.txt", f"{tmp_path}/names.txt")
    text = text.replace("bundles/large", f"{tmp_path}/bundles/large")
    plan = plan_of(tmp_path, text)
    assert str(tmp_path) in plan.models["large"]
    digests = {"small": "12ab", "large": "34cd"}
    found_of_photos = Found(None, ["no test images"])
    document = plan.to_json(digests, {"photos": found_of_photos})
    written = json.dumps(document, allow_nan=False)
    assert str(tmp_path) not in written
    assert not re.search(r'"[^"]*/', written), "no path at all"
    assert document["plan"] == "a-plan.toml"
    assert document["models"] == {
        "small": {"bundle": "mini", "digest": "12ab"},
        "large": {"bundle": "large", "digest": "34cd"},
    }
    found: Any = json.loads(written)
    photos, food = found["data"]["photos"], found["data"]["food101"]
    assert (photos["title"], photos["template"]) == ("photos", "a photo of {}.")
    assert photos["found"] == {"known_as": None, "remarks": ["no test images"], "left_out": {}}
    assert (food["title"], food["template"]) == ("Food101", "a dish of {}")
    assert food["found"] is None
    assert photos["place"] != food["place"]
    assert found["methods"]["again"] == {
        "uses": "zip", "queries": 50, "preset": "published", "curve": 5, "augment": 3,
        "settings": {"rank": 2},
    }  # fmt: skip
    assert found["protocols"][2]["targets"] == ["photos", "food101"]
    assert found["execution"] == {
        "provider": "cpu", "threads": 2, "memory_limit": 300, "force": True,
    }  # fmt: skip
    # The path of the plan does not matter.
    (tmp_path / "other").mkdir()
    assert (
        plan_of(tmp_path / "other", text).to_json(digests, {"photos": found_of_photos}) == document
    )


@pytest.mark.parametrize("name", ["", "a/b", " a", "a,b"])
def test_models_have_names_like_everything_else(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"models .*invalid name"):
        plan_of(tmp_path, LEAST.replace("[data]", f'[models]\n"{name}" = "x"\n[data]'))


def test_models_may_take_the_places_of_its_own(tmp_path: Path) -> None:
    plan = replace(plan_of(tmp_path, FULL), models={"mine": str(tmp_path / "secret" / "mine")})
    found = plan.to_json({"mine": "56ef"}, {})["models"]
    assert found == {"mine": {"bundle": "mine", "digest": "56ef"}}


# The plans that are shipped


def test_there_are_plans_for_every_protocol() -> None:
    kinds = {one.kind for path in PLANS for one in read_plan(path).protocols}
    assert kinds == set(PROTOCOLS)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_shipped_plan(path: Path) -> None:
    plan = read_plan(path)
    for name, entry in plan.data.items():
        if entry.path is None:
            assert find_spec(name).name == name, "names are written as the tables write them"
            assert name in NAMED
            assert entry.template is None, "the papers' own"
        else:
            folder = plan.resolved(entry.path)
            assert folder.is_dir() or (folder.parent == query_images.OUT and folder.name in SETS)
    used = {name for one in plan.protocols for name in (*one.sources, *one.targets)}
    assert used == set(plan.data)
    assert {name for one in plan.protocols for name in one.methods} == set(plan.methods)
    for one in plan.methods.values():
        find_method(one.uses)
    for bundle in plan.models.values():
        assert (plan.resolved(bundle) / "bundle.json").is_file()


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_command_above_a_shipped_plan_is_its_own(path: Path) -> None:
    text = path.read_text()
    header = [line for line in text.partition("\ntitle")[0].splitlines() if line.startswith("#")]
    (command,) = [line[1:].split() for line in header if line[1:].strip().startswith("ztune bench")]
    assert command[2] == f"plans/{path.name}"
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options["--out"] == f"runs/{path.stem}"
    plan = read_plan(path)
    assert ("--model" in options) == (not plan.models)
    assert ("--root" in options) == any(entry.path is None for entry in plan.data.values())
