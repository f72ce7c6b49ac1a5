"""Who may talk to the server, and how the channel is protected.

A channel is protected by TLS; with mutual TLS a client shows a certificate of its own. A client is
known by a key, of which the server keeps the SHA-256 alone: a key has 256 random bits, so nothing
is gained by a slow hash. Certificates and keys are files, and a changed file is taken without a
restart; one that cannot be used is not, and what was there before stays.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import grpc

from service.errors import InputError, ServerError

logger = logging.getLogger(__name__)

_CHECK_EVERY_S: Final = 1.0
_HEALTH: Final = "/grpc.health.v1.Health/"
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST: Final = re.compile(r"[0-9A-Fa-f]{64}")
_ROLES: Final = {"client": False, "admin": True}
# what OpenSSL says of a key that is not the certificate's: the last, of one of another algorithm
_MISMATCHES: Final = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}
_HOW_TO_SEND: Final = (
    "send it in the call's metadata as `authorization: Bearer KEY`, `x-api-key: KEY` or "
    "`x-goog-api-key: KEY`"
)

# time of change of the content (ns), of the file's entry (ns), size (bytes); None: not there
_Stamp = tuple[int, int, int] | None


@dataclass(frozen=True)
class Client:
    """Who sent a key that is known."""

    name: str
    is_admin: bool


current_client: ContextVar[Client | None] = ContextVar("current_client", default=None)
"""Who makes the call that is being handled; None where no keys are set.

gRPC runs a call's interceptors and its handler, if that is a coroutine or an async generator, in
one context of the call's own. A plain function runs on a thread outside of it and sees None.
"""


def server_credentials(
    certificate: Path, key: Path, *, client_ca: Path | None = None
) -> grpc.ServerCredentials:
    """Protect a port by TLS; changed files are taken for connections that come after the change.

    Args:
        certificate: PEM, the server's certificate and then those that lead to its authority.
        key: PEM, the certificate's private key, without a passphrase.
        client_ca: PEM, the authorities of which a client's certificate must come; without it
            clients need none.

    Raises:
        ServerError: a file is missing or cannot be used.
    """
    files = _TlsFiles(certificate, key, client_ca)
    watch = _TlsWatch(files)
    return grpc.dynamic_ssl_server_credentials(
        watch.initial, watch.fetch, require_client_authentication=client_ca is not None
    )


@dataclass(frozen=True)
class _TlsFiles:
    certificate: Path
    key: Path
    client_ca: Path | None

    def stamps(self) -> tuple[_Stamp, ...]:
        return tuple(_stamp(path) for path in (self.certificate, self.key, self.client_ca) if path)

    def load(self) -> grpc.ServerCertificateConfiguration:
        """Read the files and check that they fit, which gRPC would find out at a handshake.

        Raises:
            ServerError: a file is missing or cannot be used.
        """
        before = self.stamps()
        chain = _read_certificates(self.certificate, "certificate")
        authorities = _read_certificates(self.client_ca, "client CA") if self.client_ca else None
        key = _read_tls(self.key, "private key")
        self._check_pair()
        if self.stamps() != before:  # what was checked may not be what was read
            raise ServerError("the TLS files changed while they were read; try again")
        return grpc.ssl_server_certificate_configuration([(key, chain)], authorities)

    def _check_pair(self) -> None:
        def refuse_passphrase() -> NoReturn:  # or OpenSSL asks for it at the terminal
            raise ServerError(
                f"the TLS private key {self.key} has a passphrase; "
                "remove it with: openssl pkey -in KEY -out KEY_WITHOUT_PASSPHRASE"
            )

        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                self.certificate, self.key, password=refuse_passphrase
            )
        except ssl.SSLError as error:
            if error.reason in _MISMATCHES:
                raise ServerError(
                    f"the TLS private key {self.key} is not that of the certificate "
                    f"{self.certificate}; give the two that were made together, "
                    "the server's own certificate first in its file"
                ) from error
            raise ServerError(
                f"the TLS private key {self.key} cannot be used with the certificate "
                f"{self.certificate} ({error}); expected a PEM file with "
                "-----BEGIN PRIVATE KEY-----"
            ) from error
        except OSError as error:
            raise ServerError(f"cannot read the TLS files ({error}); try again") from error


class _TlsWatch:
    """What gRPC asks before every handshake, from threads of its own."""

    def __init__(self, files: _TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._seen = files.stamps()
        self.initial = files.load()

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """What to use from now on; None: what is in use.

        A change that cannot be used is warned of once: it is not read again until the next change.
        """
        with self._lock:
            stamps = self._files.stamps()
            if stamps == self._seen:
                return None
            self._seen = stamps
            try:
                changed = self._files.load()
            except ServerError as error:
                logger.warning("%s; the TLS files from before stay in use", error)
                return None
        logger.info("changed TLS files are taken: %s", self._files.certificate)
        return changed


def _read_certificates(path: Path, what: str) -> bytes:
    content = _read_tls(path, what)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cafile=path)
    except OSError as error:  # of which ssl.SSLError is one
        raise ServerError(
            f"the TLS {what} {path} holds no certificate that can be read ({error}); "
            "expected a PEM file with -----BEGIN CERTIFICATE-----"
        ) from error
    return content


def _read_tls(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ServerError(
            f"cannot read the TLS {what} {path} ({error.strerror}); "
            "give a PEM file that the server's user may read"
        ) from error


def _stamp(path: Path) -> _Stamp:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size


class ApiKeys:
    """The keys of a file, one client a line: `NAME ROLE SHA256HEX`; `#` begins a comment.

    A changed file is taken within a second. One that cannot be used is warned of once, and the keys
    from before stay.

    Args:
        path: the file; `voxgate keys add` writes it.
        clock: seconds that only go up.

    Raises:
        ServerError: the file is missing, or a line of it is not of this form.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._checked_s = clock()
        self._seen = _stamp(path)
        self._clients = _read_clients(path)

    def find(self, key: str) -> Client | None:
        """Whose key this is; the time it takes tells nothing about the keys of the file."""
        self._refresh()
        digest = _digest(key)
        found = None
        for known, client in self._clients.items():
            if hmac.compare_digest(known, digest):
                found = client
        return found

    def _refresh(self) -> None:
        now_s = self._clock()
        if now_s - self._checked_s < _CHECK_EVERY_S:
            return
        self._checked_s = now_s
        stamp = _stamp(self._path)
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._clients = _read_clients(self._path)
        except ServerError as error:
            logger.warning("%s; the keys from before stay in use", error)
        else:
            logger.info("changed keys are taken: %d in %s", len(self._clients), self._path)


def new_key() -> str:
    """A key that cannot be guessed: 256 random bits in letters that every header takes."""
    return secrets.token_urlsafe(32)


def key_line(name: str, key: str, *, is_admin: bool) -> str:
    """The line of a key file that makes a key known, without its line end.

    Raises:
        InputError: the name is not of letters, digits and `.-_`, or too long.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot name a client; expected 1 to 64 letters (a-z, A-Z), digits, "
            "dots, hyphens or underscores"
        )
    return f"{name} {'admin' if is_admin else 'client'} {_digest(key)}"


def add_key(path: Path, name: str, *, is_admin: bool) -> str:
    """Make a key, append its line to a file, which its owner alone may read if it is new.

    Returns:
        The key, which is kept nowhere.

    Raises:
        InputError: the name cannot be used or exists, or the file cannot be written.
        ServerError: the file is there, but is no key file.
    """
    key = new_key()
    line = key_line(name, key, is_admin=is_admin)
    clients = _read_clients(path) if path.exists() else {}
    if any(client.name == name for client in clients.values()):
        raise InputError(
            f"{path} has a key of {name} already; take another name, or remove that line first"
        )
    try:
        path.touch(mode=0o600)
        is_open = not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n" if is_open else f"{line}\n")
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror}); give a file in a folder that you may write to"
        ) from error
    return key


def _read_clients(path: Path) -> dict[str, Client]:
    """The clients of a key file, by the digest of their key."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ServerError(
            f"cannot read the key file {path} ({error}); "
            f"make one with: voxgate keys add NAME --file {path}"
        ) from error
    clients: dict[str, Client] = {}
    for number, line in enumerate(lines, start=1):
        fields = line.partition("#")[0].split()
        if not fields:
            continue
        digest, client = _parse(fields, where=f"{path}, line {number}")
        if digest in clients or any(c.name == client.name for c in clients.values()):
            raise ServerError(
                f"{path}, line {number}: {client.name} or its key is there twice; remove one line"
            )
        clients[digest] = client
    return clients


def _parse(fields: list[str], *, where: str) -> tuple[str, Client]:
    match fields:
        case [name, role, digest] if (
            _NAME.fullmatch(name) and role in _ROLES and _DIGEST.fullmatch(digest)
        ):
            return digest.lower(), Client(name, _ROLES[role])
    raise ServerError(  # what is there may be a key: it goes into no log
        f"{where}: expected NAME ROLE SHA256HEX, where ROLE is client or admin and SHA256HEX the "
        "64 digits of the key's SHA-256; `voxgate keys add` writes such lines"
    )


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def key_of(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """The key in a call's metadata: of `authorization`, else `x-api-key`, else `x-goog-api-key`."""
    values: dict[str, str] = {}
    for name, value in metadata:
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        values.setdefault(name.lower(), text.strip())
    scheme, _, bearer = values.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and bearer.strip():
        return bearer.strip()
    return values.get("x-api-key") or values.get("x-goog-api-key") or None


class KeyInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Lets calls pass that carry a known key, and those that ask for the server's health.

    A call that is refused ends UNAUTHENTICATED, also one of a method that does not exist.
    """

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Give the method's own handler to who may call it, and a refusal to all others."""
        handler = await continuation(handler_call_details)
        if handler_call_details.method.startswith(_HEALTH):
            return handler
        key = key_of(handler_call_details.invocation_metadata or ())
        if key is None:
            return _refusal(f"this server needs a key and none was sent; {_HOW_TO_SEND}")
        client = self._keys.find(key)
        if client is None:
            return _refusal(f"the key that was sent is not known to this server; {_HOW_TO_SEND}")
        current_client.set(client)
        return handler


def _refusal(reason: str) -> grpc.RpcMethodHandler:
    """A handler that ends a call of any kind before its request is read, however large that is."""

    async def refuse(_: object, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, reason)
        yield  # as the handler of a stream does

    return grpc.stream_stream_rpc_method_handler(refuse)
