"""What goes wrong between a person and a server: one line, exit code 1, and no secret anywhere."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.conftest import DIGITS, FEW_DIGITS, MINI, Command, Result
from tests.remote.conftest import (
    DATA,
    OPTIONS,
    Start,
    contents,
    document,
    export,
    one_error,
    url,
    url_of,
    worked,
)
from tests.servers.fake import Arrays, FakeModel, FakeServer, Tensor
from tests.servers.process import free_ports
from tests.servers.tls import Certificates, TlsProxy, make_certificates
from tests.servers.triton import TritonServer
from ztune.artifact import ContextArtifact, EnsembleArtifact, read_artifact
from ztune.errors import ConfigError
from ztune.model import load

pytestmark = pytest.mark.usefixtures("quick_figures")

SECRET = "s3cr3t-t0k3n"
ZIP = ("--method", "zip", "--queries", 20)
TYPES = {"tensor(float)": "FP32", "tensor(double)": "FP64", "tensor(int64)": "INT64"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


Tune = Any


@pytest.fixture
def tune(ztune: Command, out: Path) -> Tune:
    """Run `ztune tune` with a target and words that it is to refuse; return what it said."""

    def refused(target: object, *words: object, says: tuple[str, ...]) -> str:
        done = ztune("tune", target, *DATA, *ZIP, *words, "--out", out, "--quiet")
        assert done.out == ""
        assert not out.exists()
        return one_error(done.code, done.err, *says)

    return refused


def graph(path: Path) -> FakeModel:
    """Return a repository's graph as a model of the fake server's."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def described(tensors: Any) -> list[Tensor]:
        return [
            Tensor(
                one.name,
                TYPES.get(one.type, "UINT8"),
                [size if isinstance(size, int) else -1 for size in one.shape],
            )
            for one in tensors
        ]

    names = [one.name for one in session.get_outputs()]

    def answer(given: Arrays) -> Arrays:
        return dict(zip(names, session.run(names, given), strict=True))

    return FakeModel(described(session.get_inputs()), described(session.get_outputs()), answer)


@pytest.fixture(scope="module")
def guarded(repository: Path) -> Iterator[FakeServer]:
    """A server with the embedded bundle's models that wants a token, and shares no memory."""
    graphs = {path.parent.parent.name: graph(path) for path in repository.glob("*/1/model.onnx")}
    with FakeServer(graphs, token=SECRET) as server:
        yield server


@pytest.fixture(scope="module")
def frugal(tmp_path_factory: pytest.TempPathFactory, triton: TritonServer) -> Iterator[str]:
    """Return the URL of a server that gives losses alone."""
    repository = export(MINI, tmp_path_factory.mktemp("frugal") / "repository", "losses")
    with TritonServer(repository, args=OPTIONS) as server:
        yield url_of(server)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.mark.parametrize("scheme", ["triton", "http"])
def test_nobody_there(scheme: str, tune: Tune) -> None:
    (port,) = free_ports(1)
    for address in (f"127.0.0.1:{port}", "no-such-host.invalid:8001"):
        where = f"{scheme}://{address}"
        tune(f"{where}/mini", says=(where, "check the address, and that the server is running"))


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_another_protocol_s_port(protocol: str, triton: TritonServer, tune: Tune) -> None:
    address = triton.http if protocol == "grpc" else triton.grpc
    right = url(address, "http" if protocol == "grpc" else "grpc").rpartition("/")[0]
    says = (address, f"the port speaks {'HTTP' if protocol == 'grpc' else 'gRPC'}", f"use {right}")
    tune(url(address, protocol), "--deadline", 3, says=says)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_models_that_are_not_there(protocol: str, triton: TritonServer, tune: Tune) -> None:
    whole = url_of(triton, protocol)
    tune(f"{whole}x", says=('has no model of "minix"', "minix_image"))
    tune(f"{whole}/7", says=('has no model of "mini" in version 7',))


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("ftp://{}/mini", ("expected one of triton://, tritons://, http://, https://",)),
        ("triton://{}", ("no valid model name", "scheme://host:port/NAME")),
        ("triton://{}/mini/new", ('invalid version "new"',)),
        ("triton://127.0.0.1/mini", ("has no host or port",)),
        (
            "http://me:s3cr3t-t0k3n@{}/mini",
            ("must not contain a user or password", "ZTUNE_BASIC_AUTH"),
        ),
        ("http://{}/mini?token=s3cr3t-t0k3n", ("? or #", "ZTUNE_TOKEN")),
        ("http://{}/mini#s3cr3t-t0k3n", ("? or #", "ZTUNE_TOKEN")),
    ],
)
def test_addresses(address: str, says: tuple[str, ...], triton: TritonServer, tune: Tune) -> None:
    assert SECRET not in tune(address.format(triton.grpc), says=says)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--losses", "there"), ("--losses", "auto, here, server")),
        (("--images", "there"), ("--images", "server or local")),
        (("--images", "local"), ("--client BUNDLE",)),
        (("--deadline", 0), ("--deadline is 0",)),
        (("--give-up", -1), ("--give-up is -1",)),
        (("--max-inflight", 0), ("--max-inflight is 0",)),
        (("--max-request", 0), ("--max-request is 0",)),
        (("--compression", "zip"), ("--compression", "none, gzip, deflate")),
        (("--tls-cert", "x.pem"), ("only one of --tls-cert and --tls-key",)),
        (("--token-file", "/nowhere/token"), ("--token-file", "cannot be read")),
        (("--client", "/nowhere/bundle"), ("/nowhere/bundle", "does not exist, expected a bundle")),
        (("--provider", "cpu"), ("the server decides how graphs run", "leave out --provider")),
        (("--threads", 1), ("the server decides how graphs run", "leave out --threads")),
        (
            ("--memory-limit", 100),
            ("the server decides how graphs run", "leave out --memory-limit"),
        ),
    ],
)
def test_options(
    words: tuple[object, ...], says: tuple[str, ...], triton: TritonServer, tune: Tune
) -> None:
    assert SECRET not in tune(url_of(triton), *words, says=says)


@pytest.mark.parametrize(
    "words",
    [
        ("--client", MINI),
        ("--images", "server"),
        ("--losses", "auto"),
        ("--deadline", 30),
        ("--give-up", 300),
        ("--max-inflight", 4),
        ("--max-request", 64),
        ("--compression", "none"),
        ("--tls-ca", "x.pem"),
        ("--tls-cert", "x.pem"),
        ("--tls-key", "x.key"),
        ("--token-file", "x"),
        ("--basic-auth-file", "x"),
        ("--insecure",),
    ],
    ids=lambda words: str(words[0]).strip("-"),
)
def test_options_of_a_server_with_a_folder(words: tuple[object, ...], tune: Tune) -> None:
    tune(MINI, *words, says=(f"{words[0]} applies only to a server's URL",))


def test_another_client_half(triton: TritonServer, tune: Tune, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in MINI.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    manifest = (other / "bundle.json").read_text().replace("checkpoint", "checkpoins", 1)
    (other / "bundle.json").write_text(manifest)
    says = ("of --client", str(other))
    tune(url_of(triton), "--client", other, says=says)


def test_a_token_is_missing_or_wrong(
    guarded: FakeServer, tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = ("no valid token", "ZTUNE_TOKEN", "--token-file")
    tune(url(guarded.grpc), says=says)
    wrong = tmp_path / "token"
    wrong.write_text("hunter2\n")
    assert "hunter2" not in tune(url(guarded.grpc), "--token-file", wrong, says=says)
    monkeypatch.setenv("ZTUNE_TOKEN", "hunter2")
    assert "hunter2" not in tune(url(guarded.grpc), says=says)
    monkeypatch.setenv("ZTUNE_BASIC_AUTH", "me:hunter2")
    assert "hunter2" not in tune(url(guarded.grpc), says=("both a token and basic auth",))
    monkeypatch.delenv("ZTUNE_TOKEN")
    assert "hunter2" not in tune(url("203.0.113.1:8001"), says=("unencrypted", "tritons://"))


def told_nothing(result: Result, run: Path, *secrets: str) -> None:
    """See that no secret stands in what a command said, or in any file of its run."""
    for secret in secrets:
        assert secret not in result.out + result.err
        for path, content in contents(run):
            assert secret.encode() not in content, path


@pytest.mark.parametrize("way", ["file", "environment"])
def test_a_token_is_kept_nowhere(
    way: str,
    guarded: FakeServer,
    ztune: Command,
    tmp_path: Path,
    out: Path,
    cache_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token = tmp_path / "token"
    token.write_text(f"{SECRET}\n")
    words = ("--token-file", token) if way == "file" else ()
    if not words:
        monkeypatch.setenv("ZTUNE_TOKEN", SECRET)
    done = ztune("tune", url(guarded.grpc), *DATA, *ZIP, *words, "--out", out)
    assert done.code == 0, done.err
    assert document(out)["server"]["sent"] == 20
    # Nor its path: a run's folder may go to another user, or come from one.
    assert not document(out)["run_config"]["server"]["connection"]
    told_nothing(done, out, SECRET)
    told_nothing(done, cache_home, SECRET)


def test_basic_auth_is_kept_nowhere(
    triton: TritonServer, ztune: Command, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZTUNE_BASIC_AUTH", f"me:{SECRET}")
    done = ztune("tune", url_of(triton, "http"), *DATA, *ZIP, "--out", out)
    assert done.code == 0, done.err
    told_nothing(done, out, SECRET, base64.b64encode(f"me:{SECRET}".encode()).decode())


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (("--endpoint", "triton://127.0.0.1:1"), "put the servers behind one URL"),
        (("--shared-memory=off",), "leave it out"),
    ],
)
def test_removed_options(words: tuple[str, ...], instead: str, ztune: Command, out: Path) -> None:
    done = ztune("tune", "triton://127.0.0.1:1/mini", *DATA, *words, "--out", out)
    assert done.code == 2
    option = words[0].partition("=")[0]
    assert f"ztune tune: error: option {option} was removed: {instead}" in done.err
    assert not out.exists()


def test_removed_settings() -> None:
    url = "triton://127.0.0.1:1/mini"
    with pytest.raises(ConfigError, match=r"^`endpoints` was removed: put the servers behind one"):
        load(url, endpoints=["triton://127.0.0.1:2"])
    with pytest.raises(ConfigError, match=r"^`shared_memory` was removed: leave it out"):
        load(url, shared_memory="off")


def test_a_request_above_the_limit(triton: TritonServer, tune: Tune) -> None:
    before = worked(triton, "image")
    words = ("--losses", "server", "--shots", 8, "--max-request", 0.06)
    says = ("80 images takes 0.0623 MB, more than --max-request 0.06 (use --losses here or fewer",)
    tune(url_of(triton), *words, says=says)
    says = (
        "8 image(s) takes 0.0553 MB, more than --max-request 0.05 (use --images local or a lar",
    )
    tune(url_of(triton), "--max-request", 0.05, says=says)
    # Before any image is encoded: the start's parity asks for two each time.
    assert worked(triton, "image") - before == 4


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_certificates(
    protocol: str,
    triton: TritonServer,
    certificates: Certificates,
    start: Start,
    ztune: Command,
    out: Path,
) -> None:
    target = triton.grpc if protocol == "grpc" else triton.http
    scheme = "tritons" if protocol == "grpc" else "https"
    trusted, key = ("--tls-ca", certificates.authority), certificates.valid.key

    def ask(where: str, *words: object) -> tuple[int, str]:
        asked = ("tune", where, *DATA, *ZIP, *words, "--quiet", "--out", out)
        if protocol == "http":
            done = ztune(*asked)
            return done.code, done.err
        # In a process of its own: gRPC speaks for itself where it was imported before.
        process = start(*asked)
        err = process.communicate(timeout=120)[1]
        return process.returncode, err

    for pair, words, says in (
        (certificates.expired, trusted, "certificate has expired"),
        (certificates.wrong_host, trusted, "TLS failed: "),
        (certificates.valid, (), "TLS failed: "),
        (certificates.valid, ("--tls-ca", key), "invalid file of"),
    ):
        with TlsProxy(target, pair.cert, pair.key) as proxy:
            one_error(*ask(f"{scheme}://{proxy.address}/mini", *words), says, "--tls-ca")
    assert not out.exists()
    with TlsProxy(target, certificates.valid.cert, certificates.valid.key) as proxy:
        code, err = ask(f"{scheme}://{proxy.address}/mini", *trusted)
    assert code == 0, err


@pytest.mark.parametrize("method", ["ogn", "gda", "bar"])
def test_what_losses_alone_do_not_serve(method: str, frugal: str, tune: Tune) -> None:
    line = tune(frugal, "--method", method, says=(f'method "{method}" needs', "does not provide"))
    able = line.rpartition("methods that would work: ")[2].split(", ")
    assert "zip" in able
    assert not {"ogn", "gda", "bar"} & set(able)


def test_auto_runs_zip_on_a_server_of_losses(frugal: str, out: Path, ztune: Command) -> None:
    words = (*DATA, "--method", "auto", "--queries", 20, "--out", out)
    done = ztune("tune", frugal, *words)
    assert done.code == 0, done.err
    assert "auto needs logits, text features, which this runtime does not provide" in done.err
    assert "running zip instead" in done.err
    assert document(out)["method"] == "zip"
    options = ztune("tune", frugal, *words, "--overwrite", "--set", "most_prompts=10")
    assert options.code == 1
    assert 'method "zip" has no setting "most_prompts"' in options.err


def test_auto_needs_no_more_than_logits_of_a_server(
    tmp_path: Path, out: Path, ztune: Command
) -> None:
    words = (*DATA, "--method", "auto", "--queries", 20)
    with TritonServer(export(MINI, tmp_path / "repository", "logits"), args=OPTIONS) as server:
        done = ztune("tune", url_of(server), *words, "--out", out)
    assert done.code == 0, done.err
    assert document(out)["method"] == "auto"
    local = ztune("tune", MINI, *words, "--out", tmp_path / "local")
    assert local.code == 0, local.err
    found, other = (read_artifact(run / "prompt.safetensors") for run in (out, tmp_path / "local"))
    assert isinstance(found, EnsembleArtifact)
    assert isinstance(other, EnsembleArtifact)
    assert (found.mixture.tokens == other.mixture.tokens).all()
    np.testing.assert_allclose(found.head.weight, other.head.weight, rtol=1e-2, atol=1e-2)


def test_text_features_that_are_not_given(frugal: str, tune: Tune) -> None:
    tune(frugal, "--losses", "here", says=("--losses here", "needs text features"))


def test_visual_prompts_are_not_for_servers(triton: TritonServer, tune: Tune) -> None:
    says = ("changed images in every query", "need a local bundle", "methods that would work:")
    tune(url_of(triton), "--method", "bar", says=says)


def test_what_losses_alone_do_serve(
    frugal: str, triton: TritonServer, ztune: Command, tmp_path: Path, out: Path
) -> None:
    words = (*DATA, "--method", "zip", "--queries", 200)
    done = ztune("tune", frugal, *words, "--out", out, "--json")
    assert done.code == 0, done.err
    told = document(out)
    assert told["calls"]["losses"] == "server"
    assert set(told["server"]["capabilities"]) == {"contexts", "features", "loss"}
    assert set(told["validation"]) == {"tuned"}
    # As on a server that gives everything, asked for no more than that.
    whole = tmp_path / "whole"
    other = ztune("tune", url_of(triton), *words, "--losses", "server", "--out", whole, "--json")
    assert other.code == 0, other.err
    prompts = [read_artifact(run / "prompt.safetensors") for run in (out, whole)]
    for prompt in prompts:
        assert isinstance(prompt, ContextArtifact)
    frugally, wholly = prompts
    assert isinstance(frugally, ContextArtifact)
    assert isinstance(wholly, ContextArtifact)
    assert frugally.text_features is None
    assert wholly.text_features is not None
    assert (frugally.context == wholly.context).all()
    assert told["validation"]["tuned"] == document(whole)["validation"]["tuned"]

    # With the bundle at hand, the texts are encoded then.
    scores = []
    packed = tmp_path / "classifier.onnx"
    cache = ("--cache", tmp_path / "cache", "--quiet", "--json")
    of_split = ("--split-file", out / "split.json", *cache)
    for run in (out, whole):
        scores.append(ztune("eval", MINI, "--prompt", run / "prompt.safetensors", *of_split))
    made = ztune("pack", MINI, "--prompt", out / "prompt.safetensors", "--out", packed, "--quiet")
    assert made.code == 0, made.err
    scores.append(ztune("eval", packed, "--split-file", out / "split.json", "--quiet", "--json"))
    for score in scores:
        assert score.code == 0, score.err
    assert len({score.json["accuracy"] for score in scores}) == 1
    everything = ztune(
        "eval", MINI, "--data", FEW_DIGITS, "--split", "all",
        "--prompt", out / "prompt.safetensors", *cache,
    )  # fmt: skip
    assert everything.code == 0, everything.err


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("pack", ("--prompt", "p.safetensors", "--out", "c.onnx")),
        ("predict", (DIGITS / "one",)),
        ("quantize", ("--out", "q", "--precision", "int8")),
        ("compare", ("--data", FEW_DIGITS, "--methods", "zip", "--out", "compared")),
        ("export-triton", ("--out", "again")),
    ],
)
def test_verbs_that_take_no_server(
    verb: str,
    words: tuple[object, ...],
    triton: TritonServer,
    ztune: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = ztune(verb, url_of(triton), *words, "--quiet")
    one_error(done.code, done.err, triton.grpc)
    assert not list(tmp_path.iterdir())
