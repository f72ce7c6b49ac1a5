"""Riva's and Google's own clients, unmodified, against a server in a process of its own.

Run by `make interop`, which installs each client in its own environment.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
from conftest import CHECKOUT, RunningServer, run_server

from service.manifest import Utterance
from service.recogniser import Recogniser
from service.security import add_key

_CLIENTS = CHECKOUT / ".venv-interop"
_SCRIPTS = Path(__file__).parent


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    with run_server() as server:
        yield server


@pytest.fixture(scope="module")
def lenient() -> Iterator[RunningServer]:
    with run_server("--unsupported", "warn") as server:
        yield server


@pytest.fixture(scope="module")
def recordings(clips: list[Utterance], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three example clips as 16-bit WAV files, which these clients read best."""
    folder = tmp_path_factory.mktemp("recordings")
    paths = []
    for clip in clips[:3]:
        samples, rate = soundfile.read(clip.audio_path)
        paths.append(folder / f"{clip.audio_path.stem}.wav")
        soundfile.write(paths[-1], samples, rate, subtype="PCM_16")
    return paths


@pytest.fixture(scope="module")
def transcripts(recogniser: Recogniser, recordings: list[Path]) -> list[str]:
    """What the recogniser makes of them."""
    found = []
    for path in recordings:
        samples, _ = soundfile.read(path, dtype="float32")
        (segment,) = recogniser.recognise(samples, decoder=recogniser.best_decoder)
        found.append(segment.alternatives[0].transcript)
    return found


def _run(client: str, address: str, command: str, *arguments: str | Path) -> Any:
    """What a client's script prints."""
    python = _CLIENTS / client / "bin" / "python"
    script = _SCRIPTS / f"{client}_client.py"
    found = subprocess.run(
        [python, script, address, command, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if found.returncode:
        raise RuntimeError(found.stderr)
    return json.loads(found.stdout)


def test_riva_lists_models(running: RunningServer) -> None:
    models = _run("riva", running.address, "models")
    assert models == [
        {"name": name, "type": kind, "code": "en-US"}
        for name in ("en-small", "en-small/barista")
        for kind in ("online", "offline")
    ]


def test_riva_recognises_several_files_at_once(
    running: RunningServer, recordings: list[Path], transcripts: list[str]
) -> None:
    found = _run("riva", running.address, "offline", *recordings)
    assert [f["transcript"] for f in found] == [f"{text} " for text in transcripts]
    for one, path in zip(found, recordings, strict=True):
        duration_s = soundfile.info(path).duration
        assert one["audio_processed"] == pytest.approx(duration_s, abs=0.05)
        starts = [start for _, start, _, _ in one["words"]]
        assert starts == sorted(starts)
        assert 0 < one["words"][-1][2] <= 1000 * duration_s + 40
        assert all(0 <= confidence <= 1 for *_, confidence in one["words"])


def test_riva_streams_several_files_at_once(
    running: RunningServer, recordings: list[Path], transcripts: list[str]
) -> None:
    found = _run("riva", running.address, "stream", *recordings)
    assert [f["transcript"].split() for f in found] == [text.split() for text in transcripts]
    assert all(f["n_interim"] > 3 for f in found)


def test_google_recognises(
    running: RunningServer, recordings: list[Path], transcripts: list[str]
) -> None:
    found = _run("google", running.address, "recognize", *recordings)
    assert [f["transcript"] for f in found] == transcripts
    assert {f["language"] for f in found} == {"en-US"}
    for one in found:
        assert " ".join(word for word, *_ in one["words"]) == one["transcript"]
        assert all(start < end for _, start, end, _ in one["words"])
        assert all(0 < confidence <= 1 for *_, confidence in one["words"])


def test_google_streams(
    running: RunningServer, recordings: list[Path], transcripts: list[str]
) -> None:
    found = _run("google", running.address, "stream", *recordings)
    assert [f["transcript"] for f in found] == transcripts
    assert all(f["n_interim"] > 3 for f in found)


def test_google_comes_back_for_the_result_of_an_operation(
    running: RunningServer, recordings: list[Path], transcripts: list[str]
) -> None:
    found = _run("google", running.address, "long", *recordings)
    assert [f["transcript"] for f in found] == transcripts
    assert {f["progress"] for f in found} == {100}


@pytest.mark.parametrize(("client", "command"), [("riva", "offline"), ("google", "recognize")])
def test_punctuation_is_refused_by_name_or_ignored_as_the_server_was_started(
    running: RunningServer,
    lenient: RunningServer,
    recordings: list[Path],
    transcripts: list[str],
    client: str,
    command: str,
) -> None:
    arguments = (command, recordings[0], "--punctuation")
    with pytest.raises(RuntimeError, match="enable_automatic_punctuation is not served"):
        _run(client, running.address, *arguments)
    (found,) = _run(client, lenient.address, *arguments)
    assert found["transcript"].strip() == transcripts[0]


@pytest.mark.parametrize(("client", "command"), [("riva", "stream"), ("google", "recognize")])
def test_a_boosted_name_is_heard(
    running: RunningServer, recordings: list[Path], client: str, command: str
) -> None:
    arguments = (client, running.address, command, recordings[0])
    (plain,) = _run(*arguments)
    (boosted,) = _run(*arguments, "--boost", "burgoynes")
    assert "burgoynes" not in plain["transcript"]
    assert "burgoynes" in boosted["transcript"]


def test_riva_sends_a_key(recordings: list[Path], transcripts: list[str], tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.txt", "shop", is_admin=False)
    with run_server("--keys", str(tmp_path / "keys.txt")) as server:
        with pytest.raises(RuntimeError, match="this server needs a key"):
            _run("riva", server.address, "offline", recordings[0])
        (found,) = _run("riva", server.address, "offline", recordings[0], "--api-key", key)
    assert found["transcript"].strip() == transcripts[0]
