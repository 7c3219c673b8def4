"""Reaching a server: its client half, what it must offer, and how it is found to be another."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.bundle import Bundle, load_bundle
from runtimes.prompts import token_table
from runtimes.remote.connect import CheckedService, _text_ids, connect
from runtimes.remote.endpoint import Connection, parse_named_server
from runtimes.remote.served import ServerRuntime
from runtimes.tokenizer import Tokenizer
from tests.conftest import MINI
from tests.servers.bundles import GRAPHS, model_of, models_of
from tests.servers.fake import Arrays, FailedError, FakeModel, FakeServer
from tests.shared_bundle import share_weights
from ztune.errors import ConfigError, FormatError, ServerError
from ztune.io.files import user_cache

grpc = pytest.importorskip("grpc")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(MINI)


@pytest.fixture(scope="module")
def models(bundle: Bundle) -> dict[str, FakeModel]:
    return models_of(bundle)


@pytest.fixture
def fake(models: dict[str, FakeModel]) -> Iterator[FakeServer]:
    with FakeServer(models) as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return user_cache("clients")


class Client:
    """Connects, and remembers what was said."""

    def __init__(self) -> None:
        self.remarks: list[str] = []
        self.progress: list[tuple[int, int]] = []
        self.opened: list[CheckedService] = []

    def __call__(
        self,
        server: FakeServer,
        path: str = "mini",
        client: Path | None = None,
        **settings: Any,
    ) -> CheckedService:
        chosen: dict[str, Any] = {"deadline": 10.0, "give_up": 2.0} | settings
        address = f"triton://{server.grpc}"
        chosen["named"] = parse_named_server(f"{address}/{path}")
        made = connect(
            f"{address}/{path}",
            Connection(**chosen),
            client,
            self.remarks.append,
            lambda done, total: self.progress.append((done, total)),
        )
        self.opened.append(made)
        return made


@pytest.fixture
def reach() -> Iterator[Client]:
    client = Client()
    yield client
    for one in client.opened:
        one.service.close()


@pytest.fixture
def half(bundle: Bundle, tmp_path: Path) -> Path:
    """Return a folder with the client half of the bundle, shipped by hand."""
    folder = tmp_path / "half"
    folder.mkdir()
    for name in bundle.client_files:
        shutil.copyfile(bundle.path / name, folder / name)
    return folder


def other_half(half: Path) -> Path:
    """Return the half of another bundle, which differs in its name alone."""
    folder = half.with_name("other")
    shutil.copytree(half, folder)
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["created_by"] = "somebody else"
    (folder / "bundle.json").write_text(json.dumps(manifest))
    assert load_bundle(folder).digest != load_bundle(half).digest
    return folder


def slices(server: FakeServer) -> list[tuple[int, int]]:
    """Return a list that grows with each slice of the client half that is asked for."""
    asked: list[tuple[int, int]] = []

    def note(request: Any, honest: Any) -> Any:
        if request.model_name == "mini_client":
            start, length = np.frombuffer(request.raw_input_contents[0], np.int64)
            asked.append((int(start), int(length)))
        return honest

    server.hook = note
    return asked


# -- the client half -------------------------------------------------------------------------------


def test_the_client_half_is_fetched_once(
    fake: FakeServer, reach: Client, bundle: Bundle, cache: Path
) -> None:
    asked = slices(fake)
    made = reach(fake)
    assert made.bundle.digest == bundle.digest
    assert made.bundle.path == cache / bundle.digest
    assert made.bundle.is_client_half
    for name in bundle.client_files:
        assert (made.bundle.path / name).read_bytes() == (bundle.path / name).read_bytes()
    total = sum((bundle.path / name).stat().st_size for name in bundle.client_files)
    assert sum(length for _, length in asked[1:]) == total
    assert reach.progress[-1] == (total, total)
    assert set(made.parity) == {"image", "text", "prompt", "score"}
    assert all(value < 1e-4 for value in made.parity.values())
    asked.clear()
    reach.progress.clear()
    assert reach(fake).bundle.path == made.bundle.path
    assert asked == [(0, 1)]  # which bundle is it?
    assert reach.progress == []
    assert [path.name for path in cache.iterdir()] == [bundle.digest]


def test_large_files_come_in_slices(
    fake: FakeServer, reach: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtimes.remote.client_half._SLICE", 50_000)
    asked = slices(fake)
    reach(fake)
    assert len(asked) > 6
    assert max(length for _, length in asked) == 50_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{}"),
        ("bundle.json", b"{}"),
        ("bundle.json", b"garbage"),
        ("token_table.npy", None),
        ("bundle.json", None),
    ],
)
def test_a_damaged_half_in_the_cache(
    fake: FakeServer, reach: Client, bundle: Bundle, cache: Path, name: str, content: bytes | None
) -> None:
    reach(fake)
    file = cache / bundle.digest / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(
        ServerError, match=r"is damaged \(remove it; the next command downloads it again\)"
    ):
        reach(fake)
    shutil.rmtree(cache / bundle.digest)
    assert reach(fake).bundle.digest == bundle.digest


@pytest.mark.parametrize("broken_at", ["bundle.json", "token_table.npy"])
def test_a_half_that_arrives_damaged_is_not_kept(
    fake: FakeServer, reach: Client, cache: Path, broken_at: str
) -> None:
    def spoil(request: Any, honest: Any) -> Any:
        if request.model_name == "mini_client":
            for number, output in enumerate(honest.outputs):
                size = len(honest.raw_output_contents[number])
                large = size > 100_000 if broken_at == "token_table.npy" else 32 < size < 9_000
                if output.name == "bytes" and large:
                    honest.raw_output_contents[number] = bytes(size)
        return honest

    fake.hook = spoil
    with pytest.raises((ServerError, FormatError)) as caught:
        reach(fake)
    assert "\n" not in str(caught.value)
    assert not cache.exists() or not list(cache.iterdir())


def test_of_shared_weights_only_the_token_table_is_fetched(reach: Client, tmp_path: Path) -> None:
    whole = share_weights(load_bundle(MINI), tmp_path / "shared")
    with FakeServer(models_of(whole)) as server:
        made = reach(server)
    half = made.bundle
    assert half.digest == whole.digest
    assert {path.name for path in half.path.iterdir()} == set(whole.client_files)
    assert "token_table.bin" in whole.client_files
    np.testing.assert_array_equal(token_table(half), token_table(whole))
    assert all(value < 1e-4 for value in made.parity.values())


def test_two_processes_that_fetch_the_same_half(
    fake: FakeServer, reach: Client, bundle: Bundle, cache: Path, half: Path
) -> None:
    def faster(request: Any, honest: Any) -> Any:
        if request.model_name == "mini_client" and not (cache / bundle.digest).exists():
            shutil.copytree(half, cache / bundle.digest)
        return honest

    cache.mkdir(parents=True)
    fake.hook = lambda request, honest: faster(request, honest) if any(cache.iterdir()) else honest
    made = reach(fake)
    assert made.bundle.digest == bundle.digest
    assert [path.name for path in cache.iterdir()] == [bundle.digest]


def test_a_cache_that_cannot_be_written(fake: FakeServer, reach: Client, cache: Path) -> None:
    cache.parent.parent.mkdir(parents=True, exist_ok=True)
    cache.parent.write_text("a file where a folder should be")
    with pytest.raises(
        ConfigError, match=r"client half cannot be cached in .* \(set XDG_CACHE_HOME"
    ):
        reach(fake)


def test_sizes_that_cannot_be(fake: FakeServer, reach: Client, models: dict[str, Any]) -> None:
    true = models["mini_client"]
    for sizes in ([0, 1, 1, 1], [2_000_000, 1, 1, 1], [100, 2**40, 1, 1], [-1, 1, 1, 1]):

        def lying(given: Arrays, sizes: list[int] = sizes) -> Arrays:
            return {**true.function(given), "sizes": np.array(sizes)}

        fake.models["mini_client"] = true._replace(function=lying)
        with pytest.raises(
            ServerError, match=r"invalid sizes of the client half's files: .* bytes"
        ):
            reach(fake)


def test_a_half_shipped_by_hand(fake: FakeServer, reach: Client, half: Path, cache: Path) -> None:
    asked = slices(fake)
    assert reach(fake, client=half).bundle.path == half
    assert asked == [(0, 1)]
    del fake.models["mini_client"]
    assert reach(fake, client=half).bundle.path == half
    assert not cache.exists()
    with pytest.raises(ServerError, match=r"no model \"mini_client\" .*`client=FOLDER`"):
        reach(fake)


def test_a_half_of_another_bundle(fake: FakeServer, reach: Client, half: Path) -> None:
    other = other_half(half)
    with pytest.raises(ServerError, match=r"serves bundle .*…, expected .*… of `client`"):
        reach(fake, client=other)
    # Without the client model the first answer says it.
    del fake.models["mini_client"]
    with pytest.raises(ServerError, match="now serves bundle"):
        reach(fake, client=other)


def test_a_damaged_file_of_a_shipped_half(fake: FakeServer, reach: Client, half: Path) -> None:
    with (half / "tokenizer.json").open("ab") as file:
        file.write(b" ")
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        reach(fake, client=half)


# -- what a server must offer ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("other", r'has no model of "other" \(expected other_image, other_text, other_prompt, '),
        ("mini/7", r'has no model of "mini" in version 7 \(expected mini_image'),
    ],
)
def test_models_that_are_not_there(fake: FakeServer, reach: Client, path: str, words: str) -> None:
    if path == "mini/7":
        # As Triton answers for a version that it has not; the staged server knows no versions.
        fake.models.clear()
    with pytest.raises(ServerError, match=words):
        reach(fake, path)


def test_no_models_at_all(fake: FakeServer, reach: Client) -> None:
    fake.models.clear()
    with pytest.raises(ServerError, match='has no model of "mini"'):
        reach(fake)


def test_some_models_do(fake: FakeServer, reach: Client, half: Path) -> None:
    for part in ("image", "text", "prompt", "client"):
        del fake.models[f"mini_{part}"]
    made = reach(fake, client=half)
    assert set(made.service.offers) == {"score"}
    assert set(made.parity) == {"score"}


@pytest.mark.parametrize(
    ("part", "kind", "name", "change", "words"),
    [
        (
            "prompt",
            "inputs",
            "tokens",
            None,
            r'model "mini_prompt" has no input "tokens" \(make the models',
        ),
        ("score", "outputs", "losses", None, 'model "mini_score" has no output "losses"'),
        (
            "image",
            "inputs",
            "pixels",
            {"shape": [-1, 3, 32, 32]},
            r'"pixels" is FP32\[-1, 3, 32, 32\]',
        ),
        ("prompt", "inputs", "contexts", {"shape": [-1, -1, 512]}, r"expected FP32\[-1, -1, 64\]"),
        (
            "text",
            "outputs",
            "features",
            {"shape": [-1, 64]},
            r"expected FP32\[-1, 128\] \(the client half",
        ),
        ("score", "outputs", "losses", {"datatype": "FP32"}, r"is FP32\[-1\], expected FP64\[-1\]"),
        ("prompt", "outputs", "features", {"shape": [-1, 128]}, r"expected FP32\[-1, -1, 128\]"),
    ],
)
def test_models_that_do_not_fit(
    fake: FakeServer,
    reach: Client,
    half: Path,
    part: str,
    kind: str,
    name: str,
    change: dict[str, Any] | None,
    words: str,
) -> None:
    true = fake.models[f"mini_{part}"]
    told = [
        tensor._replace(**(change or {})) if tensor.name == name else tensor
        for tensor in getattr(true, kind)
        if change is not None or tensor.name != name
    ]
    given = {"inputs": true.inputs, "outputs": true.outputs, kind: told}
    fake.models[f"mini_{part}"] = FakeModel(given["inputs"], given["outputs"], true.function)
    with pytest.raises(ServerError, match=words) as caught:
        reach(fake, client=half)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_ready_or_wants_a_token(
    fake: FakeServer, reach: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ZTUNE_TOKEN", raising=False)
    fake.token = "hunter2"
    with pytest.raises(ServerError, match="give a token with ZTUNE_TOKEN or `token_file`"):
        reach(fake)
    monkeypatch.setenv("ZTUNE_TOKEN", "hunter2")
    assert reach(fake).parity


def test_addresses_that_are_wrong(fake: FakeServer, reach: Client) -> None:
    fake.close()
    with pytest.raises(ServerError, match="check the address, and that the server is running"):
        reach(fake)


# -- another model than it says --------------------------------------------------------------------


def perturbed(bundle: Bundle, part: str) -> FakeModel:
    """Return a model with the right digest whose largest weight stands in another order."""
    graph = GRAPHS[part](bundle)
    floats = [one for one in graph.graph.initializer if one.data_type == 1]
    largest = max(floats, key=lambda one: len(one.raw_data))
    largest.raw_data = np.frombuffer(largest.raw_data, np.float32)[::-1].tobytes()
    return model_of(graph)


@pytest.mark.parametrize("part", ["image", "text", "prompt", "score"])
def test_other_weights_under_the_right_digest(
    fake: FakeServer, reach: Client, bundle: Bundle, part: str
) -> None:
    fake.models[f"mini_{part}"] = perturbed(bundle, part)
    with pytest.raises(
        ServerError, match=f'"mini_{part}" differs from torch by .*, expected at most'
    ):
        reach(fake)


def test_figures_that_are_no_numbers(
    fake: FakeServer, reach: Client, models: dict[str, FakeModel]
) -> None:
    true = models["mini_text"]

    def nothing(given: Arrays) -> Arrays:
        answer = true.function(given)
        return {**answer, "features": np.full_like(answer["features"], np.nan)}

    fake.models["mini_text"] = true._replace(function=nothing)
    with pytest.raises(ServerError, match='"mini_text" differs from torch by nan'):
        reach(fake)


def test_a_server_without_digests_is_looked_at_when_it_comes_back(
    fake: FakeServer, reach: Client, bundle: Bundle, half: Path
) -> None:
    def silent(model: FakeModel) -> FakeModel:
        return model._replace(outputs=[t for t in model.outputs if t.name != "digest"])

    with pytest.raises(ServerError, match='model "mini_client" has no output "digest"'):
        fake.models["mini_client"] = silent(fake.models["mini_client"])
        reach(fake)
    for part in GRAPHS:
        fake.models[f"mini_{part}"] = silent(fake.models[f"mini_{part}"])
    service = reach(fake, client=half, give_up=30).service
    assert any("report no bundle digest" in remark for remark in reach.remarks)
    assert service.verify is not None

    failures = [1]

    def once(request: Any, honest: Any) -> Any:
        if failures:
            failures.pop()
            raise FailedError(grpc.StatusCode.UNAVAILABLE, "gone")
        return honest

    encoder = (
        ServerRuntime(service, bundle).prompts(Tokenizer(bundle)).encoder(("one", "two"), 4, 1)
    )
    contexts = np.zeros((1, 4, bundle.text.width), np.float32)
    expected = encoder.encode(contexts)
    fake.hook = once
    n_before = fake.calls["ModelInfer"]
    np.testing.assert_array_equal(encoder.encode(contexts), expected)
    assert fake.calls["ModelInfer"] > n_before + 5  # the figures of the client half, too
    failures.append(1)
    fake.models["mini_prompt"] = silent(perturbed(bundle, "prompt"))
    with pytest.raises(ServerError, match='"mini_prompt" differs from torch'):
        encoder.encode(contexts)


def test_a_swapped_bundle_during_the_start(
    fake: FakeServer, reach: Client, models: dict[str, FakeModel]
) -> None:
    true = models["mini_prompt"]
    fake.models["mini_prompt"] = true._replace(
        function=lambda given: {**true.function(given), "digest": np.zeros(32, np.uint8)}
    )
    with pytest.raises(ServerError, match="now serves bundle"):
        reach(fake)


@pytest.mark.parametrize(
    ("prefix", "suffix", "pad", "row"),
    [
        ((1,), (2,), 0, [1, 7, 8, 2, 0, 0]),
        ((1,), (2,), 0, [1, 7, 8, 9, 9, 2]),
        ((), (3,), 3, [7, 8, 3, 3, 3, 3]),  # the closing id is the padding's
        ((), (3,), 3, [7, 8, 9, 9, 9, 3]),
        ((), (), 0, [7, 8, 0, 0, 0, 0]),
    ],
)
def test_a_texts_own_ids_are_found_in_its_padded_sequence(
    prefix: tuple[int, ...], suffix: tuple[int, ...], pad: int, row: list[int]
) -> None:
    spec = replace(load_bundle(MINI).text, prefix_ids=prefix, suffix_ids=suffix, pad_id=pad)
    own = tuple(i for i in row if i not in {*prefix, *suffix, pad})
    assert _text_ids(spec, np.array(row)) == own
