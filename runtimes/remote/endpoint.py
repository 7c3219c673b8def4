"""Where a server is and how it is spoken to: addresses, deadlines, certificates and tokens."""

from __future__ import annotations

import base64
import ipaddress
import os
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ztune.errors import ConfigError
from ztune.io.files import read_bytes

SCHEMES = {"triton": "grpc", "tritons": "grpc", "http": "http", "https": "http"}
_BEGINNINGS = tuple(f"{scheme}:" for scheme in SCHEMES)
_SECURE = ("tritons", "https")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
# The environment's names of secrets, which no option takes.
TOKEN, BASIC_AUTH = "ZTUNE_TOKEN", "ZTUNE_BASIC_AUTH"
# And of the hosts that may be told them, whoever names the server: HOST or HOST:PORT, by commas.
TOKEN_HOST = "ZTUNE_TOKEN_HOST"
COMPRESSIONS = ("none", "gzip", "deflate")


@dataclass(frozen=True)
class Endpoint:
    """One server's address."""

    scheme: str
    host: str
    port: int

    @property
    def secure(self) -> bool:
        return self.scheme in _SECURE

    @property
    def protocol(self) -> str:
        """Grpc or http."""
        return SCHEMES[self.scheme]

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def local(self) -> bool:
        """Whether it is this machine's loopback."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"{self.scheme}://{self.address}"


@dataclass(frozen=True)
class Location:
    """What a URL names: a server, and the models of one bundle on it."""

    endpoint: Endpoint
    name: str
    version: str = ""
    """Empty: the newest."""

    def __str__(self) -> str:
        return f"{self.endpoint}/{self.name}{'/' if self.version else ''}{self.version}"


def is_url(word: Path | str) -> bool:
    """Return whether a word means a server, not a folder; the rest of it may be wrong."""
    return isinstance(word, str) and ("://" in word or word.startswith(_BEGINNINGS))


def named_server(word: Path | str | None) -> Endpoint | None:
    """Return the server that a command names, if it does: it may be told secrets.

    Raises: ConfigError for an invalid address.
    """
    return parse_location(str(word)).endpoint if word and is_url(word) else None


def parse_location(url: str) -> Location:
    """Return what `scheme://host:port/NAME` or `.../NAME/VERSION` means.

    Raises: ConfigError naming the part that is wrong.
    """
    endpoint, path = _parsed(url)
    parts = path.strip("/").split("/")
    if not 1 <= len(parts) <= 2 or not _NAME.fullmatch(parts[0]):
        raise ConfigError(
            f'"{url}" names no model, expected scheme://host:port/NAME or .../NAME/VERSION'
        )
    version = parts[1] if len(parts) == 2 else ""
    if version and not _VERSION.fullmatch(version):
        raise ConfigError(f'"{url}": the version "{version}" is no number from 1 on')
    return Location(endpoint, parts[0], version)


def _parsed(url: str) -> tuple[Endpoint, str]:
    # Before anything else is looked at, and without the address: no error repeats a secret.
    if "@" in url or "%40" in url:
        raise ConfigError(
            f"an address holds no user or password: put them into {BASIC_AUTH} (user:password) or "
            "a file (`basic_auth_file`)"
        )
    if "?" in url or "#" in url:
        plain = re.split(r"[?#]", url)[0]
        raise ConfigError(
            f'"{plain}…" goes on with ? or #, expected scheme://host:port/NAME (a token belongs '
            f"into {TOKEN} or a file, `token_file`)"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f'"{url}" is no address ({error})') from None
    if "://" not in url or parts.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ConfigError(f'"{url}" begins with none of {known}')
    if not parts.hostname or not port:
        raise ConfigError(f'"{url}" lacks host or port, expected {parts.scheme}://host:port/NAME')
    return Endpoint(parts.scheme, parts.hostname, port), parts.path


@dataclass(frozen=True)
class Connection:
    """How a server is spoken to; paths of files with secrets, never the secrets."""

    deadline: float = 30.0
    """Seconds that one request may take."""
    give_up: float = 300.0
    """Seconds without any answer after which a run stops."""
    max_inflight: int = 4
    """Requests on their way at once."""
    max_request: float = 64.0
    """MB of a request's tensors, at most."""
    compression: str = "none"
    tls_ca: str | None = None
    """PEM file of the authorities that certificates are checked by; None: the system's."""
    tls_cert: str | None = None
    """PEM file of the client's own certificate, for mutual TLS."""
    tls_key: str | None = None
    token_file: str | None = None
    basic_auth_file: str | None = None
    insecure: bool = False
    """Accept any certificate (https alone), and send tokens unencrypted."""
    named: Endpoint | None = None
    """The server that this very command names, and not a run's file: it may be told secrets."""

    def __post_init__(self) -> None:
        for name in ("deadline", "give_up"):
            value = getattr(self, name)
            if not 0 < value <= 86_400:
                raise ConfigError(f"`{name}` is {value}, expected seconds, at most a day")
        if not 1 <= self.max_inflight <= 256:
            raise ConfigError(f"`max_inflight` is {self.max_inflight}, expected 1 to 256")
        if not 0 < self.max_request <= 2000:
            raise ConfigError(f"`max_request` is {self.max_request}, expected MB, at most 2000")
        if self.compression not in COMPRESSIONS:
            raise ConfigError(
                f'`compression` is "{self.compression}", expected {", ".join(COMPRESSIONS)}'
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("`tls_cert` and `tls_key` belong together, one of them is missing")

    def headers(self, endpoint: Endpoint) -> dict[str, str]:
        """Return what authorises a request: a bearer token or basic auth, from file or environment.

        Raises: ConfigError for two of them, an empty or unreadable file, a secret that would cross
            a network unencrypted, and a secret or a client's key for a server that nobody named.
        """
        token = _secret(self.token_file, "`token_file`", TOKEN)
        basic = _secret(self.basic_auth_file, "`basic_auth_file`", BASIC_AUTH)
        if token and basic:
            raise ConfigError("both a token and basic auth are given, expected one of them")
        if (token or basic or self.tls_key is not None) and not self._may_be_told(endpoint):
            raise ConfigError(
                f"{endpoint} is named by the run's file alone, and a secret goes only where the "
                "command says: give the URL again (ztune tune URL --resume RUN, ztune eval RUN "
                f"--bundle URL), or set {TOKEN_HOST}={endpoint.address}"
            )
        if not token and not basic:
            return {}
        if not (endpoint.secure or endpoint.local or self.insecure):
            raise ConfigError(
                f"the token would cross the network unencrypted to {endpoint} (use tritons:// or "
                "https://, or `insecure` where the network itself is safe)"
            )
        if token:
            return {"authorization": f"Bearer {token}"}
        if ":" not in basic:
            raise ConfigError("basic auth is not of the form user:password")
        return {"authorization": f"Basic {base64.b64encode(basic.encode()).decode()}"}

    def _may_be_told(self, endpoint: Endpoint) -> bool:
        """Return whether the command or the environment names a server, so that it gets secrets."""
        listed = os.environ.get(TOKEN_HOST, "").lower().split(",")
        known = {endpoint.host, endpoint.address, endpoint.address.rpartition(":")[0]}
        return endpoint == self.named or any(one.strip() in known for one in listed)

    def check_files(self) -> None:
        """See that the files of certificates can be read.

        Raises: ConfigError naming the one that cannot.
        """
        for option in ("tls_ca", "tls_cert", "tls_key"):
            path = getattr(self, option)
            if path is not None:
                _read(Path(path), f"`{option}`")

    def ssl_context(self) -> ssl.SSLContext:
        """Return the context of an https connection.

        Raises: ConfigError for a file that holds no certificate or key.
        """
        try:
            context = ssl.create_default_context(cafile=self.tls_ca)
            if self.tls_cert is not None:
                # Without a password OpenSSL asks a person, who may not be there.
                context.load_cert_chain(self.tls_cert, self.tls_key, password="")
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"the files of `tls_ca`, `tls_cert` and `tls_key` cannot be used ({error})"
            ) from None
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def _secret(path: str | None, option: str, variable: str) -> str:
    value = os.environ.get(variable, "")
    if path is not None:
        value = _read(Path(path), option, pipe=True).decode(errors="replace")
        if not value.strip():
            raise ConfigError(f'{option} "{path}" is empty')
    value = value.strip()
    # A token stands in the header as it is, user and password in base64.
    if not value.isprintable() or (variable == TOKEN and not value.isascii()):
        raise ConfigError(f"{option if path else variable} holds characters that no header takes")
    return value


def _read(path: Path, option: str, *, pipe: bool = False) -> bytes:
    try:
        return read_bytes(path, pipe=pipe)
    except OSError as error:
        raise ConfigError(f'{option} "{path}" cannot be read ({error.strerror or error})') from None
