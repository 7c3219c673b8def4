"""Addresses and connection settings of servers: deadlines, certificates and tokens."""

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
_URL_STARTS = tuple(f"{scheme}:" for scheme in SCHEMES)
_SECURE = ("tritons", "https")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
# Environment variables of secrets; no option takes a secret itself.
TOKEN, BASIC_AUTH = "ZTUNE_TOKEN", "ZTUNE_BASIC_AUTH"
# Hosts that may always receive secrets: HOST or HOST:PORT, comma-separated.
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
        """Whether it is a loopback address."""
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
    """A parsed URL: a server and the models of one bundle on it."""

    endpoint: Endpoint
    name: str
    version: str = ""
    """Empty: the newest."""

    def __str__(self) -> str:
        return f"{self.endpoint}/{self.name}{'/' if self.version else ''}{self.version}"


def is_url(word: Path | str) -> bool:
    """Return whether a word is a URL, valid or not, rather than a folder."""
    return isinstance(word, str) and ("://" in word or word.startswith(_URL_STARTS))


def parse_named_server(word: Path | str | None) -> Endpoint | None:
    """Return the server in a command's URL, which may receive secrets; None for a folder.

    Raises: ConfigError for an invalid address.
    """
    return parse_location(str(word)).endpoint if word and is_url(word) else None


def parse_location(url: str) -> Location:
    """Parse `scheme://host:port/NAME` or `.../NAME/VERSION`.

    Raises: ConfigError naming the part that is wrong.
    """
    endpoint, path = _parse(url)
    parts = path.strip("/").split("/")
    if not 1 <= len(parts) <= 2 or not _NAME.fullmatch(parts[0]):
        raise ConfigError(
            f'no valid model name in "{url}", expected scheme://host:port/NAME or .../NAME/VERSION'
        )
    version = parts[1] if len(parts) == 2 else ""
    if version and not _VERSION.fullmatch(version):
        raise ConfigError(f'"{url}": invalid version "{version}", expected a positive integer')
    return Location(endpoint, parts[0], version)


def _parse(url: str) -> tuple[Endpoint, str]:
    # Checked first, and without quoting the address: no error repeats a secret.
    if "@" in url or "%40" in url:
        raise ConfigError(
            f"user and password are not allowed in an address: put them into {BASIC_AUTH} "
            "(user:password) or a file (`basic_auth_file`)"
        )
    if "?" in url or "#" in url:
        plain = re.split(r"[?#]", url)[0]
        raise ConfigError(
            f'"{plain}…" continues with ? or #, expected scheme://host:port/NAME (put a token into '
            f"{TOKEN} or a file, `token_file`)"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f'invalid address "{url}": {error}') from None
    if "://" not in url or parts.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ConfigError(f'unknown scheme of "{url}", expected one of {known}')
    if not parts.hostname or not port:
        raise ConfigError(f'"{url}" has no host or port, expected {parts.scheme}://host:port/NAME')
    return Endpoint(parts.scheme, parts.hostname, port), parts.path


@dataclass(frozen=True)
class Connection:
    """Connection settings; secrets only as paths of their files."""

    deadline: float = 30.0
    """Seconds for one request."""
    give_up: float = 300.0
    """Seconds without any answer after which a run stops."""
    max_inflight: int = 4
    """Maximum concurrent requests."""
    max_request: float = 64.0
    """Maximum MB of a request's tensors."""
    compression: str = "none"
    tls_ca: str | None = None
    """PEM file of the trusted authorities; None: the system's."""
    tls_cert: str | None = None
    """PEM file of the client certificate, for mutual TLS."""
    tls_key: str | None = None
    token_file: str | None = None
    basic_auth_file: str | None = None
    insecure: bool = False
    """Accept any certificate (https only), and send tokens unencrypted."""
    named: Endpoint | None = None
    """The server in this command's URL, not one from a run's file: it may receive secrets."""

    def __post_init__(self) -> None:
        for name in ("deadline", "give_up"):
            value = getattr(self, name)
            if not 0 < value <= 86_400:
                raise ConfigError(
                    f"`{name}` is {value}, expected seconds, above 0 and at most 86400 (a day)"
                )
        if not 1 <= self.max_inflight <= 256:
            raise ConfigError(f"`max_inflight` is {self.max_inflight}, expected 1 to 256")
        if not 0 < self.max_request <= 2000:
            raise ConfigError(f"`max_request` is {self.max_request}, expected MB, at most 2000")
        if self.compression not in COMPRESSIONS:
            raise ConfigError(
                f'`compression` is "{self.compression}", expected {", ".join(COMPRESSIONS)}'
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError(
                "only one of `tls_cert` and `tls_key` is given, expected both or neither"
            )

    def headers(self, endpoint: Endpoint) -> dict[str, str]:
        """Return the authorization header: bearer token or basic auth, from a file or environment.

        Raises: ConfigError for both, an empty or unreadable file, a secret that would be sent
            unencrypted, and a secret or client key for a server that only a run's file names.
        """
        token = _read_secret(self.token_file, "`token_file`", TOKEN)
        basic = _read_secret(self.basic_auth_file, "`basic_auth_file`", BASIC_AUTH)
        if token and basic:
            raise ConfigError("both a token and basic auth are given, expected only one")
        if (token or basic or self.tls_key is not None) and not self._may_receive_secrets(endpoint):
            raise ConfigError(
                f"no secret is sent to {endpoint}, which only the run's file names: give the URL "
                "again (ztune tune URL --resume RUN, ztune eval RUN --bundle URL), or set "
                f"{TOKEN_HOST}={endpoint.address}"
            )
        if not token and not basic:
            return {}
        if not (endpoint.secure or endpoint.local or self.insecure):
            raise ConfigError(
                f"the token would be sent unencrypted to {endpoint} (use tritons:// or https://, "
                "or `insecure` in a trusted network)"
            )
        if token:
            return {"authorization": f"Bearer {token}"}
        if ":" not in basic:
            raise ConfigError("invalid basic auth, expected user:password")
        return {"authorization": f"Basic {base64.b64encode(basic.encode()).decode()}"}

    def _may_receive_secrets(self, endpoint: Endpoint) -> bool:
        """Return whether the command or the environment names the server."""
        listed = os.environ.get(TOKEN_HOST, "").lower().split(",")
        known = {endpoint.host, endpoint.address, endpoint.address.rpartition(":")[0]}
        return endpoint == self.named or any(one.strip() in known for one in listed)

    def check_files(self) -> None:
        """Check that the certificate files can be read.

        Raises: ConfigError naming the one that cannot.
        """
        for option in ("tls_ca", "tls_cert", "tls_key"):
            path = getattr(self, option)
            if path is not None:
                _read(Path(path), f"`{option}`")

    def ssl_context(self) -> ssl.SSLContext:
        """Return the context of an https connection.

        Raises: ConfigError for a file without a certificate or key.
        """
        try:
            context = ssl.create_default_context(cafile=self.tls_ca)
            if self.tls_cert is not None:
                # Without a password OpenSSL would prompt for one.
                context.load_cert_chain(self.tls_cert, self.tls_key, password="")
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"invalid file of `tls_ca`, `tls_cert` or `tls_key`: {error}"
            ) from None
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def _read_secret(path: str | None, option: str, variable: str) -> str:
    value = os.environ.get(variable, "")
    if path is not None:
        value = _read(Path(path), option, pipe=True).decode(errors="replace")
        if not value.strip():
            raise ConfigError(f'{option} "{path}" is empty')
    value = value.strip()
    # The header contains a token as is, but user and password in base64.
    if not value.isprintable() or (variable == TOKEN and not value.isascii()):
        raise ConfigError(
            f"{option if path else variable} has characters that are not allowed in an HTTP header"
        )
    return value


def _read(path: Path, option: str, *, pipe: bool = False) -> bytes:
    try:
        return read_bytes(path, pipe=pipe)
    except OSError as error:
        raise ConfigError(f'{option} "{path}" cannot be read: {error.strerror or error}') from None
