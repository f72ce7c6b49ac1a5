"""What a client wants, whichever API it speaks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from service.audio import HIGHEST_RATE, LOWEST_RATE, MOST_CHANNELS, AudioFormat
from service.bundle import DEFAULT_PROFILE, SearchTokens
from service.decoding.hypothesis import Phrase
from service.endpointing import EndpointSettings
from service.errors import RequestError
from service.recogniser import DecoderName

DEFAULT_BOOST: Final = 5.0
"""Weight of a phrase whose sender names none."""
MOST_ALTERNATIVES: Final = 30


@dataclass(frozen=True)
class Request:
    """A recording or a stream that is to be recognised."""

    audio: AudioFormat = field(default_factory=AudioFormat)
    """What the sender says about its bytes."""
    model: str = ""
    """Name of the model; empty takes the first that serves the language."""
    language: str = ""
    """BCP-47 tag, matched by its first part; empty takes any."""
    domain: str = ""
    """What is to be understood; empty for the words alone."""
    decoder: DecoderName | None = None
    """How emissions are searched; None as the server was started."""
    search_tokens: SearchTokens | None = None
    """What a beam search spells words in; None as the model prefers."""
    n_best: int = 1
    """Alternatives wanted."""
    phrases: tuple[Phrase, ...] = ()
    """What is expected or unwanted."""
    masks_profanity: bool = False
    """Whether profane words are written with asterisks."""
    separates_channels: bool = False
    """Whether each channel is recognised by itself, instead of their average."""

    def __post_init__(self) -> None:
        _check("sample_rate_hertz", self.audio.sample_rate, LOWEST_RATE, HIGHEST_RATE)
        _check("audio_channel_count", self.audio.n_channels, 1, MOST_CHANNELS)
        _check("max_alternatives", self.n_best, 1, MOST_ALTERNATIVES)


@dataclass(frozen=True)
class StreamRequest(Request):
    """A stream that is to be recognised while it arrives."""

    interim_results: bool = False
    """Whether results that may still change are wanted."""
    profile: str = DEFAULT_PROFILE
    """How the audio is read while it arrives."""
    second_pass: bool = True
    """Whether an utterance is read again with full context when it ends."""
    endpointing: EndpointSettings = field(default_factory=EndpointSettings)
    """When utterances begin and end."""
    single_utterance: bool = False
    """Whether the stream ends with its first utterance."""
    speech_events: bool = False
    """Whether the beginning and end of speech are told."""
    speech_start_timeout_s: float | None = None
    """The stream ends where nobody has spoken for so long at its beginning."""
    speech_end_timeout_s: float | None = None
    """The stream ends where nobody has spoken for so long after an utterance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        has_timeout = self.speech_start_timeout_s or self.speech_end_timeout_s
        if self.separates_channels and has_timeout:
            raise RequestError(
                "voice_activity_timeout is not served for separate channels; leave one of them out"
            )


def _check(name: str, value: int | None, lowest: int, highest: int) -> None:
    if value is not None and not lowest <= value <= highest:
        raise RequestError(f"{name} is {value}, expected {lowest} to {highest}, or 0")
