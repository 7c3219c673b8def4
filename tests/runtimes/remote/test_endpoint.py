"""Addresses of servers, and what is told to them: deadlines, certificates, tokens."""

import base64
import os
import ssl
import threading
from pathlib import Path
from typing import Any

import pytest

from runtimes.remote.endpoint import Connection, Endpoint, parse_location, parse_named_server
from tests.servers.tls import Certificates, make_certificates
from ztune.errors import ConfigError

SECRET = "hunter2"
AWAY = Endpoint("triton", "example.org", 8001)
HERE = Endpoint("triton", "127.0.0.1", 8001)
SECURE = Endpoint("https", "example.org", 443)


@pytest.fixture(autouse=True)
def _no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZTUNE_TOKEN", raising=False)
    monkeypatch.delenv("ZTUNE_BASIC_AUTH", raising=False)
    monkeypatch.delenv("ZTUNE_TOKEN_HOST", raising=False)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.mark.parametrize(
    ("url", "protocol", "secure", "local", "host", "port", "name", "version"),
    [
        ("triton://example.org:8001/mini", "grpc", False, False, "example.org", 8001, "mini", ""),
        ("tritons://h:1/a.b_c-D/12", "grpc", True, False, "h", 1, "a.b_c-D", "12"),
        ("http://127.0.0.1:8000/mini/", "http", False, True, "127.0.0.1", 8000, "mini", ""),
        ("https://localhost:65535/m/1/", "http", True, True, "localhost", 65535, "m", "1"),
        ("http://[::1]:8000/mini", "http", False, True, "::1", 8000, "mini", ""),
        ("triton://[2001:db8::7]:8001/m", "grpc", False, False, "2001:db8::7", 8001, "m", ""),
        ("HTTP://Example.ORG:80/Mini", "http", False, False, "example.org", 80, "Mini", ""),
        ("http://127.9.9.9:80/m", "http", False, True, "127.9.9.9", 80, "m", ""),
    ],
)
def test_what_an_address_means(
    url: str,
    protocol: str,
    secure: bool,
    local: bool,
    host: str,
    port: int,
    name: str,
    version: str,
) -> None:
    location = parse_location(url)
    endpoint = location.endpoint
    assert (endpoint.protocol, endpoint.secure, endpoint.local) == (protocol, secure, local)
    assert (endpoint.host, endpoint.port) == (host, port)
    assert (location.name, location.version) == (name, version)
    # What is told of it is an address again.
    assert parse_location(str(location)) == location
    assert parse_named_server(url) == endpoint


def test_an_ipv6_address_keeps_its_brackets() -> None:
    endpoint = parse_location("triton://[::1]:8001/m").endpoint
    assert endpoint == Endpoint("triton", "::1", 8001)
    assert endpoint.address == "[::1]:8001"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://h:1/m", "expected one of triton://, tritons://, http://, https://"),
        ("localhost:8000/m", "unknown scheme"),
        ("http:h:1/m", "unknown scheme"),
        ("mini", "unknown scheme"),
        ("", "unknown scheme"),
        ("http://h/m", "has no host or port, expected http://host:port/NAME"),
        ("http://:80/m", "has no host or port"),
        ("http://h:0/m", "has no host or port"),
        ("http://h:/m", "has no host or port"),
        ("http://h:65536/m", "invalid address"),
        ("http://h:80a/m", "invalid address"),
        ("http://[::1/m", "invalid address"),
        ("http://h:1", "no valid model name"),
        ("http://h:1/", "no valid model name"),
        ("http://h:1/m//1", "no valid model name"),
        ("http://h:1/-m", "no valid model name"),
        ("http://h:1/../m", "no valid model name"),
        ("http://h:1/a%2Fb", "no valid model name"),
        ("http://h:1/m/1/x", "no valid model name"),
        ("http://h:1/m/0", 'invalid version "0", expected a positive integer'),
        ("http://h:1/m/-1", "expected a positive integer"),
        ("http://h:1/m/latest", "expected a positive integer"),
        ("http://h:1/m/٣", "expected a positive integer"),
        ("http://h:1/m/1.0", "expected a positive integer"),
        ("http://h:1/m?x=1", "continues with [?] or #"),
        ("http://h:1/m#x", "continues with [?] or #"),
    ],
)
def test_what_is_no_address(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse_location(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{SECRET}@h:1/m",
        f"http://{SECRET}@h:1/m",
        f"http://user:pa/{SECRET}@h:1/m",
        f"http://user:{SECRET}/x@h:99999/m",
        f"http://user:{SECRET}@h:no/m",
        f"ftp://user:{SECRET}@h:1/m",
        f"user:{SECRET}@h:1/m",
        f"http://user:{SECRET}@[::1/m",
        f"http://h:1/m?token={SECRET}",
        f"http://h:1/m#{SECRET}",
        f"http://h:no/m?token={SECRET}",
        f"ftp://h/m?token={SECRET}",
    ],
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_location(url)
    assert SECRET not in str(caught.value)
    assert "file" in str(caught.value)  # where it belongs
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"deadline": 0}, "`deadline` is 0, expected seconds"),
        ({"deadline": float("nan")}, "`deadline` is nan"),
        ({"give_up": -1}, "`give_up` is -1"),
        ({"give_up": 86_401}, "at most 86400"),
        ({"max_inflight": 0}, "`max_inflight` is 0, expected 1 to 256"),
        ({"max_inflight": 257}, "`max_inflight` is 257"),
        ({"max_request": 0}, "`max_request` is 0, expected MB, at most 2000"),
        ({"compression": "br"}, '`compression` is "br", expected none, gzip, deflate'),
        ({"tls_cert": "a"}, "only one of `tls_cert` and `tls_key`"),
        ({"tls_key": "a"}, "only one of `tls_cert` and `tls_key`"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Connection(**values)
    Connection(deadline=0.001, give_up=86_400, max_inflight=256, compression="gzip")


def told(endpoint: Endpoint, **settings: Any) -> dict[str, str]:
    """Return what a server is told that the command names."""
    return Connection(**settings, named=endpoint).headers(endpoint)


def test_without_secrets_nothing_is_told() -> None:
    assert told(AWAY) == {}


def test_a_token_from_the_environment_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZTUNE_TOKEN", f" {SECRET}\n")
    assert told(SECURE) == {"authorization": f"Bearer {SECRET}"}
    file = tmp_path / "token"
    file.write_text("other\n")
    assert told(SECURE, token_file=str(file)) == {
        "authorization": "Bearer other"
    }  # what is named counts
    monkeypatch.setenv("ZTUNE_TOKEN", "")
    assert told(AWAY) == {}


def test_basic_auth_from_the_environment_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {"authorization": "Basic " + base64.b64encode(b"me:a:b").decode()}
    monkeypatch.setenv("ZTUNE_BASIC_AUTH", "me:a:b")
    assert told(SECURE) == expected
    monkeypatch.delenv("ZTUNE_BASIC_AUTH")
    (tmp_path / "basic").write_text("me:a:b\n")
    assert told(SECURE, basic_auth_file=str(tmp_path / "basic")) == expected


@pytest.mark.parametrize(
    ("variable", "option", "content", "words"),
    [
        (
            "ZTUNE_TOKEN",
            "token_file",
            b"a b\x00c",
            "has characters that are not allowed in an HTTP header",
        ),
        (
            "ZTUNE_TOKEN",
            "token_file",
            b"line\nline",
            "has characters that are not allowed in an HTTP header",
        ),
        ("ZTUNE_TOKEN", "token_file", b"\x1b[31m", "has characters"),
        ("ZTUNE_TOKEN", "token_file", "straße".encode(), "has characters"),
        ("ZTUNE_TOKEN", "token_file", b"\xff\xfe", "has characters"),
        ("ZTUNE_BASIC_AUTH", "basic_auth_file", b"nobody", "expected user:password"),
        ("ZTUNE_TOKEN", "token_file", b" \n", "is empty"),
        ("ZTUNE_BASIC_AUTH", "basic_auth_file", b"", "is empty"),
    ],
)
def test_secrets_that_cannot_be_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    option: str,
    content: bytes,
    words: str,
) -> None:
    file = tmp_path / "secret"
    file.write_bytes(content)
    named: dict[str, Any] = {option: str(file)}
    with pytest.raises(ConfigError, match=words) as caught:
        told(SECURE, **named)
    text = str(caught.value)
    assert "\n" not in text
    assert not content.strip() or content.strip().decode(errors="replace") not in text
    if b"\x00" in content or words == "is empty":
        return  # no environment holds the first; nothing in it is no secret
    monkeypatch.setenv(variable, content.decode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=words):
        told(SECURE)


def test_two_secrets_are_one_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZTUNE_TOKEN", SECRET)
    (tmp_path / "basic").write_text("a:b")
    with pytest.raises(ConfigError, match="both a token and basic auth are given"):
        told(SECURE, basic_auth_file=str(tmp_path / "basic"))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r'`token_file` ".*nothing" cannot be read: No such'):
        told(SECURE, token_file=missing)
    with pytest.raises(ConfigError, match=r"`tls_ca` .* cannot be read"):
        Connection(tls_ca=missing).check_files()
    with pytest.raises(ConfigError, match=r"`tls_key` .* cannot be read"):
        Connection(tls_cert=__file__, tls_key=missing).check_files()


@pytest.mark.parametrize("variable", ["ZTUNE_TOKEN", "ZTUNE_BASIC_AUTH"])
def test_a_secret_crosses_no_network_in_plain_text(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, f"me:{SECRET}")
    for endpoint in (AWAY, Endpoint("http", "10.0.0.1", 80), Endpoint("http", "::2", 80)):
        with pytest.raises(ConfigError, match="would be sent unencrypted") as caught:
            told(endpoint)
        assert SECRET not in str(caught.value)
        assert told(endpoint, insecure=True)
    for endpoint in (HERE, SECURE, Endpoint("http", "::1", 80), Endpoint("tritons", "h", 1)):
        assert told(endpoint)


@pytest.mark.parametrize("secret", ["token", "basic", "token file", "basic file", "key"])
def test_a_secret_goes_only_where_somebody_says(
    secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {}
    (tmp_path / "file").write_text(f"me:{SECRET}")
    path = str(tmp_path / "file")
    if secret in ("token", "basic"):
        monkeypatch.setenv({"token": "ZTUNE_TOKEN", "basic": "ZTUNE_BASIC_AUTH"}[secret], "a:b")
    elif secret == "key":
        settings = {"tls_cert": path, "tls_key": path}
    else:
        settings = {f"{secret.partition(' ')[0].replace('basic', 'basic_auth')}_file": path}
    others = (Endpoint("https", "example.org", 444), Endpoint("tritons", "example.org", 443))
    for named in (None, *others):
        with pytest.raises(
            ConfigError, match=r"https://example\.org:443, which only the"
        ) as caught:
            Connection(**settings, named=named).headers(SECURE)
        assert "ZTUNE_TOKEN_HOST=example.org:443" in str(caught.value)
        assert SECRET not in str(caught.value)
    assert bool(told(SECURE, **settings)) == (secret != "key")


@pytest.mark.parametrize(
    ("listed", "host", "goes"),
    [
        ("example.org", "example.org", True),
        ("Example.ORG:443", "example.org", True),
        ("other:1, example.org:443 ,", "example.org", True),
        ("example.org:444", "example.org", False),
        ("ample.org", "example.org", False),
        ("example.org.evil.net", "example.org", False),
        ("*", "example.org", False),
        (" , ,", "example.org", False),
        ("https://example.org:443", "example.org", False),
        ("::1", "::1", True),
        ("[::1]", "::1", True),
        ("[::1]:443", "::1", True),
        ("[::1]:444", "::1", False),
    ],
)
def test_the_environment_names_hosts_for_secrets(
    listed: str, host: str, goes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZTUNE_TOKEN", SECRET)
    monkeypatch.setenv("ZTUNE_TOKEN_HOST", listed)
    endpoint = Endpoint("https", host, 443)
    if goes:
        assert Connection().headers(endpoint) == {"authorization": f"Bearer {SECRET}"}
        return
    with pytest.raises(ConfigError, match="which only the run's file names"):
        Connection().headers(endpoint)


def test_what_is_shown_of_settings_holds_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZTUNE_TOKEN", SECRET)
    (tmp_path / "basic").write_text(f"me:{SECRET}")
    connection = Connection(basic_auth_file=str(tmp_path / "basic"))
    for shown in (repr(connection), str(connection), repr(vars(connection))):
        assert SECRET not in shown


def test_certificates_are_checked_by_default(certificates: Certificates) -> None:
    context = Connection(tls_ca=str(certificates.authority)).ssl_context()
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.cert_store_stats()["x509_ca"] == 1  # the one that is named, and no other
    context = Connection(insecure=True).ssl_context()
    assert not context.check_hostname
    assert context.verify_mode is ssl.CERT_NONE


def test_a_client_shows_its_own_certificate(tmp_path: Path, certificates: Certificates) -> None:
    pair = certificates.client
    Connection(tls_cert=str(pair.cert), tls_key=str(pair.key)).ssl_context()
    (tmp_path / "garbage").write_text("garbage")
    other = certificates.stranger
    for cert, key in ((pair.cert, other.key), (pair.cert, tmp_path / "garbage"), (pair.key,) * 2):
        with pytest.raises(ConfigError, match="invalid file of `tls_ca`") as caught:
            Connection(tls_cert=str(cert), tls_key=str(key)).ssl_context()
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="invalid file of"):
        Connection(tls_ca=str(tmp_path / "garbage")).ssl_context()


def test_a_key_behind_a_password_is_refused_and_not_asked_for(
    tmp_path: Path, certificates: Certificates
) -> None:
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    pair = certificates.client
    key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"word"),
        )
    )
    with pytest.raises(ConfigError, match="invalid file of"):
        Connection(tls_cert=str(pair.cert), tls_key=str(locked)).ssl_context()


def test_a_token_may_come_through_a_pipe_and_a_certificate_not(
    tmp_path: Path, in_time: None
) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="not a regular file"):
        Connection(tls_ca=str(pipe)).check_files()
    threading.Thread(target=pipe.write_text, args=(SECRET,), daemon=True).start()
    headers = Connection(token_file=str(pipe), named=SECURE).headers(SECURE)
    assert headers == {"authorization": f"Bearer {SECRET}"}
