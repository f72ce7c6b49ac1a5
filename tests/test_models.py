"""The models of a server: chosen, exchanged and let go of while requests run."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_scheduler import MarkingEngine, MarkingStreamingEngine

from service.audio import to_pcm
from service.bundle import CONFIG_NAME
from service.errors import BundleError, RequestError, ServerError
from service.features import FeatureSettings
from service.models import Model, Models, _digest, load_model
from service.recogniser import FloatArray, Recogniser
from service.request import StreamRequest
from service.scheduler import BatchSettings, Scheduler
from service.session import Session


def _write(folder: Path, name: str, language: str = "en-US", **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"name": name, "language": language, **more}
    (folder / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
    return folder


def _break(folder: Path) -> None:
    (folder / CONFIG_NAME).write_text("{", encoding="utf-8")


class Loader:
    """Loads bundles that hold a name and a language alone; closes what is left at the end."""

    def __init__(self) -> None:
        self.loaded: list[Model] = []

    def __call__(self, folder: Path) -> Model:
        try:
            config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BundleError(f"{folder} is no bundle") from error
        engine, streaming_engine = MarkingEngine(), MarkingStreamingEngine()
        recogniser = Recogniser(
            name=config["name"],
            language=config["language"],
            features=FeatureSettings(),
            subsampling=4,
            tokens=(),
            phones=(),
            engine=engine,
            streaming_engine=streaming_engine,
            profiles={},
            survival={},
            decoders={},
            phone_decoders=frozenset(),
        )
        scheduler = Scheduler(engine, streaming_engine, BatchSettings())
        model = Model(folder, _digest(folder), recogniser, recogniser, scheduler)
        self.loaded.append(model)
        return model


@pytest.fixture
def load() -> Iterator[Loader]:
    loader = Loader()
    yield loader
    for model in loader.loaded:
        model.scheduler.close()


def _is_closed(model: Model) -> bool:
    return not any(lane.is_alive() for lane in model.scheduler._lanes)


def _names(models: Models) -> list[str]:
    return [model.name for model in models.loaded]


@pytest.fixture
def three(tmp_path: Path, load: Loader) -> Models:
    folders = [
        _write(tmp_path / "1", "english-small", "en-US"),
        _write(tmp_path / "2", "german", "de-DE"),
        _write(tmp_path / "3", "english-large", "en-GB"),
    ]
    return Models(load, folders)


# --- which one -----------------------------------------------------------------------------------


def test_first_folder_serves_requests_that_name_nothing(three: Models) -> None:
    assert three.choose("", "").name == "english-small"


@pytest.mark.parametrize("language", ["en", "en-GB", "EN_us", "en-US", "en-Latn-US", "EN"])
def test_first_model_of_a_language_is_chosen_by_the_first_part_of_its_tag(
    three: Models, language: str
) -> None:
    assert three.choose("", language).name == "english-small"
    assert three.choose("", language.lower().replace("en", "de")).name == "german"


def test_model_is_chosen_by_its_name(three: Models) -> None:
    assert three.choose("english-large", "").name == "english-large"
    assert three.choose("english-large", "en-US").name == "english-large"


def test_name_that_is_not_there_is_refused_with_those_that_are(three: Models) -> None:
    with pytest.raises(RequestError) as refused:
        three.choose("english", "")
    for name in ("'english'", "'english-small'", "'german'", "'english-large'"):
        assert name in str(refused.value)


@pytest.mark.parametrize("language", ["fr", "e", "eng-US", "fr-en"])
def test_language_that_is_not_there_is_refused_with_those_that_are(
    three: Models, language: str
) -> None:
    with pytest.raises(RequestError) as refused:
        three.choose("", language)
    assert f"{language!r} is not served; expected de-DE, en-GB, en-US" in str(refused.value)


def test_language_that_the_named_model_lacks_is_refused(three: Models) -> None:
    with pytest.raises(
        RequestError, match=r"'de' is not served by the model 'english-large'; .*en-GB$"
    ):
        three.choose("english-large", "de")


# --- what is loaded at the start -----------------------------------------------------------------


def test_two_bundles_of_one_name_are_refused(tmp_path: Path, load: Loader) -> None:
    folders = [_write(tmp_path / "1", "twin"), _write(tmp_path / "2", "twin", "de-DE")]
    with pytest.raises(ServerError) as refused:
        Models(load, folders)
    assert all(part in str(refused.value) for part in ("'twin'", *map(str, folders)))


def test_bundle_that_cannot_be_loaded_stops_the_start(tmp_path: Path, load: Loader) -> None:
    _break(_write(tmp_path / "2", "b"))
    with pytest.raises(BundleError):
        Models(load, [_write(tmp_path / "1", "a"), tmp_path / "2"])


def test_watched_folder_without_bundles_is_refused(tmp_path: Path, load: Loader) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(ServerError, match="holds no bundle"):
        Models(load, [], watched=tmp_path)


def test_bundles_of_the_watched_folder_come_by_name_behind_the_others(
    tmp_path: Path, load: Loader
) -> None:
    watched = tmp_path / "watched"
    watched.mkdir()
    for name in ("b", "a"):
        _write(watched / name, name)
    first = _write(watched / "z", "z")
    (watched / "notes").mkdir()
    assert _names(Models(load, [first], watched=watched)) == ["z", "a", "b"]


# --- exchanging them -----------------------------------------------------------------------------


def test_reload_of_what_has_not_changed_does_nothing(three: Models, load: Loader) -> None:
    before = three.loaded
    assert not three.has_changed()
    assert three.reload() == []
    assert three.loaded == before
    assert len(load.loaded) == 3


def test_changed_bundle_takes_the_place_of_the_old_one(
    tmp_path: Path, three: Models, load: Loader
) -> None:
    before = three.loaded
    _write(tmp_path / "2", "german", "de-AT")
    assert three.has_changed()
    said = three.reload()
    assert [line.split()[:2] for line in said] == [["loaded", "german"], ["let", "go"]]
    assert [model.language for model in three.loaded] == ["en-US", "de-AT", "en-GB"]
    assert (three.loaded[0], three.loaded[2]) == (before[0], before[2])
    assert not three.has_changed()
    assert [_is_closed(model) for model in load.loaded] == [False, True, False, False]


def test_broken_new_bundle_keeps_the_old_one(tmp_path: Path, three: Models, load: Loader) -> None:
    before = three.loaded
    _break(tmp_path / "2")
    (line,) = three.reload()
    assert line.startswith("kept the old 2:")
    assert three.loaded == before
    assert not any(_is_closed(model) for model in load.loaded)
    assert not three.has_changed()  # it is not tried again as it is
    _write(tmp_path / "2", "german", "de-CH")
    assert three.has_changed()
    three.reload()
    assert three.choose("german", "").language == "de-CH"


def test_new_bundle_that_is_broken_is_reported_and_the_others_serve(
    tmp_path: Path, load: Loader
) -> None:
    _write(tmp_path / "a", "a")
    models = Models(load, [], watched=tmp_path)
    _break(_write(tmp_path / "b", "b"))
    _write(tmp_path / "c", "c")
    said = models.reload()
    assert len(said) == 2
    assert str(tmp_path / "b") in said[0]
    assert _names(models) == ["a", "c"]


def test_new_and_removed_folders_of_the_watched_folder_are_found(
    tmp_path: Path, load: Loader
) -> None:
    _write(tmp_path / "b", "b")
    models = Models(load, [], watched=tmp_path)
    _write(tmp_path / "a", "a")
    assert models.has_changed()
    assert models.reload() == [f"loaded a from {tmp_path / 'a'}"]
    assert _names(models) == ["a", "b"]
    shutil.rmtree(tmp_path / "b")
    assert models.has_changed()
    assert models.reload() == [f"let go of b from {tmp_path / 'b'}"]
    assert _names(models) == ["a"]
    assert [_is_closed(model) for model in load.loaded] == [True, False]


def test_everything_is_kept_where_nothing_would_be_left(tmp_path: Path, load: Loader) -> None:
    _write(tmp_path / "a", "a")
    models = Models(load, [], watched=tmp_path)
    shutil.rmtree(tmp_path / "a")
    said = models.reload()
    assert "nothing was changed" in said[-1]
    assert _names(models) == ["a"]
    assert not _is_closed(load.loaded[0])
    with models.use() as model:
        assert model is load.loaded[0]


@pytest.mark.parametrize("folder", ["a", "z"])
def test_new_bundle_with_the_name_of_another_is_refused_wherever_its_folder_sorts(
    tmp_path: Path, load: Loader, folder: str
) -> None:
    _write(tmp_path / "m", "twin")
    models = Models(load, [], watched=tmp_path)
    before = models.loaded
    _write(tmp_path / folder, "twin", "de-DE")
    (line,) = models.reload()
    assert "both named 'twin'" in line
    assert models.loaded == before
    assert [_is_closed(model) for model in load.loaded] == [False, True]


# --- models in use -------------------------------------------------------------------------------


def test_replaced_model_is_closed_after_its_last_user(tmp_path: Path, load: Loader) -> None:
    models = Models(load, [_write(tmp_path / "a", "a")])
    old = load.loaded[0]
    with ExitStack() as first, ExitStack() as second:
        assert first.enter_context(models.use()) is old
        assert second.enter_context(models.use("a", "en")) is old
        _write(tmp_path / "a", "a", "en-GB")
        models.reload()
        with models.use() as new:
            assert new is load.loaded[1]
            first.close()
            assert not _is_closed(old)
            second.close()
            assert _is_closed(old)
    assert not _is_closed(new)
    assert not any(models._n_users.values())


def test_model_whose_user_fails_is_let_go_of(tmp_path: Path, load: Loader) -> None:
    models = Models(load, [_write(tmp_path / "a", "a")])

    def fail() -> None:
        with models.use():
            _write(tmp_path / "a", "a", "en-GB")
            models.reload()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [_is_closed(model) for model in load.loaded] == [True, False]


def test_refused_choice_leaves_no_user(three: Models) -> None:
    with pytest.raises(RequestError), three.use("nobody"):
        pass
    assert not any(three._n_users.values())


def test_close_ends_what_is_unused_at_once_and_the_rest_after_its_user(
    three: Models, load: Loader
) -> None:
    with three.use("german"):
        three.close()
        assert [_is_closed(model) for model in load.loaded] == [True, False, True]
    assert all(_is_closed(model) for model in load.loaded)


def test_users_and_reloads_at_once_never_meet_a_closed_model(tmp_path: Path, load: Loader) -> None:
    models = Models(load, [_write(tmp_path / "a", "a", version=0)])
    is_over = threading.Event()
    failures: list[str] = []
    n_uses = 0
    features = np.ones((1, 4, 3), np.float32)

    def use() -> None:
        nonlocal n_uses
        while not is_over.is_set():
            with models.use() as model:
                try:
                    model.scheduler.engine("live").log_probs(features, np.array([4]))
                    n_uses += 1
                except AssertionError as error:
                    failures.append(str(error))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for version in range(1, 15):
        _write(tmp_path / "a", "a", version=version)
        models.reload()
    is_over.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert n_uses > 0
    assert [_is_closed(model) for model in load.loaded] == [True] * 14 + [False]


# --- a real bundle -------------------------------------------------------------------------------


def test_loaded_model_gives_what_its_recogniser_gives(
    shipped_bundle: Path, recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    batches: list[str] = []
    model = load_model(
        shipped_bundle,
        provider="cpu",
        decoders=["greedy"],
        batches=BatchSettings(n_lanes=2),
        observe=lambda kind, _size, _wait_s: batches.append(kind),
    )
    try:
        assert (model.name, model.language) == (recogniser.name, recogniser.language)
        assert set(model.live.decoders) == {"greedy"}
        expected = recogniser.recognise(waveforms[1], decoder="greedy")
        assert model.offline.recognise(waveforms[1], decoder="greedy") == expected
        assert batches == ["utterance", "search"]
        sessions = [
            Session(r, StreamRequest(second_pass=False), decoder="greedy")
            for r in (recogniser, model.live)
        ]
        pcm = to_pcm(waveforms[1])
        told = [session.push(pcm) + list(session.finish()) for session in sessions]
        assert told[0] == told[1]
        assert "window" in batches
        assert Models(lambda _: model, [shipped_bundle]).has_changed() is False
    finally:
        model.scheduler.close()
