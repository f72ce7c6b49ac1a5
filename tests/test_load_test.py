"""The load test: its arithmetic alone, and the whole of it against a real server."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import CHECKOUT, RunningServer

from service.audio import load_audio
from service.errors import ManifestError, ServerError
from service.load_test import (
    FINAL,
    INTERIM,
    LAST,
    PIECE_S,
    REQUEST,
    Capacity,
    Expected,
    Latencies,
    Report,
    StreamLog,
    Target,
    describe_trial,
    expect,
    find_capacity,
    join_audio,
    match,
    measure_streams,
    measure_throughput,
    pair,
    search_capacity,
    summarise,
)
from service.manifest import Utterance
from service.recogniser import Recogniser


def _ignore(what: str, done: float, total: float) -> None:
    assert what
    assert 0 <= done <= total


@pytest.fixture(scope="module")
def short_clips(
    tmp_path_factory: pytest.TempPathFactory, clips: list[Utterance]
) -> list[Utterance]:
    """A second of speech each, so that utterances end within the seconds of a test."""
    folder = tmp_path_factory.mktemp("short")
    short = []
    for number, clip in enumerate(clips[:4]):
        path = folder / f"{number}.wav"
        soundfile.write(path, load_audio(clip.audio_path, target_rate=16_000)[:16_000], 16_000)
        short.append(replace(clip, audio_path=path))
    return short


def test_match_keeps_the_order_and_leaves_out_what_is_too_far() -> None:
    assert match([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], tolerance_s=0.2) == [0, 1, 2]
    assert match([1.1, 3.0], [1.0, 2.0, 3.0], tolerance_s=0.2) == [0, 2]
    assert match([1.0, 2.4, 3.0], [1.0, 2.0, 3.0], tolerance_s=0.2) == [0, None, 2]
    assert match([1.0, 1.0, 1.0], [1.0, 1.0], tolerance_s=0.2) == [0, 1, None]
    assert match([1.15], [1.0, 1.16], tolerance_s=0.2) == [1]
    assert match([3.0, 1.0], [1.0, 3.0], tolerance_s=0.2) == [1, None]
    assert match([1.0], [], tolerance_s=0.2) == [None]
    assert match([], [1.0], tolerance_s=0.2) == []


def test_pair_needs_the_kind_and_an_arrival_after_the_message() -> None:
    expected = [
        Expected(message=5, end_s=0.5, is_final=False),
        Expected(message=9, end_s=0.9, is_final=True),
        Expected(message=20, end_s=2.0, is_final=True),
    ]
    heard = [(100.51, 0.5, False), (100.93, 0.96, True), (101.99, 2.0, True), (102.5, 0.5, True)]
    log = StreamLog(0, start=100.0, heard=heard)
    assert list(pair(log, expected)) == [(expected[0], 100.51), (expected[1], 100.93)]


def test_summarise_gives_percentiles_in_milliseconds() -> None:
    latencies = summarise([i / 1000 for i in range(100, -1, -1)])
    assert latencies is not None
    assert latencies.n == 101
    found = [getattr(latencies, f"p{p}_ms") for p in (50, 90, 95, 99)]
    assert found == pytest.approx([50, 90, 95, 99])
    assert latencies.max_ms == pytest.approx(100)
    assert summarise([]) is None


@pytest.mark.parametrize("capacity", [0, 1, 5, 8, 9, 15, 16, 50, 333, 2_000])
@pytest.mark.parametrize("first", [1, 8])
def test_find_capacity_is_within_five_percent_and_tries_no_number_twice(
    capacity: int, first: int
) -> None:
    tried = []

    def holds(n_streams: int) -> bool:
        tried.append(n_streams)
        return n_streams <= capacity

    found = find_capacity(holds, first=first)
    assert 0.95 * capacity - 1 <= found <= capacity
    assert found == 0 or found in tried
    assert len(set(tried)) == len(tried) < 20
    assert tried[0] == first


def test_joined_audio_is_whole_messages_and_its_pauses_are_not_silent(
    short_clips: list[Utterance],
) -> None:
    audios = join_audio(short_clips, n_audios=2, seconds=4.0)
    assert [len(pieces) for pieces in audios] == [40, 40]
    assert {len(piece) for pieces in audios for piece in pieces} == {3_200}
    assert audios[0][:5] != audios[1][:5]
    pause = np.frombuffer(b"".join(audios[0][11:17]), "<i2") / 32_768
    assert 20 * math.log10(np.sqrt(np.mean(pause**2))) == pytest.approx(-70, abs=1)
    with pytest.raises(ManifestError, match="no recording"):
        join_audio([], n_audios=1, seconds=1.0)


def test_expected_results_follow_the_audio_that_they_hold(
    recogniser: Recogniser, short_clips: list[Utterance]
) -> None:
    (pieces,) = join_audio(short_clips, n_audios=1, seconds=8.0)
    expected = expect(recogniser, pieces, decoder="greedy", profile="fast")
    assert [e.message for e in expected] == sorted(e.message for e in expected)
    assert all(e.end_s <= (e.message + 1) * PIECE_S for e in expected[:-1])
    assert {e.is_final for e in expected[:-1]} == {False, True}
    assert expected[-1].is_final
    assert expected[-1].message == len(pieces)
    offline = expect(recogniser, pieces, decoder="greedy", profile="offline")
    assert all(e.is_final for e in offline)


def _report(codes: dict[str, int], p95_ms: float | None = 100.0) -> Report:
    final = None if p95_ms is None else Latencies(10, 50.0, 90.0, p95_ms, p95_ms, p95_ms)
    return Report("realtime", 8, 80.0, 10.0, codes, {FINAL: final})


def test_trial_holds_without_errors_and_within_the_bound() -> None:
    assert _report({"OK": 8}).holds(300)
    assert not _report({"OK": 8}, 301).holds(300)
    assert not _report({"OK": 8}, None).holds(300)
    refused = _report({"OK": 7, "RESOURCE_EXHAUSTED": 1})
    assert not refused.holds(300)
    assert (refused.n_errors, refused.n_failed) == (1, 0)
    failed = _report({"OK": 6, "RESOURCE_EXHAUSTED": 1, "INTERNAL": 1})
    assert (failed.n_errors, failed.n_failed) == (2, 1)
    late = _report({"OK": 7, "DEADLINE_EXCEEDED": 1})
    assert late.n_failed == 1
    assert Capacity(8, 300, (late,), 10.0).n_failed == 0
    assert Capacity(8, 300, (late, failed), 10.0).n_failed == 1


def test_late_messages_are_blamed_on_who_was_late() -> None:
    slow = replace(_report({"OK": 8}), send_lateness_p95_ms=25.0)
    assert "tool was the limit" in describe_trial(replace(slow, loop_lateness_p95_ms=24.0), 300)
    assert "server did not take" in describe_trial(replace(slow, loop_lateness_p95_ms=2.0), 300)
    assert "warning" not in describe_trial(_report({"OK": 8}), 300)


@pytest.mark.parametrize("n_clients", [1, 2])
def test_every_result_of_two_streams_is_timed(
    server: RunningServer, recogniser: Recogniser, short_clips: list[Utterance], n_clients: int
) -> None:
    target = Target(
        server.address,
        decoder="greedy",
        profile="fast",
        n_clients=n_clients,
        server_pid=server.process.pid,
    )
    report = measure_streams(
        target, recogniser, short_clips, n_streams=2, seconds=2.4, on_progress=_ignore
    )
    assert report.codes == {"OK": 2}
    assert (report.n_failed, report.n_missing, report.n_unmatched) == (0, 0, 0)
    assert report.audio_s == pytest.approx(2 * 3.0)
    for name in (INTERIM, FINAL, LAST):
        latencies = report.latencies[name]
        assert latencies is not None, name
        assert 0 < latencies.p50_ms <= latencies.p95_ms <= latencies.max_ms < 60_000
    assert report.send_lateness_p95_ms is not None
    assert report.server_cpu is not None
    assert json.loads(json.dumps(report.as_json()))["throughput"] == pytest.approx(
        report.throughput
    )


def test_search_against_a_server_keeps_its_trials(
    server: RunningServer, recogniser: Recogniser, short_clips: list[Utterance]
) -> None:
    trials: list[Report] = []
    capacity = search_capacity(
        Target(server.address, decoder="greedy", profile="fast"),
        recogniser,
        short_clips,
        first=1,
        bound_ms=0.0,
        seconds=2.4,
        on_trial=trials.append,
        on_progress=_ignore,
    )
    assert capacity.n_streams == 0
    assert capacity.trials == tuple(trials)
    assert [trial.n_streams for trial in trials] == [1]
    assert capacity.model_streams > 1
    assert json.loads(json.dumps(capacity.as_json()))["trials"][0]["n_streams"] == 1


def test_streams_as_fast_as_they_are_taken(
    server: RunningServer, short_clips: list[Utterance]
) -> None:
    report = measure_throughput(
        Target(server.address, decoder="greedy"),
        short_clips,
        pace="fast",
        n_streams=2,
        seconds=0.5,
        on_progress=_ignore,
    )
    assert report.codes == {"OK": 2}
    assert report.throughput > 0
    assert report.latencies == {}


def test_bench_serve_prints_and_writes_what_it_measured(
    server: RunningServer, tmp_path: Path
) -> None:
    manifest = CHECKOUT / "examples" / "manifest.jsonl"
    command = [sys.executable, "-m", "service.cli", "bench", "serve", str(manifest)]
    options = ["--address", server.address, "--api", "offline", "--streams", "2", "--seconds", "1"]
    json_file = tmp_path / "figures.json"
    result = subprocess.run(
        [*command, *options, "--decoder", "greedy", "--json", str(json_file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "× real time" in result.stdout
    figures = json.loads(json_file.read_text())
    assert figures["codes"] == {"OK": figures["latencies"][REQUEST]["n"]}
    assert figures["audio_s"] > 0
    wrong = subprocess.run(
        [*command, *options, "--find-capacity"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert "--find-capacity needs streams" in wrong.stderr


def test_server_that_is_not_there_or_serves_another_model_is_named(
    server: RunningServer, recogniser: Recogniser, short_clips: list[Utterance]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = Target(f"127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(ServerError, match="voxgate serve"):
            measure_throughput(
                nowhere,
                short_clips,
                pace="offline",
                n_streams=1,
                seconds=1.0,
                on_progress=_ignore,
            )
    with pytest.raises(ServerError, match="en-small, expected de-large"):
        measure_streams(
            Target(server.address),
            replace(recogniser, name="de-large"),
            short_clips,
            n_streams=1,
            seconds=1.0,
            on_progress=_ignore,
        )
    with pytest.raises(ServerError, match="no process"):
        measure_throughput(
            Target(server.address, server_pid=2**22 + 1),
            short_clips,
            pace="fast",
            n_streams=1,
            seconds=1.0,
            on_progress=_ignore,
        )
