"""Admission: what a server accepts, and that every place is given back."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

import pytest

from service.admission import Admission, Limits
from service.errors import OverloadError


def _admission(**limits: Any) -> Admission:
    return Admission(Limits(**limits))


def test_streams_beyond_the_limit_are_refused_until_one_ends() -> None:
    admission = _admission(streams=2)
    with ExitStack() as held:
        held.enter_context(admission.stream("a"))
        with admission.stream(None):
            assert admission.n_streams == 2
            with (
                pytest.raises(OverloadError, match="all 2 streams are in use") as refused,
                admission.stream("b"),
            ):
                pass
            assert refused.value.retry_s > 0
            assert f"try again in {refused.value.retry_s:g} s" in str(refused.value)
            assert admission.n_streams == 2
        with admission.stream("b"):
            assert admission.n_streams == 2
    assert admission.n_streams == 0


def test_one_client_cannot_take_the_places_of_others() -> None:
    admission = _admission(streams=10, streams_per_client=2)
    with admission.stream("greedy"), admission.stream("greedy"):
        with (
            pytest.raises(OverloadError, match="greedy has all of its 2 streams") as refused,
            admission.stream("greedy"),
        ):
            pass
        assert refused.value.retry_s > 0
        with ExitStack() as others:
            others.enter_context(admission.stream("modest"))
            for _ in range(3):  # who is unknown has no limit of its own
                others.enter_context(admission.stream(None))
            assert admission.n_streams == 6
    with admission.stream("greedy"):
        pass
    assert not admission._n_streams_of  # nothing is remembered of clients that left


def test_recordings_beyond_the_limit_are_refused_until_one_ends() -> None:
    admission = _admission(recordings=2)
    with admission.recording(1.0):
        with admission.recording(1.0):
            with (
                pytest.raises(OverloadError, match="2 recordings wait") as refused,
                admission.recording(1.0),
            ):
                pass
            assert refused.value.retry_s > 0
            assert admission.n_recordings == 2
        with admission.recording(1.0):
            assert admission.n_recordings == 2
    assert (admission.n_recordings, admission.queued_audio_s) == (0, 0.0)


def test_queued_audio_beyond_the_limit_is_refused() -> None:
    admission = _admission(queued_audio_s=100.0)
    with admission.recording(60.0), admission.recording(40.0):
        assert admission.queued_audio_s == 100.0
        with (
            pytest.raises(OverloadError, match="100 s of audio wait") as refused,
            admission.recording(0.5),
        ):
            pass
        assert refused.value.retry_s > 0
        assert admission.queued_audio_s == 100.0
    with admission.recording(100.0):
        pass


def test_recording_longer_than_the_limit_is_accepted_when_nothing_waits() -> None:
    admission = _admission(queued_audio_s=100.0)
    with admission.recording(5_000.0):
        assert admission.queued_audio_s == 5_000.0
        with pytest.raises(OverloadError), admission.recording(1.0):
            pass
    with admission.recording(1.0), pytest.raises(OverloadError), admission.recording(5_000.0):
        pass


def test_no_rounding_is_left_of_many_recordings() -> None:
    admission = _admission()
    with admission.recording(0.1), admission.recording(0.2), admission.recording(0.3):
        pass
    assert admission.queued_audio_s == 0.0


def test_streams_and_recordings_do_not_take_each_others_places() -> None:
    admission = _admission(streams=1, recordings=1)
    with admission.stream("a"), admission.recording(1.0):
        assert (admission.n_streams, admission.n_recordings) == (1, 1)


def test_places_are_given_back_when_the_work_fails() -> None:
    admission = _admission(streams=1, recordings=1, streams_per_client=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), admission.stream("a"):
            raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError), admission.recording(10.0):
            raise ZeroDivisionError
    assert (admission.n_streams, admission.n_recordings) == (0, 0)
    assert admission.queued_audio_s == 0.0


def test_refusal_takes_no_place() -> None:
    admission = _admission(streams=0, recordings=0)
    for _ in range(3):
        with pytest.raises(OverloadError), admission.stream("a"):
            pass
        with pytest.raises(OverloadError), admission.recording(1.0):
            pass
    assert (admission.n_streams, admission.n_recordings) == (0, 0)


def test_limit_holds_for_threads_that_come_at_once() -> None:
    admission = _admission(streams=5)
    start, done = threading.Barrier(20), threading.Barrier(20)
    outcomes: list[bool] = []

    def come() -> None:
        start.wait(20)
        try:
            with admission.stream("a"):
                outcomes.append(True)
                done.wait(20)
        except OverloadError:
            outcomes.append(False)
            done.wait(20)

    threads = [threading.Thread(target=come) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(outcomes) == 5
    assert admission.n_streams == 0
