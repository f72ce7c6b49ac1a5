"""Sentences spoken by the speech synthesis that Debian has: flite and espeak-ng, many voices."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from service.audio import load_audio
from service.processors import count_usable_processors
from service.recogniser import FloatArray

_FLITE: Final = ("rms", "slt", "awb", "kal")
_ESPEAK: Final = ("en-us", "en-us+f2", "en-gb", "en-us+m3", "en-gb-scotland+f4", "en-us+m7")


@dataclass(frozen=True)
class Spoken:
    """A sentence and how it sounds."""

    text: str
    engine: str
    waveform: FloatArray


def speak_all(texts: Sequence[str], sample_rate: int) -> list[Spoken]:
    """Speak sentences, each by the next of all voices.

    Raises:
        SystemExit: neither engine is installed.
    """
    voices = [("flite", voice) for voice in _FLITE if shutil.which("flite")]
    voices += [("espeak-ng", voice) for voice in _ESPEAK if shutil.which("espeak-ng")]
    if not voices:
        raise SystemExit("neither flite nor espeak-ng is installed: apt-get install flite")
    turns = [voices[i % len(voices)] for i in range(len(texts))]
    with ThreadPoolExecutor(count_usable_processors()) as pool:
        return list(pool.map(lambda t, v: speak(t, *v, sample_rate=sample_rate), texts, turns))


def speak(text: str, engine: str, voice: str, *, sample_rate: int) -> Spoken:
    """Speak one sentence."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        command = {
            "flite": ["flite", "-voice", voice, "-t", text, "-o", str(path)],
            "espeak-ng": ["espeak-ng", "-v", voice, "-s", "150", "-w", str(path), text],
        }[engine]
        subprocess.run(command, check=True, capture_output=True)
        return Spoken(text, engine, load_audio(path, target_rate=sample_rate))
