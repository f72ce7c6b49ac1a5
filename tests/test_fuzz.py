"""The fuzz of `benchmarks/fuzz.py`, a small one, and that it sees what it looks for."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace

import pytest
from conftest import CHECKOUT, RunningServer
from google.longrunning import operations_pb2
from google.rpc.code_pb2 import Code

from service.pb.voxgate.v1 import speech_pb2 as pb

sys.path.insert(0, str(CHECKOUT / "benchmarks"))
import fuzz

_N_CASES = 300


@pytest.fixture(scope="module")
def recordings() -> fuzz.Recordings:
    return fuzz.make_recordings(bomb_s=60.0)


@pytest.fixture(scope="module")
def cases(recordings: fuzz.Recordings) -> list[fuzz.Case]:
    return [fuzz.make_case(n, seed=3, recordings=recordings) for n in range(_N_CASES)]


def test_malformed_messages_get_statuses_that_blame_the_sender(
    server: RunningServer, cases: list[fuzz.Case]
) -> None:
    outcomes, failures = fuzz.probe(
        server.address, cases, is_alive=lambda: server.process.poll() is None
    )
    assert [(f.outcome.case.number, f.complaint, f.outcome.details) for f in failures] == []
    assert len(outcomes) == _N_CASES
    codes = Counter(outcome.code for outcome in outcomes)
    assert codes["OK"] > _N_CASES // 10, "too few get past the checks"
    assert codes["INVALID_ARGUMENT"] > _N_CASES // 10


def test_case_depends_on_its_seed_and_number_alone(
    recordings: fuzz.Recordings, cases: list[fuzz.Case]
) -> None:
    assert fuzz.make_case(7, seed=3, recordings=recordings) == cases[7]
    assert fuzz.make_case(7, seed=4, recordings=recordings) != cases[7]


def test_every_method_and_every_kind_of_case_is_made(cases: list[fuzz.Case]) -> None:
    services = Counter(case.method.path.split("/")[1] for case in cases)
    assert len(services) == 4
    assert len({case.method.path for case in cases}) > 12
    assert len({case.kind for case in cases}) == 8
    assert min(services.values()) > 10


@pytest.mark.parametrize(
    ("code", "details", "complaint"),
    [
        ("INVALID_ARGUMENT", "sample_rate_hertz is 7, expected 4000 to 384000, or 0", None),
        ("INVALID_ARGUMENT", "send audio/wav, and/or see the .proto files", None),
        ("INVALID_ARGUMENT", "Traceback (most recent call last)", "its details show the inside"),
        ("UNIMPLEMENTED", "<service.calls.Calls object at 0x7f>", "its details show the inside"),
        ("NOT_FOUND", "no such file: /srv/voxgate/bundles/en", "its details show the inside"),
        ("INVALID_ARGUMENT", "google.protobuf.message.DecodeError", "its details show the inside"),
        ("INTERNAL", "internal error", "ended INTERNAL"),
        ("DEADLINE_EXCEEDED", "", "ended DEADLINE_EXCEEDED"),
        ("UNAVAILABLE", "Socket closed", "ended UNAVAILABLE"),
    ],
)
def test_find_complaint_tells_refusals_from_failures(
    cases: list[fuzz.Case], code: str, details: str, complaint: str | None
) -> None:
    assert fuzz.find_complaint(fuzz.Outcome(cases[0], code, details, 0.1)) == complaint


def test_find_complaint_reads_answers_and_operations(cases: list[fuzz.Case]) -> None:
    method = next(m for m in (c.method for c in cases) if m.response is pb.RecognizeResponse)
    case = replace(cases[0], method=method)

    def complaint(answer: pb.RecognizeResponse) -> str | None:
        said = (answer.SerializeToString(),)
        return fuzz.find_complaint(fuzz.Outcome(case, "OK", "", 0.1, said))

    alternative = pb.SpeechRecognitionAlternative(transcript="right", confidence=0.5)
    result = pb.SpeechRecognitionResult(alternatives=[alternative])
    assert complaint(pb.RecognizeResponse(results=[result])) is None
    result.alternatives[0].confidence = float("nan")
    assert complaint(pb.RecognizeResponse(results=[result])) is not None
    unreadable = fuzz.Outcome(case, "OK", "", 0.1, (b"\x0a\xff",))
    assert fuzz.find_complaint(unreadable) == "its answer cannot be read"
    long = next(m for m in (c.method for c in cases) if m.response is operations_pb2.Operation)
    begun = fuzz.Outcome(replace(case, method=long), "OK", "", 0.1, operation_code=Code.INTERNAL)
    assert fuzz.find_complaint(begun) == "its operation ended INTERNAL"
