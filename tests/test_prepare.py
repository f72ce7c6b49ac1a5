"""Corpora become manifests: the layouts that are read, what is left out, and how they are split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lhotse.recipes
import numpy as np
import pytest
import soundfile
from lhotse.audio.backend import LibsndfileBackend, set_current_audio_backend
from tiny import say
from typer.testing import CliRunner

from service.cli import app
from service.errors import TrainingError
from service.manifest import Utterance, read_manifest
from training import prepare
from training.data import read_cuts
from training.prepare import (
    LeftOut,
    Reason,
    Report,
    describe,
    download_librispeech,
    prepare_common_voice,
    prepare_folder,
    prepare_librispeech,
)

TRAIN = {
    "84-121123-0000": "BAD CAB",
    "84-121123-0001": "A BEAD'S EDGE",
    "84-121550-0000": "ADD",
    "174-50561-0000": "DEAD BEE",
}
DEV = {"1272-128104-0000": "ACE CAB"}
CV_COLUMNS = ("client_id", "path", "sentence", "up_votes", "down_votes", "age", "gender", "accents")


def record(path: Path, text: str = "bad cab", *, sample_rate: int = 16_000) -> Path:
    """Say a text into a file of the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"format": "OGG", "subtype": "OPUS"} if path.suffix == ".opus" else {}
    soundfile.write(path, say(text, sample_rate=sample_rate), sample_rate, **options)
    return path


def cut_off(path: Path) -> None:
    """Keep the first half of a file, as an interrupted download does."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def write_librispeech(root: Path, subset: str, texts: Mapping[str, str]) -> Path:
    """A subset of LibriSpeech: a FLAC file an utterance, the texts of a chapter in one file."""
    for name, text in texts.items():
        speaker, chapter, _ = name.split("-")
        folder = root / subset / speaker / chapter
        record(folder / f"{name}.flac", text.lower())
        with (folder / f"{speaker}-{chapter}.trans.txt").open("a", encoding="utf-8") as file:
            file.write(f"{name} {text}\n")
    return root / subset


def write_release(
    folder: Path,
    tables: Mapping[str, Sequence[tuple[str, str, str]]],
    *,
    columns: Sequence[str] = CV_COLUMNS,
) -> Path:
    """The folder of a language of Common Voice: tables of speaker, clip and sentence, mp3 clips."""
    for name, rows in tables.items():
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["\t".join(columns)]
        for speaker, clip, sentence in rows:
            cells = {"client_id": speaker, "path": clip, "sentence": sentence}
            lines.append("\t".join(cells.get(column, "") for column in columns))
            stem = clip.removesuffix(".mp3")
            record(folder / "clips" / f"{stem}.mp3", sample_rate=32_000)
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_speakers(folder: Path, **n_utterances: int) -> Path:
    """Recordings with a text beside each, in a folder a speaker."""
    for speaker, n in n_utterances.items():
        for number in range(n):
            path = record(folder / speaker / f"{number}.wav", "a bead" + " add" * number)
            path.with_suffix(".txt").write_text(f"{speaker} {number}", encoding="utf-8")
    return folder


def read(output: Path, name: str = "all") -> list[Utterance]:
    return read_manifest(output / f"{name}.jsonl")


def texts(output: Path, name: str = "all") -> dict[str, str | None]:
    """Text by recording, without its folders."""
    return {Path(u.name).name: u.text for u in read(output, name)}


def reasons(report: Report) -> dict[Reason, int]:
    return dict(Counter(each.reason for each in report.left_out))


def written(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir()}


def train_on(*manifests: Path) -> list[Any]:
    """What training reads, every recording decoded as it does."""
    set_current_audio_backend(LibsndfileBackend())
    cuts = list(read_cuts(manifests))
    for cut in cuts:
        assert cut.load_audio().shape[1] == cut.num_samples
    return cuts


# LibriSpeech


def test_librispeech_gives_a_manifest_for_each_subset(tmp_path: Path) -> None:
    write_librispeech(tmp_path / "LibriSpeech", "train-clean-5", TRAIN)
    write_librispeech(tmp_path / "LibriSpeech", "dev-clean-2", DEV)
    (tmp_path / "LibriSpeech" / "SPEAKERS.TXT").write_text("84 | F")
    output = tmp_path / "manifests"
    report = prepare_librispeech(tmp_path, output)
    assert sorted(written(output)) == ["dev-clean-2.jsonl", "train-clean-5.jsonl"]
    assert texts(output, "train-clean-5") == {
        f"{name}.flac": text.lower() for name, text in TRAIN.items()
    }
    (dev,) = read(output, "dev-clean-2")
    assert dev == Utterance(
        audio_path=output / dev.name,
        name="../LibriSpeech/dev-clean-2/1272/128104/1272-128104-0000.flac",
        duration_s=7 * 0.12,
        text="ace cab",
        speaker="1272",
        corpus="librispeech-dev-clean-2",
    )
    found = {m.path.stem: (m.n_utterances, m.n_speakers) for m in report.manifests}
    assert found == {"train-clean-5": (4, 2), "dev-clean-2": (1, 1)}
    assert report.left_out == ()
    assert len(train_on(*(m.path for m in report.manifests))) == 5


def test_librispeech_agrees_with_lhotses_recipe(tmp_path: Path) -> None:
    part = write_librispeech(tmp_path, "train-clean-5", TRAIN)
    prepare_librispeech(tmp_path, tmp_path)
    recipe = lhotse.recipes.prepare_librispeech(tmp_path, dataset_parts=part.name)[part.name]
    recordings = {recording.id: recording for recording in recipe["recordings"]}
    expected = {
        s.recording_id: (s.text.lower(), s.speaker, recordings[s.recording_id].duration)
        for s in recipe["supervisions"]
    }
    found = {
        u.audio_path.stem: (u.text, u.speaker, u.duration_s) for u in read(tmp_path, part.name)
    }
    assert found == expected


@pytest.mark.parametrize("named", ["", "LibriSpeech", "LibriSpeech/dev-clean-2"])
def test_librispeech_takes_the_folder_above_the_corpus_or_a_subset(
    named: str, tmp_path: Path
) -> None:
    write_librispeech(tmp_path / "LibriSpeech", "dev-clean-2", DEV)
    prepare_librispeech(tmp_path / named, tmp_path / "out")
    (utterance,) = read(tmp_path / "out", "dev-clean-2")
    assert utterance.corpus == "librispeech-dev-clean-2"
    assert utterance.audio_path.is_file()


def test_librispeech_prepares_the_named_subsets_alone(tmp_path: Path) -> None:
    write_librispeech(tmp_path, "train-clean-5", TRAIN)
    write_librispeech(tmp_path, "dev-clean-2", DEV)
    prepare_librispeech(tmp_path, tmp_path / "out", subsets=["dev-clean-2"])
    assert list(written(tmp_path / "out")) == ["dev-clean-2.jsonl"]
    with pytest.raises(TrainingError, match=r"no subset test-clean; it has dev-clean-2, train"):
        prepare_librispeech(tmp_path, tmp_path / "out", subsets=["test-clean"])


def test_librispeech_leaves_out_what_cannot_be_used_and_goes_on(tmp_path: Path) -> None:
    extra = {f"84-121123-000{n}": "ACE" for n in range(2, 6)}
    part = write_librispeech(tmp_path, "train-clean-5", TRAIN | extra)
    chapter = part / "84" / "121123"
    cut_off(chapter / "84-121123-0002.flac")
    (chapter / "84-121123-0003.flac").write_text("no audio")
    (chapter / "84-121123-0004.flac").unlink()
    record(chapter / "84-121123-0009.flac")
    listing = chapter / "84-121123.trans.txt"
    lines = listing.read_text().replace("0005 ACE", "0005") + "84-121123-0000 TWICE\n\n"
    listing.write_text(lines)
    record(chapter / "84-121123-0006.flac")
    listing.write_text(lines + "84-121123-0006 ...\n")
    record(part / "85" / "1" / "85-1-0000.flac")
    (part / "85" / "1" / "85-1.trans.txt").write_bytes("85-1-0000 CAFÉ\n".encode("latin-1"))
    (chapter / "._84-121123-0000.flac").write_text("what another system leaves behind")
    report = prepare_librispeech(tmp_path, tmp_path / "out")
    assert set(texts(tmp_path / "out", "train-clean-5")) == {f"{name}.flac" for name in TRAIN}
    assert reasons(report) == {
        Reason.bad_audio: 2,
        Reason.no_audio: 1,
        Reason.no_text: 3,
        Reason.empty_text: 1,
        Reason.repeated: 1,
        Reason.bad_text: 1,
    }
    train_on(tmp_path / "out" / "train-clean-5.jsonl")


def test_librispeech_says_which_layout_it_expects(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no LibriSpeech subset in .*SPEAKER/CHAPTER"):
        prepare_librispeech(tmp_path, tmp_path / "out")
    with pytest.raises(TrainingError, match="is no folder"):
        prepare_librispeech(tmp_path / "missing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_download_fetches_the_named_subsets_and_prepares_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fetch(folder: Path, *, dataset_parts: list[str]) -> None:
        calls.append((folder, dataset_parts))
        write_librispeech(folder / "LibriSpeech", "dev-clean-2", DEV)
        write_librispeech(folder / "LibriSpeech", "train-clean-5", TRAIN)

    monkeypatch.setattr(prepare, "download_with_lhotse", fetch)
    corpora, output = tmp_path / "corpora", tmp_path / "out"
    wanted = ["--subset", "dev-clean-2", "--subset", "train-clean-5"]
    result = CliRunner().invoke(
        app,
        ["prepare", "librispeech", str(corpora), "--output", str(output), "--download", *wanted],
    )
    assert result.exit_code == 0, result.output
    assert calls == [(corpora, ["dev-clean-2", "train-clean-5"])]
    assert sorted(written(output)) == ["dev-clean-2.jsonl", "train-clean-5.jsonl"]


@pytest.mark.parametrize("subsets", [[], ["dev-clean-3"], ["dev-clean-2", "mini_librispeech"]])
def test_download_refuses_what_is_no_subset(
    subsets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "download_with_lhotse", pytest.fail)
    with pytest.raises(TrainingError, match=r"--subset: dev-clean-2, train-clean-5, dev-clean"):
        download_librispeech(tmp_path, subsets)


def test_download_that_fails_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(prepare, "download_with_lhotse", fail)
    with pytest.raises(TrainingError, match=r"dev-clean-2 .* no route to host.*again"):
        download_librispeech(tmp_path, ["dev-clean-2"])


# Common Voice


def test_common_voice_gives_train_dev_and_test(tmp_path: Path) -> None:
    release = tmp_path / "cv-corpus-17.0-2024-03-15"
    write_release(
        release / "en",
        {
            "train": [
                ("a1", "en_1.mp3", '"Bad" cab, no. 7!'),
                ("a2", "en_2.mp3", 'An "open quote'),
            ],
            "dev": [("b1", "en_3.mp3", "Ace\u2019s bead")],
            "test": [("c1", "en_4.mp3", "Add")],
            "other": [("d1", "en_5.mp3", "Dead")],
        },
    )
    output = tmp_path / "out"
    report = prepare_common_voice(release, output)
    assert sorted(written(output)) == ["dev.jsonl", "test.jsonl", "train.jsonl"]
    first, second = read(output, "train")
    assert first.name == "../cv-corpus-17.0-2024-03-15/en/clips/en_1.mp3"
    assert (first.text, first.speaker, first.corpus) == (
        "bad cab no seven",
        "a1",
        "common-voice-en",
    )
    assert first.duration_s == pytest.approx(7 * 0.12, abs=1e-3)
    assert second.text == "an open quote"
    assert texts(output, "dev") == {"en_3.mp3": "ace's bead"}
    assert report.left_out == ()
    assert len(train_on(*(m.path for m in report.manifests))) == 4


@pytest.mark.parametrize("named", ["", "cv-corpus-7.0", "cv-corpus-7.0/cy"])
def test_common_voice_takes_old_releases_of_any_language_from_any_level(
    named: str, tmp_path: Path
) -> None:
    columns = ("client_id", "path", "sentence", "accent")
    rows = {"train": [("s", "clip_1", "Bore da")]}
    write_release(tmp_path / "cv-corpus-7.0" / "cy", rows, columns=columns)
    prepare_common_voice(tmp_path / named, tmp_path / "out", language="cy")
    (utterance,) = read(tmp_path / "out", "train")
    assert (utterance.text, utterance.corpus) == ("bore da", "common-voice-cy")
    assert utterance.audio_path.name == "clip_1.mp3"


def test_common_voice_validated_has_no_speaker_of_dev_or_test(tmp_path: Path) -> None:
    rows = {"train": ("a", "1.mp3"), "dev": ("b", "2.mp3"), "test": ("c", "3.mp3")}
    tables = {name: [(*row, "Ace")] for name, row in rows.items()}
    everything = [row for table in tables.values() for row in table]
    write_release(
        tmp_path,
        {**tables, "validated": [*everything, ("b", "4.mp3", "Bee"), ("d", "5.mp3", "Add")]},
    )
    report = prepare_common_voice(tmp_path, tmp_path / "out", subsets=["validated", "dev"])
    assert {u.speaker for u in read(tmp_path / "out", "validated")} == {"a", "d"}
    assert {u.speaker for u in read(tmp_path / "out", "dev")} == {"b"}
    assert reasons(report) == {Reason.held_out: 3}


def test_common_voice_leaves_out_what_cannot_be_used_and_goes_on(tmp_path: Path) -> None:
    rows = [("s", f"{n}.mp3", "Ace") for n in range(4)]
    long_name = "x" * 5000
    bad = [("s", "4.mp3", " "), ("s", "5.mp3", "你好"), ("s", "0.mp3", "Again")]
    folder = write_release(tmp_path, {"train": [*rows, *bad]})
    cut_off(folder / "clips" / "1.mp3")
    (folder / "clips" / "2.mp3").write_bytes(b"")
    (folder / "clips" / "3.mp3").unlink()
    with (folder / "train.tsv").open("a", encoding="utf-8") as file:
        file.write(f"s\t{long_name}\tAce\n\nonly one cell\n")
    report = prepare_common_voice(tmp_path, tmp_path / "out")
    assert texts(tmp_path / "out", "train") == {"0.mp3": "ace"}
    assert reasons(report) == {
        Reason.bad_audio: 2,
        Reason.no_audio: 3,
        Reason.no_text: 1,
        Reason.empty_text: 1,
        Reason.repeated: 1,
    }
    train_on(tmp_path / "out" / "train.jsonl")


def test_common_voice_says_what_is_missing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    for release in ("cv-corpus-1", "cv-corpus-2"):
        write_release(tmp_path / release / "en", {"validated": [("s", "1.mp3", "Ace")]})
    with pytest.raises(TrainingError, match=r"no Common Voice release of the language 'de'"):
        prepare_common_voice(tmp_path, output, language="de")
    with pytest.raises(TrainingError, match=r"several releases: .*cv-corpus-1.*cv-corpus-2"):
        prepare_common_voice(tmp_path, output)
    with pytest.raises(TrainingError, match=r"no train.tsv, .*it has validated.tsv: .*--subset"):
        prepare_common_voice(tmp_path / "cv-corpus-1", output)
    with pytest.raises(TrainingError, match=r"has no other.tsv; it has validated.tsv"):
        prepare_common_voice(tmp_path / "cv-corpus-1", output, subsets=["other"])
    (tmp_path / "cv-corpus-2" / "en" / "reported.tsv").write_text("sentence\treason\nAce\tbad\n")
    with pytest.raises(TrainingError, match=r"reported.tsv has no column client_id, path"):
        prepare_common_voice(tmp_path / "cv-corpus-2", output, subsets=["reported"])


# A folder of recordings


def test_folder_takes_every_format_with_a_text_beside_it(tmp_path: Path) -> None:
    rates = {
        "wav": 8000,
        "flac": 44_100,
        "ogg": 22_050,
        "opus": 48_000,
        "mp3": 16_000,
        "WAV": 16_000,
    }
    for extension, sample_rate in rates.items():
        path = record(tmp_path / "in" / f"{extension}1.{extension}", sample_rate=sample_rate)
        path.with_suffix(".txt").write_text(f"\ufeffIt's {extension},\n\nno.\t1\n")
    output = tmp_path / "out"
    report = prepare_folder(tmp_path / "in", output, dev_share=0)
    assert sorted(texts(output).values(), key=str) == sorted(
        f"it's {extension.lower().replace('mp3', 'mp three')} no one" for extension in rates
    )
    assert {u.corpus for u in read(output)} == {"in"}
    assert {u.speaker for u in read(output)} == {""}
    assert all(u.duration_s == pytest.approx(7 * 0.12, abs=0.01) for u in read(output))
    assert report.left_out == ()
    assert len(train_on(output / "all.jsonl")) == len(rates)


def test_folder_takes_the_top_folder_as_speaker(tmp_path: Path) -> None:
    paths = ("anna/1.wav", "anna/chapter/x/2.wav", "bob/wavs/3.wav", "4.wav", "wavs/5.wav")
    for name in paths:
        record(tmp_path / name).with_suffix(".txt").write_text("ace")
    prepare_folder(tmp_path, tmp_path, dev_share=0, corpus="mine")
    assert {u.name: u.speaker for u in read(tmp_path)} == dict(
        zip(paths, ("anna", "anna", "bob", "", ""), strict=True)
    )
    assert {u.corpus for u in read(tmp_path)} == {"mine"}


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("metadata.csv", ["a|Bad cab, no. 1", 'b|An "open quote', "c|Ace"]),
        ("metadata.csv", ["a|Bad cab, no. 1|x", 'b|An "open quote|x', "c|Ace|x"]),
        ("metadata.csv", ["a|Bad|bad cab no. one", "b|An|an open quote", "c|Ace|ace"]),
        ("metadata.csv", ['a.wav,"Bad cab, no. 1"', "b.wav,an open quote", "c.wav,ace"]),
        ("transcripts.tsv", ["a.wav\tBad cab, no. 1", 'b.wav\tAn "open quote', "c.wav\tAce"]),
        (
            "transcripts.tsv",
            ["wavs/a.wav\tBad cab, no. 1", "wavs/b\tAn open quote", "./wavs/c\tAce"],
        ),
        (
            "transcripts.csv",
            ["a|Bad cab no 1", "b|An open quote", "c|Ace"],
        ),
        (
            "metadata.csv",
            ["id,file_name,Text", '1,wavs/a.wav,"Bad cab, no. 1"', "2,b,An open quote", "3,c,Ace"],
        ),
        (
            "metadata.tsv",
            [
                "text\tfile\r",
                "Bad cab no. 1\ta\r",
                "An open quote\tb\r",
                "Ace\t..\\in\\wavs\\c.wav\r",
            ],
        ),
    ],
)
def test_folder_takes_lists_of_names_and_texts(name: str, lines: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for stem in "abc":
        record(folder / "wavs" / f"{stem}.wav")
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    report = prepare_folder(folder, tmp_path / "out", dev_share=0)
    assert report.left_out == ()
    expected = {"a.wav": "bad cab no one", "b.wav": "an open quote", "c.wav": "ace"}
    assert texts(tmp_path / "out") == expected


def test_folder_takes_speakers_from_a_list(tmp_path: Path) -> None:
    for stem in "abc":
        record(tmp_path / "anna" / f"{stem}.wav")
    lines = ["path|speaker_id|text", "a|s1|Ace", "b|s2|Bee", "c||Cab"]
    (tmp_path / "anna" / "metadata.csv").write_text("\n".join(lines))
    prepare_folder(tmp_path, tmp_path, dev_share=0)
    assert [u.speaker for u in read(tmp_path)] == ["s1", "s2", "anna"]


def test_folder_takes_lists_and_texts_beside_each_other(tmp_path: Path) -> None:
    for name in ("one/a.wav", "two/a.wav", "three/b.wav"):
        record(tmp_path / name)
    (tmp_path / "one" / "metadata.csv").write_text("a|from the list of one")
    (tmp_path / "two" / "metadata.csv").write_text("a|from the list of two")
    (tmp_path / "two" / "a.txt").write_text("not from here")
    (tmp_path / "three" / "b.txt").write_text("from beside it")
    report = prepare_folder(tmp_path, tmp_path, dev_share=0)
    assert {u.name: u.text for u in read(tmp_path)} == {
        "one/a.wav": "from the list of one",
        "two/a.wav": "from the list of two",
        "three/b.wav": "from beside it",
    }
    assert report.left_out == ()


@pytest.mark.parametrize(
    "lines",
    [
        ["a.wav,bad cab, no. 1", "b.wav,ace"],
        ["file,text", "a.wav,bad cab, no. 1"],
        ['a.wav,"bad cab', "b.wav,ace"],
        ['a.wav,"bad cab', 'b.wav,ace"'],
        ["a.wav", "b.wav"],
        [],
    ],
)
def test_folder_refuses_a_list_whose_texts_it_would_cut(lines: list[str], tmp_path: Path) -> None:
    for stem in "ab":
        record(tmp_path / f"{stem}.wav")
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    with pytest.raises(TrainingError, match=r"1 × unreadable text: metadata.csv \("):
        prepare_folder(tmp_path, tmp_path / "out")


def test_folder_leaves_out_what_cannot_be_used_and_goes_on(tmp_path: Path) -> None:
    folder = write_speakers(tmp_path / "in", anna=8)
    anna = folder / "anna"
    (anna / "0.txt").unlink()
    (anna / "1.wav").unlink()
    (anna / "2.wav").write_bytes((anna / "2.wav").read_bytes()[:44])  # a header alone
    (anna / "3.wav").write_text("no audio")
    (anna / "4.txt").write_text("?!")
    (anna / "5.txt").write_bytes("café".encode("latin-1"))
    (anna / "6.txt").write_text(" \n")
    record(anna / "7.flac").rename(anna / "7.oga")  # a text belongs to one recording
    record(folder / "mp3" / "a.mp3").with_suffix(".txt").write_text("cut off")
    cut_off(folder / "mp3" / "a.mp3")
    (folder / "metadata.csv").write_text("gone|nobody said it\nanna/7.oga|ace\n7.oga|again\n")
    report = prepare_folder(folder, tmp_path / "out", dev_share=0)
    assert texts(tmp_path / "out") == {"7.oga": "ace"}
    assert reasons(report) == {
        Reason.no_text: 2,
        Reason.no_audio: 2,
        Reason.bad_audio: 3,
        Reason.empty_text: 1,
        Reason.bad_text: 1,
        Reason.repeated: 2,
    }
    named = "\n".join(describe(report.left_out))
    assert "anna/3.wav" in named
    assert "its header says" in named
    train_on(tmp_path / "out" / "all.jsonl")


def test_folder_leaves_out_samples_that_are_not_numbers(tmp_path: Path) -> None:
    for stem, sample in (("a", 0.1), ("b", np.nan), ("c", np.inf)):
        waveform = np.full(8000, sample, np.float32)
        soundfile.write(tmp_path / f"{stem}.wav", waveform, 16_000, subtype="FLOAT")
        (tmp_path / f"{stem}.txt").write_text("ace")
    report = prepare_folder(tmp_path, tmp_path, dev_share=0)
    assert list(texts(tmp_path)) == ["a.wav"]
    assert reasons(report) == {Reason.bad_audio: 2}


def test_folder_leaves_out_names_that_a_manifest_cannot_hold(tmp_path: Path) -> None:
    for name in (os.fsdecode(b"caf\xe9"), "café"):
        record(tmp_path / "new.wav").rename(tmp_path / f"{name}.wav")
        (tmp_path / f"{name}.txt").write_text("ace")
    report = prepare_folder(tmp_path, tmp_path, dev_share=0)
    assert [u.name for u in read(tmp_path)] == ["café.wav"]
    assert reasons(report) == {Reason.bad_name: 1}
    assert "\n".join(describe(report.left_out)).encode()


def test_folder_splits_by_speaker(tmp_path: Path) -> None:
    folder = write_speakers(tmp_path / "in", **{f"s{n}": 2 for n in range(20)})
    report = prepare_folder(folder, tmp_path / "out", dev_share=0.2)
    train, dev = read(tmp_path / "out", "train"), read(tmp_path / "out", "dev")
    assert not {u.speaker for u in train} & {u.speaker for u in dev}
    assert len({u.speaker for u in dev}) == 4
    assert len(train) + len(dev) == 40
    assert report.warnings == ()
    assert len(train_on(*(m.path for m in report.manifests))) == 40


def test_folder_gives_dev_a_whole_speaker_however_small_its_share(tmp_path: Path) -> None:
    folder = write_speakers(tmp_path / "in", anna=6, bob=4, cleo=5)
    prepare_folder(folder, tmp_path / "out", dev_share=0.01)
    assert [u.speaker for u in read(tmp_path / "out", "dev")] == ["bob"] * 4


@pytest.mark.parametrize("speaker", ["anna", "wavs"])
def test_folder_splits_by_utterance_and_warns_where_one_speaker_or_none_is_known(
    speaker: str, tmp_path: Path
) -> None:
    folder = write_speakers(tmp_path / "in", **{speaker: 10})
    report = prepare_folder(folder, tmp_path / "out", dev_share=0.3)
    train, dev = texts(tmp_path / "out", "train"), texts(tmp_path / "out", "dev")
    assert dev
    assert not train.keys() & dev.keys()
    assert len(train) + len(dev) == 10
    shares = {m.path.stem: m.duration_s for m in report.manifests}
    assert shares["dev"] <= 0.3 * sum(shares.values())
    (warning,) = report.warnings
    assert "the split is by utterance" in warning
    assert ("(anna)" in warning) == (speaker == "anna")


def test_folder_keeps_utterances_of_unknown_speakers_in_train(tmp_path: Path) -> None:
    folder = write_speakers(tmp_path / "in", anna=2, bob=2, wavs=9)
    report = prepare_folder(folder, tmp_path / "out", dev_share=0.5)
    assert all(u.speaker for u in read(tmp_path / "out", "dev"))
    assert report.warnings == ("9 utterances without a known speaker are in train",)


def test_folder_does_not_split_a_single_utterance(tmp_path: Path) -> None:
    report = prepare_folder(write_speakers(tmp_path / "in", anna=1), tmp_path / "out")
    assert list(written(tmp_path / "out")) == ["all.jsonl"]
    assert report.warnings == ("one utterance cannot be split; it is in all.jsonl",)


def test_folder_gives_the_same_manifests_again(tmp_path: Path) -> None:
    folder = write_speakers(tmp_path / "in", anna=3, bob=4, cleo=5, dora=2)
    output = tmp_path / "out"
    prepare_folder(folder, output, dev_share=0.3)
    first = written(output)
    prepare_folder(folder, output, dev_share=0.3, n_threads=4)
    assert written(output) == first
    elsewhere = tmp_path / "some" / "where"
    prepare_folder(folder, elsewhere, dev_share=0.3)
    assert texts(elsewhere, "dev") == texts(output, "dev")
    assert all(u.audio_path.is_file() for u in read(elsewhere, "dev"))


def test_folder_paths_lead_out_of_a_linked_output(tmp_path: Path) -> None:
    folder = write_speakers(tmp_path / "in", anna=1)
    (tmp_path / "deep" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "out")
    prepare_folder(folder, tmp_path / "link", dev_share=0)
    (utterance,) = read(tmp_path / "link")
    assert utterance.audio_path.is_file()
    train_on(tmp_path / "link" / "all.jsonl")


def test_folder_reports_its_progress(tmp_path: Path) -> None:
    folder = write_speakers(tmp_path / "in", anna=3, bob=2)
    (folder / "bob" / "0.txt").unlink()
    seen: list[tuple[int, int]] = []
    prepare_folder(folder, tmp_path / "out", on_progress=lambda *done: seen.append(done))
    assert seen == [(n, 5) for n in range(1, 6)]


def test_folder_without_recordings_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("ace")
    with pytest.raises(TrainingError, match=r"no recordings in .*\.txt of the same name"):
        prepare_folder(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_of_which_nothing_can_be_used_says_why_and_writes_nothing(tmp_path: Path) -> None:
    folder = write_speakers(tmp_path / "in", anna=5, bob=1)
    for path in (folder / "anna").glob("*.txt"):
        path.unlink()
    (folder / "bob" / "0.wav").write_bytes(b"RIFF")
    (tmp_path / "out").mkdir()
    with pytest.raises(TrainingError) as caught:
        prepare_folder(folder, tmp_path / "out")
    message = str(caught.value)
    assert "5 × no text: anna/0.wav; anna/1.wav; anna/2.wav; and 2 more" in message
    assert "1 × unreadable audio: bob/0.wav (" in message
    assert "expected recordings" in message
    assert written(tmp_path / "out") == {}


def test_manifests_are_kept_when_new_ones_cannot_be_written(tmp_path: Path) -> None:
    folder, output = write_speakers(tmp_path / "in", anna=2, bob=2), tmp_path / "out"
    prepare_folder(folder, output)
    before = written(output)
    write_speakers(folder, cleo=2)
    (output / ".dev.jsonl.unfinished").mkdir()
    with pytest.raises(TrainingError, match="cannot write the manifests"):
        prepare_folder(folder, output)
    (output / ".dev.jsonl.unfinished").rmdir()
    assert written(output) == before
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="name another --output"):
        prepare_folder(folder, tmp_path / "file")


def test_describe_puts_the_most_frequent_reason_first() -> None:
    lines = describe([LeftOut("a", Reason.no_text), *[LeftOut("b", Reason.bad_audio, "why")] * 2])
    assert lines == ["2 × unreadable audio: b (why); b (why)", "1 × no text: a"]


# The command


def test_command_prints_what_was_written_and_left_out(tmp_path: Path) -> None:
    folder = write_speakers(tmp_path / "in", anna=3, bob=2)
    (folder / "bob" / "[red].wav").write_text("no audio")
    output = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["prepare", "folder", str(folder), "--output", str(output), "--corpus", "ours"]
    )
    assert result.exit_code == 0, result.output
    rows = [line.strip("│ ").split() for line in result.stdout.splitlines() if ".jsonl" in line]
    assert [row[::2] for row in rows if row][:2] == [
        ["train.jsonl", "3", "0.00", "1"],
        ["dev.jsonl", "2", "0.00", "1"],
    ]
    assert "1 left out\n  1 × no text: bob/[red].wav\n" in result.stdout
    assert {u.corpus for u in read(output, "train")} == {"ours"}


def test_command_prepares_common_voice(tmp_path: Path) -> None:
    write_release(tmp_path / "de", {"validated": [("s", "1.mp3", "Ace")]})
    arguments = ["--language", "de", "--subset", "validated", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["prepare", "commonvoice", str(tmp_path), *arguments])
    assert result.exit_code == 0, result.output
    assert texts(tmp_path / "out", "validated") == {"1.mp3": "ace"}


def test_command_ends_with_2_and_one_message_where_nothing_is_found(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service.cli", "prepare", "folder", str(tmp_path)]
    command += ["--output", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, check=False, text=True)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert f"voxgate: no recordings in {tmp_path}; expected recordings" in result.stderr


def test_manifest_lines_are_json_with_the_five_fields(tmp_path: Path) -> None:
    prepare_folder(write_speakers(tmp_path / "in", anna=1), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "all.jsonl").read_text()) == {
        "audio_filepath": "../in/anna/0.wav",
        "duration": 0.72,
        "text": "anna zero",
        "speaker": "anna",
        "corpus": "in",
    }
