"""Training data: labels, stored features, batches and pronunciations."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import soxr
import torch
from lhotse import CutSet
from lhotse.testing.dummies import dummy_cut, dummy_supervision
from tiny import FRAMES_PER_S, N_MELS, SAMPLE_RATE, TEXTS, say, write_manifest, write_recordings
from torch.nn.functional import ctc_loss

from service.errors import AudioError, ManifestError, TrainingError
from service.features import FeatureSettings, log_mel
from service.text import BLANK_TOKEN, CHARACTERS, decode, encode
from training import feature_store
from training.data import (
    Batch,
    BatchStream,
    LabelReport,
    Labels,
    collate,
    frames_needed,
    load_batches,
    make_labels,
    read_cuts,
)
from training.feature_store import FeatureStore, store_features
from training.lexicon import PHONES, load_dictionary, parse_dictionary, pronounce, unknown_words

_SETTINGS = FeatureSettings(n_mels=N_MELS)
_FASTER = 1.1


@dataclass(frozen=True)
class _Stored:
    """Recordings of many kinds and their features at two speeds."""

    folder: Path
    cuts: CutSet
    at_speed: dict[float, FeatureStore]

    @property
    def utterance_ids(self) -> list[str]:
        return [cut.id for cut in self.cuts]

    def read(self, name: str) -> npt.NDArray[np.float32]:
        samples, _ = soundfile.read(self.folder / name, dtype="float32")
        return np.asarray(samples)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> _Stored:
    folder = tmp_path_factory.mktemp("recordings")
    rows = write_recordings(folder, TEXTS, speaker="anna")
    rows += write_recordings(folder, ["bad cab"], speaker="phone", sample_rate=8_000)
    left = say("dead bee")
    right = say("a bead  ")[: len(left)]
    soundfile.write(folder / "stereo.wav", np.stack([left, right], axis=1), SAMPLE_RATE)
    rows.append({"audio_filepath": "stereo.wav", "text": "dead bee", "speaker": "anna"})
    cuts = read_cuts([write_manifest(folder / "train.jsonl", rows)])
    stores = {
        speed: store_features(
            cuts, speed=speed, settings=_SETTINGS, cache=folder / "features", n_jobs=1
        )
        for speed in (1.0, _FASTER)
    }
    return _Stored(folder, cuts, stores)


def _make_cuts(durations_s: Sequence[float], texts: Sequence[str] | None = None) -> CutSet:
    """Cuts without audio, named c0, c1, …"""
    return CutSet.from_cuts(
        dummy_cut(
            i,
            duration=duration_s,
            recording_duration=duration_s,
            supervisions=[dummy_supervision(i, text=texts[i] if texts else "a")],
        ).with_id(f"c{i}")
        for i, duration_s in enumerate(durations_s)
    )


def _draw_cuts(n_cuts: int) -> CutSet:
    draw = random.Random(4)
    return _make_cuts([round(draw.uniform(0.5, 9.0), 2) for _ in range(n_cuts)])


def _make_stream(
    cuts: CutSet, *, batch_s: float = 40.0, seed: int = 1, epoch: int = 0, **arguments: Any
) -> BatchStream:
    labels = {cut.id: Labels(tokens=(1, 2), phones=(3,)) for cut in cuts}
    stores = arguments.pop("stores", [])
    return BatchStream(cuts, labels, stores, batch_s=batch_s, seed=seed, epoch=epoch, **arguments)


def _label(
    durations_s: Sequence[float],
    texts: Sequence[str],
    *,
    subsampling: int = 4,
    fastest: float = 1.0,
    shortest_s: float = 0.0,
    longest_s: float = 99.0,
) -> tuple[dict[str, Labels], LabelReport]:
    return make_labels(
        _make_cuts(durations_s, texts),
        tokens=CHARACTERS,
        dictionary=load_dictionary(),
        subsampling=subsampling,
        frames_per_s=FRAMES_PER_S,
        fastest=fastest,
        shortest_s=shortest_s,
        longest_s=longest_s,
    )


# Labels


def test_frames_needed_equals_what_ctc_can_align() -> None:
    for n_labels in range(1, 5):
        for labels in itertools.product((1, 2), repeat=n_labels):
            for n_frames in range(1, 9):
                nll = ctc_loss(
                    torch.full((n_frames, 1, 3), 1 / 3).log(),
                    torch.tensor([labels]),
                    torch.tensor([n_frames]),
                    torch.tensor([n_labels]),
                )
                assert bool(nll.isfinite()) == (frames_needed(labels) <= n_frames), labels


def test_frames_needed_of_nothing_is_nothing() -> None:
    assert frames_needed([]) == 0


def test_make_labels_says_the_text_and_its_phones() -> None:
    labels, report = _label([2.0, 3.0], ["bad cab", "a"])
    assert decode(labels["c0"].tokens, CHARACTERS) == "bad cab"
    assert [PHONES[i] for i in labels["c0"].phones] == "B AE D K AE B".split()
    assert list(labels) == ["c0", "c1"]
    assert report == LabelReport(n_utterances=2)
    assert "2 utterances: 2 kept" in str(report)


def test_make_labels_leaves_out_what_is_outside_the_durations() -> None:
    labels, report = _label(
        [0.99, 1.0, 5.0, 5.01], ["a", "a", "a", "a"], shortest_s=1.0, longest_s=5.0
    )
    assert list(labels) == ["c1", "c2"]
    assert report == LabelReport(n_utterances=4, n_outside_duration=2)


def test_make_labels_leaves_out_speakers_that_are_held_out(stored: _Stored) -> None:
    labels, report = make_labels(
        stored.cuts,
        tokens=CHARACTERS,
        dictionary=load_dictionary(),
        subsampling=4,
        frames_per_s=FRAMES_PER_S,
        fastest=1.0,
        shortest_s=0.0,
        longest_s=99.0,
        held_out_speakers=("anna",),
    )
    assert {cut.supervisions[0].speaker for cut in stored.cuts if cut.id in labels} == {"phone"}
    assert report.n_held_out == len(stored.cuts) - 1
    assert f"left out {report.n_held_out} held out" in str(report)


def test_make_labels_leaves_out_empty_transcripts() -> None:
    labels, report = _label([2.0, 2.0], ["", "a"])
    assert list(labels) == ["c1"]
    assert report == LabelReport(n_utterances=2, n_empty=1)


@pytest.mark.parametrize(
    ("subsampling", "fastest", "too_short_s", "long_enough_s"),
    [(4, 1.0, 0.105, 0.115), (2, 1.0, 0.065, 0.075), (4, 1.1, 0.115, 0.125)],
)
def test_make_labels_leaves_out_what_is_too_dense(
    subsampling: int, fastest: float, too_short_s: float, long_enough_s: float
) -> None:
    labels, report = _label(  # "aa" needs three frames
        [too_short_s, long_enough_s], ["aa", "aa"], subsampling=subsampling, fastest=fastest
    )
    assert list(labels) == ["c1"]
    assert report.n_too_dense == 1
    assert "2 utterances: 1 kept" in str(report)


def test_make_labels_masks_the_phones_of_unknown_words() -> None:
    labels, report = _label([4.0] * 3, ["zyxwvq bad", "bad zyxwvq qzx", "bad"])
    assert [labels[i].phones for i in ("c0", "c1")] == [(), ()]
    assert decode(labels["c0"].tokens, CHARACTERS) == "zyxwvq bad"
    assert labels["c2"].phones
    assert report.n_without_phones == 2
    assert report.unknown_words == {"zyxwvq": 2, "qzx": 1}


def test_make_labels_masks_phones_that_do_not_fit() -> None:
    labels, report = _label([0.085, 0.125], ["x", "x"])  # one letter, three phones: EH K S
    assert labels["c0"] == Labels(tokens=tuple(encode("x", CHARACTERS)), phones=())
    assert len(labels["c1"].phones) == 3
    assert report.n_too_dense == 0


def test_kept_labels_have_a_finite_loss_at_the_fastest_speed(stored: _Stored) -> None:
    labels, _ = make_labels(
        stored.cuts,
        tokens=CHARACTERS,
        dictionary=load_dictionary(),
        subsampling=4,
        frames_per_s=FRAMES_PER_S,
        fastest=_FASTER,
        shortest_s=0.0,
        longest_s=99.0,
    )
    assert labels
    for utterance_id, label in labels.items():
        n_frames = len(stored.at_speed[_FASTER].load(utterance_id)[::4])
        assert max(frames_needed(label.tokens), frames_needed(label.phones)) <= n_frames


# Manifests


def test_read_cuts_reads_the_chosen_corpora(tmp_path: Path) -> None:
    rows = write_recordings(tmp_path, ["bad"], speaker="anna", corpus="one")
    rows += write_recordings(tmp_path, ["Cab!"], speaker="bela", corpus="two")
    manifest = write_manifest(tmp_path / "train.jsonl", rows)
    assert [cut.id for cut in read_cuts([manifest])] == ["anna-0.wav", "bela-0.wav"]
    (cut,) = read_cuts([manifest], corpora=["two"])
    assert (cut.supervisions[0].text, cut.supervisions[0].speaker) == ("cab", "bela")
    assert cut.supervisions[0].custom["corpus"] == "two"
    assert cut.duration == pytest.approx(0.48)


def test_read_cuts_names_the_corpora_there_are(tmp_path: Path) -> None:
    rows = write_recordings(tmp_path, ["bad"], speaker="anna", corpus="one")
    manifest = write_manifest(tmp_path / "train.jsonl", rows)
    with pytest.raises(TrainingError, match=r"'two'.*they have \['one'\]"):
        read_cuts([manifest], corpora=["two"])


def test_read_cuts_refuses_a_recording_listed_twice(tmp_path: Path) -> None:
    rows = write_recordings(tmp_path, ["bad"], speaker="anna")
    manifest = write_manifest(tmp_path / "train.jsonl", rows)
    with pytest.raises(TrainingError, match=r"anna-0\.wav is listed 2 times"):
        read_cuts([manifest, manifest])


def test_read_cuts_takes_equal_names_of_different_folders(tmp_path: Path) -> None:
    manifests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        rows = write_recordings(tmp_path / name, ["bad"], speaker="anna")
        short = [{**row, "audio_filepath": Path(str(row["audio_filepath"])).name} for row in rows]
        manifests.append(write_manifest(tmp_path / name / "train.jsonl", short))
    ids = [cut.id for cut in read_cuts(manifests)]
    assert ids == [str(tmp_path / name / "anna-0.wav") for name in ("one", "two")]


def test_read_cuts_refuses_missing_audio(tmp_path: Path) -> None:
    rows = write_recordings(tmp_path, ["bad", "cab"], speaker="anna")
    manifest = write_manifest(tmp_path / "train.jsonl", rows)
    (tmp_path / "anna-1.wav").unlink()
    with pytest.raises(TrainingError, match=r"cannot open .*anna-1\.wav"):
        read_cuts([manifest])


def test_read_cuts_refuses_what_is_no_audio(tmp_path: Path) -> None:
    (tmp_path / "letter.wav").write_text("Dear Sir or Madam")
    rows = [{"audio_filepath": "letter.wav", "text": "bad"}]
    with pytest.raises(TrainingError, match=r"cannot open .*letter\.wav"):
        read_cuts([write_manifest(tmp_path / "train.jsonl", rows)])


def test_read_cuts_refuses_a_missing_transcript(tmp_path: Path) -> None:
    rows = write_recordings(tmp_path, ["bad"], speaker="anna")
    del rows[0]["text"]
    with pytest.raises(TrainingError, match=r"anna-0\.wav has no text"):
        read_cuts([write_manifest(tmp_path / "train.jsonl", rows)])


def test_read_cuts_refuses_a_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"absent\.jsonl"):
        read_cuts([tmp_path / "absent.jsonl"])


# Stored features


def test_stored_features_equal_those_of_the_service(stored: _Stored) -> None:
    for number in range(len(TEXTS)):
        name = f"anna-{number}.wav"
        expected = log_mel(stored.read(name), _SETTINGS).astype(np.float16)
        assert np.array_equal(stored.at_speed[1.0].load(name).numpy(), expected), name


def test_stored_features_of_another_rate_are_those_of_resampled_audio(stored: _Stored) -> None:
    waveform = soxr.resample(stored.read("phone-0.wav"), 8_000, SAMPLE_RATE)
    expected = log_mel(waveform, _SETTINGS)
    features = stored.at_speed[1.0].load("phone-0.wav").numpy()
    assert features.shape == expected.shape
    np.testing.assert_allclose(features[:, :13], expected[:, :13], atol=0.2)  # below 3.5 kHz


def test_stored_features_of_a_stereo_recording_are_those_of_its_mean(stored: _Stored) -> None:
    expected = log_mel(stored.read("stereo.wav").mean(axis=1), _SETTINGS)
    features = stored.at_speed[1.0].load("stereo.wav").numpy()
    assert features.shape == expected.shape
    np.testing.assert_allclose(features, expected, atol=0.02)


def test_stored_features_at_a_speed_are_shorter_and_higher(stored: _Stored) -> None:
    for utterance_id in stored.utterance_ids[: len(TEXTS)]:
        normal = stored.at_speed[1.0].load(utterance_id)
        faster = stored.at_speed[_FASTER].load(utterance_id)
        assert len(faster) == pytest.approx(len(normal) / _FASTER, abs=1.5)
        assert _mean_band(faster) > _mean_band(normal) + 0.1


def _mean_band(features: torch.Tensor) -> float:
    energies = features.exp().sum(dim=0)
    return float((energies * torch.arange(N_MELS)).sum() / energies.sum())


def test_store_features_finds_what_was_computed(stored: _Stored) -> None:
    (folder,) = (stored.folder / "features").glob("*-1.0")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(path.name for path in before) == ["0.json", "0.npy"]
    store_features(
        stored.cuts, speed=1.0, settings=_SETTINGS, cache=stored.folder / "features", n_jobs=1
    )
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_store_features_goes_on_where_it_was_interrupted(
    stored: _Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "_PART_CUTS", 4)
    name = feature_store._store_name(stored.cuts, speed=1.0, settings=_SETTINGS)
    folder = tmp_path / name
    folder.mkdir()
    whole = stored.at_speed[1.0]
    ids = stored.utterance_ids
    for part, first in enumerate(range(0, len(ids), 4)):
        _write_part(folder, part, {i: whole.load(i).numpy() for i in ids[first : first + 4]})
    (folder / "1.json").unlink()
    (folder / "1.npy").write_bytes(b"half a part")
    (folder / "2.unfinished.npy").write_bytes(b"half a part")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    store = store_features(stored.cuts, speed=1.0, settings=_SETTINGS, cache=tmp_path, n_jobs=1)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {n for n in after if after[n] != before.get(n)} == {"1.json", "1.npy"}
    for utterance_id in stored.utterance_ids:
        assert torch.equal(store.load(utterance_id), whole.load(utterance_id)), utterance_id


def test_store_name_depends_on_recordings_settings_and_speed(stored: _Stored) -> None:
    def name(cuts: CutSet, speed: float, settings: FeatureSettings) -> str:
        return feature_store._store_name(cuts, speed=speed, settings=settings)

    names = {
        name(stored.cuts, 1.0, _SETTINGS),
        name(stored.cuts, 1.1, _SETTINGS),
        name(stored.cuts, 1.0, FeatureSettings(n_mels=N_MELS + 1)),
        name(stored.cuts.subset(first=3), 1.0, _SETTINGS),
        name(stored.cuts.subset(last=3), 1.0, _SETTINGS),
    }
    assert len(names) == 5
    assert name(stored.cuts, 1.0, FeatureSettings(n_mels=N_MELS)) in names


def _store_one(path: Path, samples: npt.NDArray[np.float32]) -> FeatureStore:
    soundfile.write(path, samples, SAMPLE_RATE, subtype="FLOAT" if path.suffix == ".wav" else None)
    manifest = write_manifest(
        path.with_suffix(".jsonl"), [{"audio_filepath": str(path), "text": "bad"}]
    )
    cuts = read_cuts([manifest])
    if path.suffix == ".flac":
        path.write_bytes(path.read_bytes()[:-2000])  # after its header was read
    return store_features(
        cuts, speed=1.0, settings=_SETTINGS, cache=path.parent / "features", n_jobs=1
    )


def test_audio_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"cannot decode .*broken\.flac"):
        _store_one(tmp_path / "broken.flac", say("bad cab dead bee"))


def test_samples_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    samples = say("bad cab")
    samples[100] = np.nan
    with pytest.raises(AudioError, match=r"loud\.wav holds samples that are no numbers"):
        _store_one(tmp_path / "loud.wav", samples)


def test_a_recording_that_changed_in_place_is_computed_anew(tmp_path: Path) -> None:
    path = tmp_path / "take.wav"
    first = _store_one(path, say("bad cab")).load(str(path))
    second = _store_one(path, 0.1 * say("bad cab")).load(str(path))
    assert first.shape == second.shape
    assert float((first - second).mean()) == pytest.approx(2 * np.log(10), abs=0.2)


def _write_part(
    folder: Path, part: int, features: dict[str, npt.NDArray[np.float32]]
) -> FeatureStore:
    """Write features, each (time, mel), as a store's part; return the store of the folder."""
    index, first = {}, 0
    for utterance_id, frames in features.items():
        index[utterance_id] = (first, len(frames))
        first += len(frames)
    np.save(folder / f"{part}.npy", np.concatenate(list(features.values())).astype(np.float16))
    (folder / f"{part}.json").write_text(json.dumps(index))
    return FeatureStore(folder)


def test_feature_store_holds_what_its_parts_hold(tmp_path: Path) -> None:
    _write_part(tmp_path, 0, {"a": np.full((3, 2), 1.0, np.float32)})
    store = _write_part(tmp_path, 1, {"b": np.zeros((0, 2), np.float32)})
    assert len(store.load("a"))
    assert store.load("b").shape == (0, 2)
    with pytest.raises(KeyError):
        store.load("c")
    assert store.load("a").tolist() == [[1.0, 1.0]] * 3
    assert store.load("b").shape == (0, 2)


def test_feature_store_reads_the_same_in_another_process(stored: _Stored) -> None:
    store = stored.at_speed[1.0]
    features = store.load("anna-2.wav")
    pickled = pickle.dumps(store)
    assert len(pickled) < 10_000  # places, not frames
    assert torch.equal(pickle.loads(pickled).load("anna-2.wav"), features)  # noqa: S301  # our own


def test_statistics_are_those_of_all_frames(stored: _Stored) -> None:
    store = stored.at_speed[1.0]
    frames = torch.cat([store.load(i) for i in stored.utterance_ids]).numpy().astype(np.float64)
    mean, std = store.statistics(stored.utterance_ids)
    np.testing.assert_allclose(mean.numpy(), frames.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(std.numpy(), frames.std(axis=0, ddof=1), rtol=1e-5)


def test_statistics_sample_evenly_spaced_utterances(tmp_path: Path) -> None:
    features = {str(i): np.full((1, 2), float(i), np.float32) for i in range(9)}
    mean, _ = _write_part(tmp_path, 0, features).statistics(list(features), n_sampled=3)
    assert mean.tolist() == [3.0, 3.0]  # of 0, 3 and 6


def test_statistics_of_a_constant_band_can_be_divided_by(tmp_path: Path) -> None:
    store = _write_part(tmp_path, 0, {"a": np.full((5, 2), 3.0, np.float32)})
    assert store.statistics(["a"])[1].tolist() == pytest.approx([0.01, 0.01])


# Batches


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_plan_has_every_utterance_once(epoch: int) -> None:
    cuts = _draw_cuts(300)
    durations_s = {cut.id: cut.duration for cut in cuts}
    batches = _make_stream(cuts, epoch=epoch).plan()
    assert sorted(i for batch in batches for i in batch) == sorted(durations_s)
    assert max(sum(durations_s[i] for i in batch) for batch in batches) <= 40.0 * 1.05
    assert len(batches) < 60  # 1400 seconds in batches of 40


def test_plan_puts_utterances_of_similar_length_together() -> None:
    cuts = _draw_cuts(300)
    durations_s = {cut.id: cut.duration for cut in cuts}
    for batch in _make_stream(cuts).plan():
        lengths_s = [durations_s[i] for i in batch]
        assert max(lengths_s) - min(lengths_s) < 1.5


def test_plan_leaves_out_what_has_no_labels() -> None:
    cuts = _draw_cuts(20)
    stream = BatchStream(
        cuts, {"c3": Labels((1,), ()), "c7": Labels((1,), ())}, [], batch_s=40.0, seed=1, epoch=0
    )
    assert sorted(i for batch in stream.plan() for i in batch) == ["c3", "c7"]


def test_plan_of_a_single_utterance_is_one_batch() -> None:
    assert _make_stream(_make_cuts([2.0])).plan() == [["c0"]]


def test_plan_repeats_with_seed_and_epoch_only() -> None:
    cuts = _draw_cuts(200)
    plan = _make_stream(cuts, seed=1, epoch=2).plan()
    assert _make_stream(cuts, seed=1, epoch=2).plan() == plan
    for seed, epoch in ((1, 3), (2, 2)):
        other = _make_stream(cuts, seed=seed, epoch=epoch).plan()
        assert other != plan
        assert {frozenset(batch) for batch in other} != {frozenset(batch) for batch in plan}


def test_plan_shortest_first_is_sorted() -> None:
    cuts = _draw_cuts(300)
    durations_s = {cut.id: cut.duration for cut in cuts}

    def means(*, shortest_first: bool) -> list[float]:
        plan = _make_stream(cuts, shortest_first=shortest_first).plan()
        return [sum(durations_s[i] for i in batch) / len(batch) for batch in plan]

    assert means(shortest_first=True) == sorted(means(shortest_first=False))
    assert means(shortest_first=False) != sorted(means(shortest_first=False))


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("shortest_first", [False, True])
def test_ranks_share_the_batches_equally(world_size: int, shortest_first: bool) -> None:
    cuts = _draw_cuts(100)
    durations_s = {cut.id: cut.duration for cut in cuts}
    plans = [
        _make_stream(cuts, rank=rank, world_size=world_size, shortest_first=shortest_first).plan()
        for rank in range(world_size)
    ]
    assert len({len(plan) for plan in plans}) == 1
    batches = [tuple(batch) for plan in plans for batch in plan]
    assert sorted(i for batch in set(batches) for i in batch) == sorted(durations_s)
    assert len(batches) - len(set(batches)) < world_size  # the last step is filled up
    assert max(sum(durations_s[i] for i in batch) for batch in batches) <= 42.0 / world_size


def test_every_rank_has_a_batch_where_there_are_fewer_batches_than_ranks() -> None:
    cuts = _make_cuts([2.0, 2.1])
    plans = [_make_stream(cuts, batch_s=400.0, rank=r, world_size=4).plan() for r in range(4)]
    assert [len(plan) for plan in plans] == [1, 1, 1, 1]
    assert {i for plan in plans for i in plan[0]} == {"c0", "c1"}


def _stream_stored(stored: _Stored, **arguments: Any) -> BatchStream:
    stores = list(stored.at_speed.values())
    return _make_stream(stored.cuts, batch_s=3.0, stores=stores, **arguments)


def _assert_equal(actual: Sequence[Batch], expected: Sequence[Batch]) -> None:
    assert [batch.utterance_ids for batch in actual] == [batch.utterance_ids for batch in expected]
    for one, other in zip(actual, expected, strict=True):
        for field in fields(Batch)[1:]:
            assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


def test_stream_goes_on_with_the_batches_an_uninterrupted_pass_has(stored: _Stored) -> None:
    whole = list(_stream_stored(stored, epoch=3))
    assert len(whole) >= 4
    for first_batch in range(len(whole) + 1):
        rest = list(_stream_stored(stored, epoch=3, first_batch=first_batch))
        _assert_equal(rest, whole[first_batch:])


def test_stream_loads_the_same_in_a_process_of_its_own(stored: _Stored) -> None:
    stream = _stream_stored(stored, epoch=1, first_batch=1)
    with load_batches(stream) as batches:
        _assert_equal(list(batches), list(stream))


class _SlowStore(FeatureStore):
    """A store that is slower than training, so that its process is never ahead by much."""

    def load(self, utterance_id: str) -> torch.Tensor:
        time.sleep(0.01)
        return torch.full((5, N_MELS), float(utterance_id.removeprefix("c")))


def test_loading_process_outlives_the_signals_that_stop_a_run(tmp_path: Path) -> None:
    stream = _make_stream(_draw_cuts(80), batch_s=10.0, stores=[_SlowStore(tmp_path)])
    with load_batches(stream) as batches:
        loaded = [next(batches)]
        (process,) = multiprocessing.active_children()
        assert process.pid is not None
        for sign in (signal.SIGINT, signal.SIGTERM):
            os.kill(process.pid, sign)
        loaded += batches
    assert multiprocessing.active_children() == []
    assert len(loaded) > 30
    _assert_equal(loaded, list(stream))


def test_stream_draws_one_speed_an_utterance_and_pass(stored: _Stored) -> None:
    seen = Counter(
        (utterance_id, n_frames)
        for epoch in range(30)
        for batch in _stream_stored(stored, epoch=epoch)
        for utterance_id, n_frames in zip(
            batch.utterance_ids, batch.feature_lengths.tolist(), strict=True
        )
    )
    expected = {
        (utterance_id, len(store.load(utterance_id)))
        for store in stored.at_speed.values()
        for utterance_id in stored.utterance_ids
    }
    assert set(seen) == expected
    n_normal = sum(
        n for (i, n_frames), n in seen.items() if n_frames == len(stored.at_speed[1.0].load(i))
    )
    assert n_normal / seen.total() == pytest.approx(0.5, abs=0.1)


def test_stream_holds_the_features_and_labels_of_its_utterances(stored: _Stored) -> None:
    labels = {
        utterance_id: Labels(tokens=tuple(range(1, n + 2)), phones=(5,) * (n % 3))
        for n, utterance_id in enumerate(stored.utterance_ids)
    }
    store = stored.at_speed[1.0]
    stream = BatchStream(stored.cuts, labels, [store], batch_s=4.0, seed=1, epoch=0)
    for batch in stream:
        for i, utterance_id in enumerate(batch.utterance_ids):
            n_frames, n_tokens = int(batch.feature_lengths[i]), int(batch.token_lengths[i])
            n_phones = int(batch.phone_lengths[i])
            assert torch.equal(batch.features[i, :n_frames], store.load(utterance_id))
            assert tuple(batch.tokens[i, :n_tokens].tolist()) == labels[utterance_id].tokens
            assert tuple(batch.phones[i, :n_phones].tolist()) == labels[utterance_id].phones


def test_collate_pads_to_the_longest() -> None:
    batch = collate(
        ["a", "b"],
        [torch.ones(2, 3), torch.ones(4, 3)],
        [Labels(tokens=(7, 8, 9), phones=()), Labels(tokens=(5,), phones=(6, 7))],
    )
    assert batch.utterance_ids == ("a", "b")
    assert batch.features.shape == (2, 4, 3)
    assert batch.feature_lengths.tolist() == [2, 4]
    assert batch.tokens.tolist() == [[7, 8, 9], [5, 0, 0]]
    assert batch.token_lengths.tolist() == [3, 1]
    assert batch.phones.tolist() == [[0, 0], [6, 7]]
    assert batch.phone_lengths.tolist() == [0, 2]
    assert batch.tokens.dtype == batch.phones.dtype == torch.int64


# Pronunciations


def test_phones_are_those_of_the_dictionary() -> None:
    pronunciations = load_dictionary().values()
    used = {phone for variants in pronunciations for phones in variants for phone in phones}
    assert PHONES[0] == BLANK_TOKEN
    assert set(PHONES[1:]) == used
    assert len(PHONES) == len(set(PHONES)) == 40


@pytest.mark.parametrize(
    ("word", "phones"),
    [
        ("hello", "HH AH L OW"),
        ("the", "DH AH"),
        ("don't", "D OW N T"),
        ("measure", "M EH ZH ER"),
        ("thing", "TH IH NG"),
    ],
)
def test_dictionary_pronounces_known_words(word: str, phones: str) -> None:
    dictionary = load_dictionary()
    ids = pronounce(word, dictionary)
    assert ids is not None
    assert " ".join(PHONES[i] for i in ids) == phones
    assert pronounce(f"{word} {word}", dictionary) == ids + ids


def test_dictionary_knows_the_usual_words() -> None:
    assert len(load_dictionary()) > 100_000
    assert all(len(phones) > 0 for variants in load_dictionary().values() for phones in variants)


def test_pronounce_of_an_unknown_word_is_none() -> None:
    assert pronounce("hello zyxwvq", load_dictionary()) is None
    assert unknown_words("zyxwvq hello zyxwvq", load_dictionary()) == ["zyxwvq", "zyxwvq"]
    assert pronounce("", load_dictionary()) == []


def test_parse_dictionary_keeps_the_usual_pronunciation_first() -> None:
    dictionary = parse_dictionary("a AH\na(2) EY\nbe B IY\na(3) AA\n")
    assert dictionary == {"a": (("AH",), ("EY",), ("AA",)), "be": (("B", "IY"),)}
    assert pronounce("a", dictionary) == [PHONES.index("AH")]
