"""The microphone as a stream of 16-bit PCM."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Final

from service.errors import AudioError, MissingExtraError

SAMPLE_RATE: Final = 16_000
_PIECE_S: Final = 0.1


def record() -> Iterator[bytes]:
    """Yield mono pieces from the default microphone, at `SAMPLE_RATE`, until the caller stops.

    Raises:
        MissingExtraError: sounddevice or its PortAudio library is not installed.
        AudioError: there is no microphone, or it cannot be opened.
    """
    try:
        import sounddevice  # noqa: PLC0415  # an extra
    except (ImportError, OSError) as error:
        raise MissingExtraError(
            f"the microphone needs sounddevice and PortAudio ({error}); install them: "
            "pip install 'voxgate[microphone]', and on Debian: apt-get install libportaudio2"
        ) from error
    pieces: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def take(data: memoryview, *_: object) -> None:
        pieces.put(bytes(data))

    try:
        stream = sounddevice.RawInputStream(
            samplerate=SAMPLE_RATE,
            blocksize=int(_PIECE_S * SAMPLE_RATE),
            channels=1,
            dtype="int16",
            callback=take,
        )
    except sounddevice.PortAudioError as error:
        raise AudioError(
            f"no microphone can be opened ({error}); connect one, or pipe audio in: "
            "arecord -f S16_LE -r 16000 | voxgate stream -"
        ) from error
    with stream:
        while True:
            yield pieces.get()
