"""Who is told a secret when a run goes on or is scored: servers that a person named, no other.

A run's folder may come from another user, and with it the addresses in its run.json.
"""

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runtimes.bundle import load_bundle
from tests.conftest import FEW_DIGITS, MINI, Command, Result
from tests.servers.bundles import models_of
from tests.servers.fake import FailedError, FakeModel, FakeServer
from tests.servers.tls import TlsProxy, make_certificates
from ztune.cli.main import main

pytestmark = pytest.mark.usefixtures("quick_figures")

grpc = pytest.importorskip("grpc")

SECRET = "s3cr3t-t0k3n"
BEARER = f"Bearer {SECRET}"
NO_SECRETS = ("ZTUNE_TOKEN", "ZTUNE_BASIC_AUTH", "ZTUNE_TOKEN_HOST")


@pytest.fixture(scope="module", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what the person at this machine has set and cached out of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache-home")))
        for name in NO_SECRETS:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def models() -> dict[str, FakeModel]:
    return models_of(load_bundle(MINI))


@pytest.fixture(scope="module")
def home(models: dict[str, FakeModel]) -> Iterator[FakeServer]:
    """The server that runs began at; it wants the token."""
    with FakeServer(models, token=SECRET) as server:
        yield server


@pytest.fixture
def strange(models: dict[str, FakeModel]) -> Iterator[FakeServer]:
    """Another user's server, which takes whatever it gets."""
    with FakeServer(models) as server:
        yield server


def url_of(server: FakeServer) -> str:
    return f"triton://{server.grpc}/mini"


@dataclass(frozen=True)
class Runs:
    """Folders to copy: a run that was stopped, and one that is finished."""

    stopped: Path
    finished: Path


@pytest.fixture(scope="module")
def started(home: FakeServer, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("started")
    runs = Runs(folder / "stopped", folder / "finished")
    common = ["tune", url_of(home), "--data", str(FEW_DIGITS), "--shots", "4", "--quiet"]
    common += ["--method", "zip", "--queries", "60"]
    left = [4]

    def stop(request: Any, honest: Any) -> Any:
        if request.model_name == "mini_prompt":
            left[0] -= 1
        if left[0] < 0:
            raise FailedError(grpc.StatusCode.PERMISSION_DENIED, "no more")
        return honest

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZTUNE_TOKEN", SECRET)
        assert main([*common, "--out", str(runs.finished)]) == 0
        home.hook = stop
        assert main([*common, "--out", str(runs.stopped)]) == 1
        home.hook = None
    assert read(runs.stopped)["status"] == "running"
    return runs


def read(run: Path) -> dict[str, Any]:
    value = json.loads((run / "run.json").read_text())
    assert isinstance(value, dict)
    return value


@dataclass(frozen=True)
class Taken:
    """A run that came from another user, and the two commands that reach its server."""

    ztune: Command
    stopped: Path
    finished: Path

    def edit(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change what both runs say that they were asked."""
        for run in (self.stopped, self.finished):
            document = read(run)
            change(document["run_config"])
            (run / "run.json").write_text(json.dumps(document))

    def move_to(self, server: FakeServer) -> None:
        self.edit(lambda request: request.update(bundle=url_of(server)))

    def resume(self, *words: object, url: str | None = None) -> Result:
        return self.ztune("tune", *([url] if url else []), "--resume", self.stopped, *words)

    def score(self, *words: object, url: str | None = None) -> Result:
        return self.ztune("eval", self.finished, *(["--bundle", url] if url else []), *words)

    def ask(self, verb: str, *words: object, url: str | None = None) -> Result:
        return {"tune": self.resume, "eval": self.score}[verb](*words, url=url)


@pytest.fixture
def taken(started: Runs, ztune: Command, tmp_path: Path) -> Taken:
    runs = Taken(ztune, tmp_path / "stopped", tmp_path / "finished")
    shutil.copytree(started.stopped, runs.stopped)
    shutil.copytree(started.finished, runs.finished)
    return runs


def refused(done: Result, *parts: str) -> None:
    """See that a command said one line, with these words and without the secret."""
    assert done.code == 1, done.err
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.err
    for part in parts:
        assert part in errors[0], errors[0]
    assert SECRET not in done.err


@pytest.fixture(params=["ZTUNE_TOKEN", "ZTUNE_BASIC_AUTH", "--token-file", "--basic-auth-file"])
def given(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[object, ...]:
    """Give a secret in one of its ways; return the words for the command line."""
    if request.param.startswith("ZTUNE"):
        monkeypatch.setenv(request.param, f"me:{SECRET}")
        return ()
    (tmp_path / "secret").write_text(f"me:{SECRET}")
    return (request.param, tmp_path / "secret")


@pytest.mark.parametrize("verb", ["tune", "eval"])
def test_a_host_in_a_run_s_file_is_told_no_secret(
    verb: str, given: tuple[object, ...], taken: Taken, strange: FakeServer
) -> None:
    taken.move_to(strange)
    done = taken.ask(verb, *given)
    host = f"ZTUNE_TOKEN_HOST={strange.grpc}"
    refused(done, f"triton://{strange.grpc}, which only the run's file names", host, "--bundle URL")
    assert strange.calls == {}
    # Where a person says so it goes there.
    assert taken.ask(verb, *given, url=url_of(strange)).code == 0
    assert len(strange.told) == 1


@pytest.mark.parametrize("verb", ["tune", "eval"])
def test_the_run_s_own_server_is_named_again(
    verb: str, taken: Taken, home: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(taken.ask(verb), "no valid token")  # asked without any secret, as before
    monkeypatch.setenv("ZTUNE_TOKEN", SECRET)
    refused(taken.ask(verb), f"triton://{home.grpc}, which only the run's file names")
    monkeypatch.setenv("ZTUNE_TOKEN_HOST", "elsewhere.example")
    refused(taken.ask(verb), "which only the run's file names")
    done = taken.ask(verb, url=url_of(home))
    assert done.code == 0, done.err


@pytest.mark.parametrize("named", [True, False])
def test_the_command_to_go_on_with_has_the_url_that_was_named(
    named: bool, taken: Taken, strange: FakeServer
) -> None:
    def refuse(request: Any, honest: Any) -> Any:
        if request.model_name == "mini_prompt":
            asked.append(request)
            if len(asked) > 2:  # those of parity, at the start
                raise FailedError(grpc.StatusCode.PERMISSION_DENIED, "no more")
        return honest

    asked: list[Any] = []
    taken.move_to(strange)
    strange.hook = refuse
    url = url_of(strange) if named else None
    # A file's URL is not put into a person's mouth.
    words = f"{url} --resume" if named else "--resume"
    refused(taken.resume(url=url), f"resume with: ztune tune {words} {taken.stopped}")


@pytest.mark.parametrize("verb", ["tune", "eval"])
@pytest.mark.parametrize("listed", ["{}", "127.0.0.1", "elsewhere.example, {}"])
def test_the_environment_names_the_host(
    verb: str, listed: str, taken: Taken, home: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZTUNE_TOKEN", SECRET)
    monkeypatch.setenv("ZTUNE_TOKEN_HOST", listed.format(home.grpc))
    done = taken.ask(verb)
    assert done.code == 0, done.err
    assert home.told == {BEARER}


@pytest.mark.parametrize("verb", ["tune", "eval"])
def test_without_secrets_all_is_as_before(verb: str, taken: Taken, strange: FakeServer) -> None:
    # As versions wrote it that kept certificates; these files are not there any more.
    files = {name: f"/nowhere/{name}.pem" for name in ("tls_ca", "tls_cert", "tls_key")}
    taken.move_to(strange)
    taken.edit(lambda request: request.update(server={"connection": {**files, "deadline": 20}}))
    done = taken.ask(verb)
    assert done.code == 0, done.err
    assert strange.told == set()
    assert strange.calls["ModelInfer"] > 0


@pytest.mark.parametrize("verb", ["tune", "eval"])
def test_removed_settings_in_a_run_s_file_are_left_out(
    verb: str,
    taken: Taken,
    home: FakeServer,
    strange: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ZTUNE_TOKEN", SECRET)
    own = {"endpoints": [f"triton://{strange.grpc}"], "connection": {"shared_memory": "on"}}
    taken.edit(lambda request: request.update(server=own))
    done = taken.ask(verb, url=url_of(home))
    assert done.code == 0, done.err
    assert strange.calls == {}


@pytest.mark.parametrize("verb", ["tune", "eval"])
def test_a_run_s_file_names_nobody(
    verb: str, taken: Taken, strange: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZTUNE_TOKEN", SECRET)
    taken.move_to(strange)
    for named in ([f"triton://{strange.grpc}"], None, [["triton", "127.0.0.1", 1]]):
        own = {"server": {"connection": {"named": named}}}
        taken.edit(functools.partial(dict.update, **own))
        assert taken.ask(verb).code == 1
    assert strange.calls == {}


@pytest.mark.parametrize("verb", ["tune", "eval"])
def test_a_run_s_file_says_not_whose_certificates_are_trusted(
    verb: str, taken: Taken, strange: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_certificates(tmp_path / "certificates")
    monkeypatch.setenv("ZTUNE_TOKEN", SECRET)
    with TlsProxy(strange.grpc, made.valid.cert, made.valid.key) as proxy:
        url = f"tritons://{proxy.address}/mini"
        own = {"connection": {"tls_ca": str(made.authority)}}
        taken.edit(lambda request: request.update(bundle=url, server=own))
        run = {"tune": taken.stopped, "eval": taken.finished}[verb]
        words = {"tune": ["tune", url, "--resume", str(run)], "eval": ["eval", str(run)]}[verb]
        words += ["--bundle", url] if verb == "eval" else []

        def ask(*more: str) -> Result:
            # In processes of their own: gRPC speaks for itself where it was imported before.
            command = [sys.executable, "-m", "ztune.cli.main", *words, "--quiet", *more]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            return Result(done.returncode, done.stdout, done.stderr)

        refused(ask("--give-up", "1"), "TLS failed", "--tls-ca", "runs do not save them")
        assert strange.told == set()
        done = ask("--tls-ca", str(made.authority))
        assert done.code == 0, done.err
    assert strange.told == {BEARER}


def test_a_run_keeps_no_files_of_certificates(
    home: FakeServer, ztune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_certificates(tmp_path / "certificates")
    monkeypatch.setenv("ZTUNE_TOKEN", SECRET)
    out = tmp_path / "run"
    done = ztune(
        "tune", url_of(home), "--data", FEW_DIGITS, "--shots", 4, "--method", "gda", "--out", out,
        "--tls-ca", made.authority, "--tls-cert", made.client.cert, "--tls-key", made.client.key,
        "--deadline", 20,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert read(out)["run_config"]["server"] == {"connection": {"deadline": 20.0}}
