"""What the APIs' messages have in common: durations, ranges, languages, and what is not done."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import timedelta
from typing import Any, Final, Literal

import grpc
from google.protobuf.duration_pb2 import Duration

from service.decoding.hypothesis import Phrase
from service.endpointing import EndpointSettings
from service.errors import IdleError, RequestError
from service.request import DEFAULT_BOOST
from service.security import current_client

logger = logging.getLogger(__name__)

UnsupportedPolicy = Literal["reject", "warn"]
IGNORED_KEY: Final = "voxgate-ignored"
_ENDPOINTING_FIELDS: Final = {
    "start_history": "start_history_ms",
    "start_threshold": "start_threshold",
    "stop_history": "stop_history_ms",
    "stop_threshold": "stop_threshold",
    "stop_history_eou": "stop_history_eou_ms",
    "stop_threshold_eou": "stop_threshold_eou",
}


def split_model(name: str, domain: str = "") -> tuple[str, str]:
    """The model and the domain of `model` or `model/domain`; a domain may also be told apart.

    Raises:
        RequestError: two different domains are named.
    """
    model, _, named = name.partition("/")
    if named and domain not in ("", named):
        raise RequestError(f"model names the domain {named!r}, domain {domain!r}; expected one")
    return model, named or domain


class Unsupported:
    """What is said to requests for what no model here can do."""

    def __init__(self, policy: UnsupportedPolicy) -> None:
        """Say it.

        Args:
            policy: `reject` refuses such requests; `warn` does without, names it in the trailing
                metadata `voxgate-ignored` and logs it once a client.
        """
        self._policy = policy
        self._warned: set[tuple[str, str]] = set()

    def check(self, wanted: Iterable[str], context: grpc.aio.ServicerContext) -> None:
        """Refuse fields that are set and not served, or note that they are ignored.

        Raises:
            RequestError: there is one and the policy is to reject.
        """
        names = sorted(wanted)
        if not names:
            return
        if self._policy == "reject":
            raise RequestError(
                f"{', '.join(names)} is not served; leave it unset, or start the server with "
                "--unsupported warn to have it ignored"
            )
        known = tuple(context.trailing_metadata() or ())
        context.set_trailing_metadata((*known, (IGNORED_KEY, ",".join(names))))
        client = current_client.get()
        who = client.name if client else context.peer().rsplit(":", 1)[0]
        for name in names:
            if (who, name) not in self._warned:
                self._warned.add((who, name))
                logger.warning("%s asks for %s, which is not served: ignored", who, name)


def refuse(names: Iterable[str]) -> None:
    """Refuse fields that are set and cannot be ignored.

    Raises:
        RequestError: there is one.
    """
    for name in names:
        raise RequestError(f"{name} is not served; leave it unset")


async def read_first(requests: AsyncIterator[Any], *, idle_s: float) -> Any:  # noqa: ANN401  # any API's
    """The first request of a stream, which holds its config.

    Raises:
        RequestError: it holds something else, or there is none.
        IdleError: none has come after `idle_s` seconds.
    """
    try:
        request = await asyncio.wait_for(anext(requests, None), idle_s)
    except asyncio.TimeoutError:
        raise IdleError(
            f"no request for {idle_s:g} s; send streaming_config as soon as the stream is open"
        ) from None
    if request is not None:
        kind = request.WhichOneof("streaming_request")
        if kind != "streaming_config":
            raise RequestError(
                f"the first request holds {kind or 'nothing'}; expected streaming_config"
            )
        return request
    raise RequestError(
        "the stream was closed before its config; "
        "send streaming_config in the first request, then audio_content"
    )


async def audio_pieces(requests: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    """The audio of the requests after the first.

    Raises:
        RequestError: one holds something else.
    """
    async for request in requests:
        kind = request.WhichOneof("streaming_request")
        if kind != "audio_content":
            raise RequestError(
                f"a request after the first holds {kind or 'nothing'}; expected audio_content"
            )
        yield request.audio_content


def to_endpointing(config: Any) -> EndpointSettings:  # noqa: ANN401  # of any API
    """The settings of a request's `endpointing_config`, with the defaults where it says nothing."""
    said: dict[str, Any] = {
        name: getattr(config, field)
        for field, name in _ENDPOINTING_FIELDS.items()
        if config.HasField(field)
    }
    if "longest_utterance" in config.DESCRIPTOR.fields_by_name:
        longest = config.longest_utterance if config.HasField("longest_utterance") else None
        said |= {} if longest is None else {"longest_utterance_s": to_seconds(longest)}
    return EndpointSettings(**said)


def to_phrases(contexts: Iterable[tuple[Sequence[str], float]]) -> tuple[Phrase, ...]:
    """Phrases with the boost of their context, 0 for the default."""
    return tuple(
        Phrase(text, boost or DEFAULT_BOOST) for texts, boost in contexts for text in texts
    )


def to_duration(seconds: float) -> Duration:
    """To the millisecond."""
    duration = Duration()
    duration.FromTimedelta(timedelta(milliseconds=round(seconds * 1000)))
    return duration


def to_seconds(duration: Duration) -> float:
    """Seconds, float."""
    return float(duration.seconds + duration.nanos / 1e9)


def to_timeout(name: str, duration: Duration) -> float | None:
    """A timeout in seconds; None for zero, which is what is not set.

    Raises:
        RequestError: it is negative.
    """
    seconds = to_seconds(duration)
    if seconds < 0:
        raise RequestError(f"{name} is {seconds:g} s, expected more than 0")
    return seconds or None
