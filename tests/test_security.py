"""Real certificates, a real server, real clients: who may talk to it, and how it is protected."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import itertools
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from service.client import Server, check_health, list_models
from service.errors import InputError, ServerError
from service.security import (
    ApiKeys,
    Client,
    KeyInterceptor,
    add_key,
    current_client,
    key_line,
    key_of,
    new_key,
    server_credentials,
)

Metadata = tuple[tuple[str, str], ...]

_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
_NEW_KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
_TIMES = itertools.count(1_700_000_000)


def _who() -> bytes:
    client = current_client.get()
    return b"nobody" if client is None else f"{client.name} {client.is_admin}".encode()


async def _answer_one(request: bytes | AsyncIterator[bytes], _: object) -> bytes:
    if not isinstance(request, bytes):
        assert [message async for message in request] == [b"a", b"b"]
    await asyncio.sleep(0)
    return _who()


async def _answer_many(request: bytes | AsyncIterator[bytes], _: object) -> AsyncIterator[bytes]:
    yield _who()
    if not isinstance(request, bytes):
        assert [message async for message in request] == [b"a", b"b"]
    await asyncio.sleep(0)
    yield _who()


def _echo() -> grpc.GenericRpcHandler:
    """A service whose methods, one of each kind, answer who calls."""
    methods = {
        kind: getattr(grpc, f"{kind}_rpc_method_handler")(
            _answer_many if kind.endswith("stream") else _answer_one
        )
        for kind in _KINDS
    }
    return grpc.method_handlers_generic_handler("test.Echo", methods)


async def _call(channel: grpc.aio.Channel, kind: str, metadata: Metadata = ()) -> list[bytes]:
    method = getattr(channel, kind)(f"/test.Echo/{kind}")
    request = iter([b"a", b"b"]) if kind.startswith("stream") else b"a"
    call = method(request, metadata=metadata, timeout=20)
    if kind.endswith("stream"):
        return [answer async for answer in call]
    return [await call]


async def _refusal(address: str, kind: str, metadata: Metadata = ()) -> tuple[grpc.StatusCode, str]:
    """How a call over plaintext ends that a server refuses.

    By grpc's blocking client: that of asyncio at times gives INTERNAL for the status of a stream
    that the server ends while the client writes.
    """

    def call() -> tuple[grpc.StatusCode, str]:
        with grpc.insecure_channel(address) as channel:
            method = getattr(channel, kind)(f"/test.Echo/{kind}")
            request = iter([b"a", b"b"]) if kind.startswith("stream") else b"a"
            with pytest.raises(grpc.RpcError) as caught:
                list(method(request, metadata=metadata, timeout=20))
            return caught.value.code(), caught.value.details()

    return await asyncio.to_thread(call)


@asynccontextmanager
async def _serving(
    *, keys: ApiKeys | None = None, credentials: grpc.ServerCredentials | None = None
) -> AsyncIterator[str]:
    """A server with the echo service and health; gives its address."""
    server = grpc.aio.server(interceptors=[KeyInterceptor(keys)] if keys else [])
    server.add_generic_rpc_handlers([_echo()])
    healths = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healths, server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    await healths.set("", health_pb2.HealthCheckResponse.SERVING)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def _with_plaintext(
    keys: ApiKeys, check: Callable[[grpc.aio.Channel], Awaitable[None]]
) -> None:
    async with _serving(keys=keys) as address, grpc.aio.insecure_channel(address) as channel:
        await check(channel)


# --- TLS ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    certificate: Path
    key: Path

    def copy(self, to: Pair) -> None:
        shutil.copy(self.key, to.key)
        shutil.copy(self.certificate, to.certificate)


def _openssl(folder: Path, command: str) -> None:
    subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)


def _make_pair(folder: Path, name: str) -> Pair:
    """A certificate of localhost that is its own authority."""
    names = f"-subj /CN={name} -addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    new_key_options = f"{_NEW_KEY} -keyout {name}.key"
    _openssl(folder, f"req -x509 {new_key_options} {names} -days 2 -out {name}.pem")
    return Pair(folder / f"{name}.pem", folder / f"{name}.key")


def _make_signed_pair(folder: Path, name: str, *, authority: str) -> Pair:
    new_key_options = f"{_NEW_KEY} -keyout {name}.key"
    _openssl(folder, f"req -new {new_key_options} -subj /CN={name} -out {name}.csr")
    signing = f"-CA {authority}.pem -CAkey {authority}.key -set_serial 7"
    _openssl(folder, f"x509 -req -in {name}.csr {signing} -days 2 -out {name}.pem")
    return Pair(folder / f"{name}.pem", folder / f"{name}.key")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Two of the server, an authority of clients, a client it signed, a client it did not sign."""
    folder = tmp_path_factory.mktemp("certificates")
    found = {name: _make_pair(folder, name) for name in ("first", "second", "ca", "stranger")}
    return found | {"client": _make_signed_pair(folder, "client", authority="ca")}


@pytest.fixture
def served(tmp_path: Path, pairs: dict[str, Pair]) -> Pair:
    """The files a server is started with, a copy of the first pair."""
    pair = Pair(tmp_path / "server.pem", tmp_path / "server.key")
    pairs["first"].copy(pair)
    return pair


def _channel(address: str, root: Pair, client: Pair | None = None) -> grpc.aio.Channel:
    """A channel with a connection of its own that trusts one certificate."""
    credentials = grpc.ssl_channel_credentials(
        root.certificate.read_bytes(),
        private_key=client.key.read_bytes() if client else None,
        certificate_chain=client.certificate.read_bytes() if client else None,
    )
    return grpc.aio.secure_channel(
        address, credentials, options=[("grpc.use_local_subchannel_pool", 1)]
    )


async def _connects(address: str, root: Pair, client: Pair | None = None) -> bool:
    async with _channel(address, root, client) as channel:
        try:
            await _call(channel, "unary_unary")
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                return False
            raise
        return True


def test_tls_serves_every_kind_and_refuses_plaintext(
    served: Pair, pairs: dict[str, Pair], tmp_path: Path
) -> None:
    file = tmp_path / "keys.txt"
    key = add_key(file, "alice", is_admin=False)

    async def check() -> None:
        credentials = server_credentials(served.certificate, served.key)
        async with _serving(keys=ApiKeys(file), credentials=credentials) as address:
            async with _channel(address, served) as channel:
                for kind in _KINDS:
                    answers = await _call(channel, kind, (("x-api-key", key),))
                    assert set(answers) == {b"alice False"}
            code, _ = await _refusal(address, "unary_unary", (("x-api-key", key),))
            assert code == grpc.StatusCode.UNAVAILABLE
            assert not await _connects(address, pairs["second"])

    asyncio.run(check())


def test_changed_certificate_is_served_to_new_connections(
    served: Pair, pairs: dict[str, Pair]
) -> None:
    async def check() -> None:
        credentials = server_credentials(served.certificate, served.key)
        async with (
            _serving(credentials=credentials) as address,
            _channel(address, pairs["first"]) as old,
        ):
            await _call(old, "unary_unary")
            assert not await _connects(address, pairs["second"])
            pairs["second"].copy(served)
            assert await _connects(address, pairs["second"])
            assert not await _connects(address, pairs["first"])
            await _call(old, "unary_unary")  # the connection from before goes on

    asyncio.run(check())


def _put_no_pem(served: Pair, _: dict[str, Pair]) -> None:
    served.certificate.write_text("to whom it may concern\n")


def _remove_key(served: Pair, _: dict[str, Pair]) -> None:
    served.key.unlink()


def _replace_certificate_alone(served: Pair, pairs: dict[str, Pair]) -> None:
    shutil.copy(pairs["second"].certificate, served.certificate)


@pytest.mark.parametrize(
    ("break_files", "reason"),
    [
        (_put_no_pem, "server.pem holds no certificate that can be read"),
        (_remove_key, "cannot read the TLS private key"),
        (_replace_certificate_alone, "is not that of the certificate"),
    ],
)
def test_changed_files_that_cannot_be_used_keep_the_old_certificate_and_warn_once(
    served: Pair,
    pairs: dict[str, Pair],
    break_files: Callable[[Pair, dict[str, Pair]], None],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def warnings() -> list[str]:
        records = (r for r in caplog.records if r.name == "service.security")
        return [r.getMessage() for r in records if r.levelno == logging.WARNING]

    async def check() -> None:
        credentials = server_credentials(served.certificate, served.key)
        async with _serving(credentials=credentials) as address:
            assert await _connects(address, pairs["first"])
            break_files(served, pairs)
            for _ in range(3):
                assert await _connects(address, pairs["first"])
            (warning,) = warnings()
            assert reason in warning
            assert "stay in use" in warning
            pairs["second"].copy(served)
            assert await _connects(address, pairs["second"])
            assert len(warnings()) == 1

    asyncio.run(check())


def test_client_ca_refuses_clients_without_a_certificate_it_signed(
    served: Pair, pairs: dict[str, Pair]
) -> None:
    async def check() -> None:
        credentials = server_credentials(
            served.certificate, served.key, client_ca=pairs["ca"].certificate
        )
        async with _serving(credentials=credentials) as address:
            assert await _connects(address, served, pairs["client"])
            assert not await _connects(address, served)
            assert not await _connects(address, served, pairs["stranger"])

    asyncio.run(check())


def test_changed_client_ca_is_taken(served: Pair, pairs: dict[str, Pair], tmp_path: Path) -> None:
    client_ca = tmp_path / "ca.pem"
    shutil.copy(pairs["ca"].certificate, client_ca)

    async def check() -> None:
        credentials = server_credentials(served.certificate, served.key, client_ca=client_ca)
        async with _serving(credentials=credentials) as address:
            assert await _connects(address, served, pairs["client"])
            shutil.copy(pairs["stranger"].certificate, client_ca)
            assert not await _connects(address, served, pairs["client"])
            assert await _connects(address, served, pairs["stranger"])

    asyncio.run(check())


def test_tls_files_that_cannot_be_used_are_refused_at_the_start(
    served: Pair, pairs: dict[str, Pair], tmp_path: Path
) -> None:
    missing, text = tmp_path / "missing.pem", tmp_path / "text"
    locked, rsa = tmp_path / "locked.key", tmp_path / "rsa.key"
    text.write_text("to whom it may concern\n")
    _openssl(tmp_path, "pkey -in server.key -aes256 -passout pass:secret -out locked.key")
    _openssl(tmp_path, "genpkey -algorithm RSA -out rsa.key")

    def refusal(certificate: Path, key: Path, client_ca: Path | None = None) -> str:
        with pytest.raises(ServerError) as caught:
            server_credentials(certificate, key, client_ca=client_ca)
        return str(caught.value)

    certificate, key = served.certificate, served.key
    assert f"cannot read the TLS certificate {missing}" in refusal(missing, key)
    assert f"the TLS certificate {text} holds no certificate" in refusal(text, key)
    assert f"the TLS certificate {key} holds no certificate" in refusal(key, key)
    assert f"cannot read the TLS private key {missing}" in refusal(certificate, missing)
    assert f"the TLS private key {text} cannot be used" in refusal(certificate, text)
    assert f"{locked} has a passphrase; remove it with" in refusal(certificate, locked)
    for other in (pairs["second"].key, rsa):
        reason = f"{other} is not that of the certificate {certificate}"
        assert reason in refusal(certificate, other)
    assert f"cannot read the TLS client CA {missing}" in refusal(certificate, key, missing)
    assert f"the TLS client CA {text} holds no certificate" in refusal(certificate, key, text)


# --- keys -----------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def _write(file: Path, *lines: str) -> None:
    """Write a key file whose time of change differs from that of every one before."""
    file.write_text("".join(f"{line}\n" for line in lines))
    now_s = next(_TIMES)
    os.utime(file, (now_s, now_s))


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.txt"


def test_key_file_gives_the_client_of_each_key(file: Path) -> None:
    alice, bob = new_key(), new_key()
    _write(
        file,
        "# who may talk to the server",
        "",
        key_line("alice", alice, is_admin=True),
        f"  b.o-b_2\tclient  {hashlib.sha256(bob.encode()).hexdigest().upper()}  # the phone",
    )
    keys = ApiKeys(file)
    assert keys.find(alice) == Client("alice", is_admin=True)
    assert keys.find(bob) == Client("b.o-b_2", is_admin=False)
    assert keys.find(alice[:-1]) is None
    assert keys.find("") is None
    assert keys.find("ключ") is None
    assert alice not in file.read_text()


def test_every_digest_is_compared_whatever_the_key(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [new_key() for _ in range(3)]
    _write(file, *(key_line(f"client{i}", k, is_admin=False) for i, k in enumerate(known)))
    keys = ApiKeys(file)
    compare, n_compared = hmac.compare_digest, 0

    def count(a: Any, b: Any) -> bool:
        nonlocal n_compared
        n_compared += 1
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", count)
    for key in [*known, "unknown"]:
        n_compared = 0
        keys.find(key)
        assert n_compared == 3


def test_new_keys_are_long_and_differ() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(re.fullmatch(r"[\w-]{43}", key) for key in keys)


@pytest.mark.parametrize("name", ["", "a b", "a" * 65, "ümlaut", "a/b", "a#b", "a\n"])
def test_names_of_other_letters_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="expected 1 to 64 letters"):
        key_line(name, "key", is_admin=False)
    assert key_line("aZ9.-_" + "a" * 58, "key", is_admin=False)


@pytest.mark.parametrize(
    "line",
    [
        "bob client",
        f"bob owner {'0' * 64}",
        f"bob client {'0' * 63}",
        f"bob client {'g' * 64}",
        f"b/b client {'0' * 64}",
        f"bob client {'0' * 64} {'0' * 64}",
        "bob client plain-secret",
    ],
)
def test_line_of_another_form_is_refused_by_its_number_and_not_shown(file: Path, line: str) -> None:
    _write(file, "# clients", key_line("alice", new_key(), is_admin=False), line)
    with pytest.raises(ServerError, match=r"line 3: expected NAME ROLE SHA256HEX") as caught:
        ApiKeys(file)
    assert line not in str(caught.value)
    assert "plain-secret" not in str(caught.value)


def test_key_file_that_is_missing_or_says_a_thing_twice_is_refused(file: Path) -> None:
    with pytest.raises(ServerError, match=r"keys\.txt.*make one with: voxgate keys add"):
        ApiKeys(file)
    key = new_key()
    _write(file, *(key_line("alice", k, is_admin=False) for k in (key, new_key())))
    with pytest.raises(ServerError, match="line 2: alice or its key is there twice"):
        ApiKeys(file)
    _write(file, *(key_line(name, key, is_admin=False) for name in ("alice", "bob")))
    with pytest.raises(ServerError, match="line 2: bob or its key is there twice"):
        ApiKeys(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ServerError, match="cannot read the key file"):
        ApiKeys(file)


def test_changed_key_file_is_taken_once_a_second(file: Path) -> None:
    clock, alice, bob = Clock(), new_key(), new_key()
    alices, bobs = (
        key_line(name, key, is_admin=False) for name, key in (("alice", alice), ("bob", bob))
    )
    _write(file, alices)
    keys = ApiKeys(file, clock=clock)
    _write(file, alices, bobs)
    clock.now_s += 0.9
    assert keys.find(bob) is None
    clock.now_s += 0.1
    assert keys.find(bob) == Client("bob", is_admin=False)
    assert keys.find(alice) is not None
    _write(file, bobs)
    clock.now_s += 1
    assert keys.find(alice) is None
    assert keys.find(bob) is not None


@pytest.mark.parametrize("is_removed", [False, True])
def test_broken_new_key_file_keeps_the_old_keys_and_warns_once(
    file: Path, is_removed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    clock, alice, bob = Clock(), new_key(), new_key()
    _write(file, key_line("alice", alice, is_admin=False))
    keys = ApiKeys(file, clock=clock)
    if is_removed:
        file.unlink()
    else:
        _write(file, f"bob client {bob}")  # the key, where its digest belongs
    for _ in range(3):
        clock.now_s += 1
        assert keys.find(alice) is not None
    (warning,) = _warnings(caplog)
    assert str(file) in warning
    assert "stay in use" in warning
    assert bob not in warning
    _write(file, key_line("bob", bob, is_admin=False))
    clock.now_s += 1
    assert keys.find(bob) is not None
    assert keys.find(alice) is None
    assert len(_warnings(caplog)) == 1


def test_key_is_taken_from_the_headers_in_their_order() -> None:
    bearer, api, google = (
        ("authorization", "Bearer one"),
        ("x-api-key", "two"),
        ("x-goog-api-key", "three"),
    )
    assert key_of([google, api, bearer]) == "one"
    assert key_of([google, api]) == "two"
    assert key_of([google]) == "three"
    assert key_of([("authorization", "bEARER  one ")]) == "one"
    assert key_of([("authorization", b"Bearer one")]) == "one"
    assert key_of([("X-Api-Key", "two")]) == "two"
    assert key_of([("authorization", "Basic b25lOg=="), google]) == "three"
    assert key_of([("authorization", "Bearer "), ("x-api-key", ""), google]) == "three"
    for nothing in ([], [("user-agent", "one")], [("authorization", "one")], [("x-api-key", "")]):
        assert key_of(nothing) is None


# --- calls ----------------------------------------------------------------------------------------


@pytest.fixture
def alice(file: Path) -> str:
    """The key of alice, an administrator; the file has one of bob as well."""
    add_key(file, "bob", is_admin=False)
    return add_key(file, "alice", is_admin=True)


@pytest.mark.parametrize("kind", _KINDS)
def test_known_key_in_each_header_reaches_the_handler_with_its_client(
    file: Path, alice: str, kind: str
) -> None:
    async def check(channel: grpc.aio.Channel) -> None:
        for header in (
            ("authorization", f"Bearer {alice}"),
            ("authorization", f"bearer {alice}"),
            ("x-api-key", alice),
            ("x-goog-api-key", alice),
        ):
            assert set(await _call(channel, kind, (header,))) == {b"alice True"}

    asyncio.run(_with_plaintext(ApiKeys(file), check))


@pytest.mark.parametrize("kind", _KINDS)
def test_call_without_a_known_key_is_refused(file: Path, alice: str, kind: str) -> None:
    async def check() -> None:
        async with _serving(keys=ApiKeys(file)) as address:
            code, missing = await _refusal(address, kind)
            unknown = [
                await _refusal(address, kind, (("x-api-key", key),))
                for key in ("x", alice[:-1], alice + "x", new_key())
            ]
        assert code == grpc.StatusCode.UNAUTHENTICATED
        assert "needs a key and none was sent" in missing
        ((code, wrong),) = set(unknown)
        assert code == grpc.StatusCode.UNAUTHENTICATED
        assert "is not known to this server" in wrong
        for details in (missing, wrong):
            assert "`authorization: Bearer KEY`, `x-api-key: KEY` or `x-goog-api-key" in details

    asyncio.run(check())


def test_calls_at_the_same_time_see_each_its_own_client(file: Path, alice: str) -> None:
    carol = add_key(file, "carol", is_admin=False)
    expected = {alice: {b"alice True"}, carol: {b"carol False"}}

    async def check(channel: grpc.aio.Channel) -> None:
        calls = list(itertools.product(_KINDS, expected)) * 5
        answers = await asyncio.gather(*(_call(channel, k, (("x-api-key", x),)) for k, x in calls))
        for (_, key), answer in zip(calls, answers, strict=True):
            assert set(answer) == expected[key]

    asyncio.run(_with_plaintext(ApiKeys(file), check))


def test_own_client_speaks_tls_and_sends_its_key(
    file: Path, alice: str, served: Pair, pairs: dict[str, Pair]
) -> None:
    ca, client = pairs["first"].certificate, pairs["client"]
    credentials = server_credentials(
        served.certificate, served.key, client_ca=pairs["ca"].certificate
    )

    async def check() -> None:
        async with _serving(keys=ApiKeys(file), credentials=credentials) as address:
            known = Server(address, ca=ca, certificate=client.certificate, key=client.key)
            assert await asyncio.to_thread(check_health, known)
            errors: list[str] = []
            for server in (Server(address), Server(address, ca=ca)):
                assert not await asyncio.to_thread(check_health, server, on_error=errors.append)
            assert all("UNAVAILABLE" in error for error in errors)
            with pytest.raises(ServerError, match=r"UNAUTHENTICATED.*--api-key"):
                await asyncio.to_thread(list_models, known)
            with pytest.raises(ServerError, match="UNIMPLEMENTED"):  # the key was good
                await asyncio.to_thread(list_models, replace(known, api_key=alice))

    asyncio.run(check())


@pytest.mark.usefixtures("alice")
def test_health_answers_without_a_key(file: Path) -> None:
    async def check(channel: grpc.aio.Channel) -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert response.status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=20)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()

    asyncio.run(_with_plaintext(ApiKeys(file), check))


def test_method_that_does_not_exist_needs_a_key_as_well(file: Path, alice: str) -> None:
    async def check(channel: grpc.aio.Channel) -> None:
        for method in ("/test.Echo/absent", "/grpc.health.v1.HealthAdmin/Set"):
            for metadata, expected in (
                ((), grpc.StatusCode.UNAUTHENTICATED),
                ((("x-api-key", alice),), grpc.StatusCode.UNIMPLEMENTED),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(method)(b"", metadata=metadata, timeout=20)
                assert caught.value.code() == expected

    asyncio.run(_with_plaintext(ApiKeys(file), check))


def test_server_takes_added_keys_and_forgets_removed_ones(file: Path, alice: str) -> None:
    clock = Clock()

    async def check() -> None:
        keys = ApiKeys(file, clock=clock)
        async with _serving(keys=keys) as address, grpc.aio.insecure_channel(address) as channel:
            carol = (("x-api-key", add_key(file, "carol", is_admin=False)),)
            clock.now_s += 1
            assert await _call(channel, "unary_unary", carol) == [b"carol False"]
            _write(file, *(x for x in file.read_text().splitlines() if not x.startswith("alice")))
            clock.now_s += 1
            code, _ = await _refusal(address, "unary_unary", (("x-api-key", alice),))
            assert code == grpc.StatusCode.UNAUTHENTICATED
            assert await _call(channel, "unary_unary", carol) == [b"carol False"]

    asyncio.run(check())


def test_without_keys_there_is_no_current_client() -> None:
    async def check() -> None:
        async with _serving() as address, grpc.aio.insecure_channel(address) as channel:
            for kind in _KINDS:
                assert set(await _call(channel, kind)) == {b"nobody"}

    asyncio.run(check())


# --- command line ---------------------------------------------------------------------------------


def _keys_add(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service.cli", "keys", "add", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, text=True)


@pytest.fixture
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("usual_umask")
def test_keys_add_shows_the_key_and_keeps_its_digest(file: Path) -> None:
    added = _keys_add("alice", "--file", file)
    assert added.returncode == 0, added.stderr
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    key = added.stdout.strip()
    assert added.stdout == f"{key}\n"
    assert "this once" in added.stderr
    assert key not in added.stderr + file.read_text()
    admin = _keys_add("root", "--file", file, "--admin").stdout.strip()
    keys = ApiKeys(file)
    assert keys.find(key) == Client("alice", is_admin=False)
    assert keys.find(admin) == Client("root", is_admin=True)
    before = file.read_text()
    for name, reason in (("alice", "has a key of alice already"), ("a/b", "cannot name a client")):
        refused = _keys_add(name, "--file", file)
        assert refused.returncode == 2
        assert reason in refused.stderr
        assert refused.stdout == ""
    assert file.read_text() == before


def test_add_key_keeps_what_the_file_says(file: Path) -> None:
    first = new_key()
    file.write_text("# ours\n" + key_line("alice", first, is_admin=False))  # no end of line
    second = add_key(file, "bob", is_admin=False)
    assert file.read_text().startswith("# ours\nalice client ")
    assert ApiKeys(file).find(first) == Client("alice", is_admin=False)
    assert ApiKeys(file).find(second) == Client("bob", is_admin=False)


def test_add_key_leaves_a_file_that_is_no_key_file_alone(file: Path) -> None:
    file.write_text("to whom it may concern\n")
    with pytest.raises(ServerError, match="line 1: expected NAME ROLE SHA256HEX"):
        add_key(file, "alice", is_admin=False)
    assert file.read_text() == "to whom it may concern\n"
    with pytest.raises(InputError, match="cannot write"):
        add_key(file.parent / "absent" / "keys.txt", "alice", is_admin=False)
