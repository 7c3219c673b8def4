"""Certificates, good and bad ones, and a proxy that puts TLS before a server without it."""

import contextlib
import datetime
import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

import trustme

from tests.servers.proxy import Proxy, Relay


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, both PEM files."""

    cert: Path
    key: Path


@dataclass(frozen=True)
class Certificates:
    """What one authority issued, for 127.0.0.1 and localhost where not said otherwise."""

    authority: Path
    valid: Pair
    expired: Pair
    wrong_host: Pair
    """For other.example."""
    client: Pair
    stranger: Pair
    """A client's, by an authority that no server trusts."""
    strange_authority: Path


def make_certificates(folder: Path) -> Certificates:
    """Issue certificates and write them to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    ours, other = trustme.CA(), trustme.CA()
    here = ("127.0.0.1", "localhost")
    past = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)

    def authority(ca: trustme.CA, name: str) -> Path:
        path = folder / f"{name}.pem"
        ca.cert_pem.write_to_path(str(path))
        return path

    def pair(issued: trustme.LeafCert, name: str) -> Pair:
        cert, key = folder / f"{name}.pem", folder / f"{name}.key"
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))
        return Pair(cert, key)

    return Certificates(
        authority=authority(ours, "authority"),
        valid=pair(ours.issue_cert(*here), "valid"),
        expired=pair(ours.issue_cert(*here, not_after=past), "expired"),
        wrong_host=pair(ours.issue_cert("other.example"), "wrong-host"),
        client=pair(ours.issue_cert("client@example.org"), "client"),
        stranger=pair(other.issue_cert("client@example.org"), "stranger"),
        strange_authority=authority(other, "strange-authority"),
    )


class TlsRelay(Relay):
    """A connection with TLS on the client's side only."""

    def __init__(self, proxy: "TlsProxy", client: socket.socket, server: socket.socket) -> None:
        super().__init__(proxy, client, server)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = proxy.context.wrap_bio(self._in, self._out, server_side=True)
        self._shaken = False
        self._early = b""
        """What the server said before the client could read it; gRPC's begins unasked."""

    def from_client(self, data: bytes) -> None:
        self._in.write(data)
        try:
            if not self._shaken:
                self._tls.do_handshake()
                self._shaken = True
                self.proxy.count("handshakes")
                self._tls.write(self._early)
            while plain := self._tls.read(1 << 16):
                self.upward += plain
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.client_ended = time.monotonic()
        except ssl.SSLError:
            self.proxy.count("refused_handshakes" if not self._shaken else "broken")
            self.closing = True  # once the alert is out
        self.downward += self._out.read()

    def from_server(self, data: bytes) -> None:
        if not self._shaken:
            self._early += data
            return
        self._tls.write(data)
        self.downward += self._out.read()

    def server_ended(self) -> None:
        with contextlib.suppress(ssl.SSLError):  # raised until the client says goodbye, too
            self._tls.unwrap()
        self.downward += self._out.read()


class TlsProxy(Proxy):
    """A proxy that ends TLS (for HTTP/2 and HTTP/1.1) and carries the plain bytes to its target.

    With `client_ca` a client must show a certificate of that authority.
    """

    def __init__(self, target: str, cert: Path, key: Path, client_ca: Path | None = None) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(cert, key)
        self.context.set_alpn_protocols(["h2", "http/1.1"])
        if client_ca is not None:
            self.context.load_verify_locations(client_ca)
            self.context.verify_mode = ssl.CERT_REQUIRED
        super().__init__(target)

    def relay(self, client: socket.socket, server: socket.socket) -> Relay:
        return TlsRelay(self, client, server)
