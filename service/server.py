"""The gRPC server: loads the models, then opens the port, and stops gracefully."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc
from google.longrunning import operations_pb2, operations_pb2_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service.admission import Admission, Limits
from service.api.fields import Unsupported, UnsupportedPolicy
from service.api.google_v1 import GoogleService
from service.api.operations import Operations
from service.api.riva import RivaService
from service.api.voxgate_v1 import SpeechService
from service.calls import Calls
from service.engine import Provider
from service.errors import ServerError
from service.metrics import Metrics
from service.models import Models, load_model
from service.observe import CallInterceptor
from service.pb.google.cloud.speech.v1 import cloud_speech_pb2, cloud_speech_pb2_grpc
from service.pb.riva.proto import riva_asr_pb2, riva_asr_pb2_grpc
from service.pb.voxgate.v1 import speech_pb2, speech_pb2_grpc
from service.recogniser import DecoderName
from service.scheduler import BatchSettings
from service.security import ApiKeys, KeyInterceptor, server_credentials

logger = logging.getLogger(__name__)

MIB: Final = 1 << 20
_WATCH_EVERY_S: Final = 5.0
_SWITCH_S: Final = 0.0002
"""A lane that has a result waits no longer than this for the interpreter's lock: by default it
would be 5 ms, which is more than most of what lanes do."""
_SERVICES: Final = (
    speech_pb2.DESCRIPTOR.services_by_name["Speech"].full_name,
    riva_asr_pb2.DESCRIPTOR.services_by_name["RivaSpeechRecognition"].full_name,
    cloud_speech_pb2.DESCRIPTOR.services_by_name["Speech"].full_name,
    operations_pb2.DESCRIPTOR.services_by_name["Operations"].full_name,
)


@dataclass(frozen=True)
class TlsFiles:
    """PEM files that protect the port."""

    certificate: Path
    key: Path
    client_ca: Path | None = None
    """With it, clients must show a certificate that it signed."""


@dataclass(frozen=True)
class ServerSettings:
    """How a server is run."""

    folders: Sequence[Path]
    """Bundles; the first serves requests that name nothing."""
    watched: Path | None = None
    """A folder of bundles; what appears or changes in it is loaded."""
    domains: Sequence[Path] = ()
    """Domains of every model, beside those in its own folder."""
    host: str = "127.0.0.1"
    port: int = 0
    """TCP port; 0 takes a free one."""
    provider: Provider = "cpu"
    n_threads: int = 1
    """Recordings and batches that run at the same time."""
    default_decoder: DecoderName | None = None
    """Of requests that name none; None is the best of each model."""
    decoders: Sequence[DecoderName] | None = None
    """Which are made; None makes all but the reference."""
    batches: BatchSettings = field(default_factory=BatchSettings)
    limits: Limits = field(default_factory=Limits)
    unsupported: UnsupportedPolicy = "reject"
    tls: TlsFiles | None = None
    keys: Path | None = None
    """File of API keys; None lets everybody in."""
    metrics_port: int | None = None
    """TCP port of the Prometheus figures; 0 takes a free one, None does without."""
    longest_message_bytes: int = 64 * MIB
    longest_connection_s: float | None = None
    """Clients are asked to connect anew after so long, so that load can be balanced."""
    grace_s: float = 10.0
    """Calls under way have so long to end when the server stops."""


async def serve(
    settings: ServerSettings, *, on_listening: Callable[[str, Sequence[str]], object]
) -> None:
    """Serve until SIGTERM or SIGINT, then let running calls end within the grace period.

    Args:
        settings: how.
        on_listening: called with `host:port` and the models' names once the port is open.

    Raises:
        BundleError: a bundle cannot be used.
        ProviderError: the provider is not there.
        ServerError: a port cannot be opened, or a file of keys or certificates cannot be used.
    """
    sys.setswitchinterval(_SWITCH_S)
    metrics = Metrics()
    keys = ApiKeys(settings.keys) if settings.keys else None
    models = Models(
        lambda folder: load_model(
            folder,
            provider=settings.provider,
            decoders=settings.decoders,
            batches=settings.batches,
            domains=settings.domains,
            observe=metrics.observe_batch,
        ),
        settings.folders,
        watched=settings.watched,
    )
    admission = Admission(settings.limits)
    metrics.watch(models, admission, provider=settings.provider)
    calls = Calls(
        models,
        admission,
        metrics,
        default_decoder=settings.default_decoder,
        n_threads=settings.n_threads,
    )
    operations = Operations()
    interceptors = [CallInterceptor(metrics), *([KeyInterceptor(keys)] if keys else [])]
    server = grpc.aio.server(options=_options(settings), interceptors=interceptors)
    healths = _add_services(server, calls, operations, Unsupported(settings.unsupported))
    address = _open_port(server, settings)
    close_metrics = None
    if settings.metrics_port is not None:
        close_metrics = metrics.open_port(settings.host, settings.metrics_port)
    stop = _stop_event()
    background = [asyncio.create_task(_reload_on_hangup(models))]
    if settings.watched is not None:
        background.append(asyncio.create_task(_watch(models)))
    await server.start()
    for name in ("", *_SERVICES):
        await healths.set(name, health_pb2.HealthCheckResponse.SERVING)
    on_listening(address, [model.name for model in models.loaded])
    await stop.wait()
    logger.info("stopping: running calls have %.0f s to end", settings.grace_s)
    await healths.enter_graceful_shutdown()
    await server.stop(settings.grace_s)
    for task in background:
        task.cancel()
    await asyncio.gather(*background, return_exceptions=True)
    await operations.close()
    calls.close()
    if close_metrics is not None:
        close_metrics()


def _options(settings: ServerSettings) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_receive_message_length", settings.longest_message_bytes),
        ("grpc.max_send_message_length", settings.longest_message_bytes),
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", 30_000),  # notices clients that vanished
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ]
    if settings.longest_connection_s is not None:
        options += [
            ("grpc.max_connection_age_ms", round(1000 * settings.longest_connection_s)),
            ("grpc.max_connection_age_grace_ms", 3_600_000),  # streams end when they end
        ]
    return options


def _add_services(
    server: grpc.aio.Server, calls: Calls, operations: Operations, unsupported: Unsupported
) -> health.aio.HealthServicer:
    speech_pb2_grpc.add_SpeechServicer_to_server(SpeechService(calls), server)
    riva_asr_pb2_grpc.add_RivaSpeechRecognitionServicer_to_server(
        RivaService(calls, unsupported), server
    )
    cloud_speech_pb2_grpc.add_SpeechServicer_to_server(
        GoogleService(calls, unsupported, operations), server
    )
    operations_pb2_grpc.add_OperationsServicer_to_server(operations, server)
    healths = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healths, server)
    names = (*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return healths


def _open_port(server: grpc.aio.Server, settings: ServerSettings) -> str:
    host, port, tls = settings.host, settings.port, settings.tls
    try:
        if tls is None:
            bound = server.add_insecure_port(f"{host}:{port}")
        else:
            credentials = server_credentials(tls.certificate, tls.key, client_ca=tls.client_ca)
            bound = server.add_secure_port(f"{host}:{port}", credentials)
    except RuntimeError as error:
        raise ServerError(
            f"cannot listen on {host}:{port} ({error}); is another server running there? "
            "choose another with --port"
        ) from error
    return f"{host}:{bound}"


def _stop_event() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sign in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sign, stop.set)
    return stop


async def _reload_on_hangup(models: Models) -> None:
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, asked.set)
    try:
        while await asked.wait():
            asked.clear()
            await _reload(models)
    finally:
        with contextlib.suppress(ValueError):
            loop.remove_signal_handler(signal.SIGHUP)


async def _watch(models: Models) -> None:
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(_WATCH_EVERY_S)
        if await loop.run_in_executor(None, models.has_changed):
            await _reload(models)


async def _reload(models: Models) -> None:
    try:
        for line in await asyncio.get_running_loop().run_in_executor(None, models.reload):
            logger.info("models: %s", line)
    except Exception:
        logger.exception("the models could not be reloaded; those that are loaded go on")
