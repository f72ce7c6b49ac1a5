"""The gRPC server: loads the model, then opens the port, and stops gracefully."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from service.api.voxgate_v1 import SpeechService
from service.errors import ServerError
from service.pb.voxgate.v1 import speech_pb2, speech_pb2_grpc
from service.recogniser import DecoderName, Recogniser

logger = logging.getLogger(__name__)

LONGEST_MESSAGE_BYTES: Final = 64 << 20
GRACE_S: Final = 10.0


async def serve(
    recogniser: Recogniser,
    *,
    host: str,
    port: int,
    n_threads: int,
    default_decoder: DecoderName,
    on_listening: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or SIGINT, then let running calls end within the grace period.

    Args:
        recogniser: the loaded, warm model.
        host: address to listen on.
        port: TCP port; 0 takes a free one.
        n_threads: recognitions that run at the same time.
        default_decoder: decoder of requests that name none.
        on_listening: called with `host:port` once the port is open.

    Raises:
        ServerError: the port cannot be opened.
    """
    with ThreadPoolExecutor(n_threads, thread_name_prefix="recognise") as executor:
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", LONGEST_MESSAGE_BYTES),
                ("grpc.max_send_message_length", LONGEST_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
            ]
        )
        speech = SpeechService(recogniser, executor, default_decoder=default_decoder)
        speech_pb2_grpc.add_SpeechServicer_to_server(speech, server)
        healths = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(healths, server)
        address = _open_port(server, host, port)
        stop = _stop_event()
        await server.start()
        for name in ("", speech_pb2.DESCRIPTOR.services_by_name["Speech"].full_name):
            await healths.set(name, health_pb2.HealthCheckResponse.SERVING)
        on_listening(address)
        await stop.wait()
        logger.info("stopping: running calls have %.0f s to end", GRACE_S)
        await healths.enter_graceful_shutdown()
        await server.stop(GRACE_S)


def _open_port(server: grpc.aio.Server, host: str, port: int) -> str:
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
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
