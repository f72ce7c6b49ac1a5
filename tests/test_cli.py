"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import CHECKOUT, RunningServer

from service.manifest import Utterance


def _voxgate(
    *arguments: str | Path, stdin: bytes | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "service.cli", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        check=False,
        env={**os.environ, "COLUMNS": "200", **environment},
    )
    return subprocess.CompletedProcess(
        result.args, result.returncode, result.stdout.decode(), result.stderr.decode()
    )


@pytest.fixture
def recordings(tmp_path: Path, clips: list[Utterance]) -> Path:
    """A folder of recordings: nested, two that would collide, one broken, one that is no audio."""
    folder = tmp_path / "recordings"
    (folder / "day one").mkdir(parents=True)
    samples, rate = soundfile.read(clips[1].audio_path)
    soundfile.write(folder / "a.wav", samples, rate)
    soundfile.write(folder / "a.flac", samples, rate)
    soundfile.write(folder / "day one" / "b.WAV", samples, rate)
    (folder / "notes.txt").write_text("not a recording")
    return folder


def test_transcribe_prints_one_transcript_a_line(clips: list[Utterance]) -> None:
    result = _voxgate("transcribe", clips[0].audio_path, clips[1].audio_path)
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(c.audio_path) for c in clips[:2]]
    assert all(re.fullmatch(r"[a-z' ]+", line.split("\t")[1]) for line in lines)
    assert "2 transcribed" in result.stderr
    alone = _voxgate("transcribe", "-", stdin=clips[0].audio_path.read_bytes())
    assert alone.stdout.strip() == lines[0].split("\t")[1]


def test_transcribe_gives_every_recording_a_file_of_its_own(
    recordings: Path, tmp_path: Path
) -> None:
    for day in ("monday", "tuesday"):
        (tmp_path / day).mkdir()
        shutil.copy(recordings / "a.wav", tmp_path / day / "1.wav")
    output = tmp_path / "out"
    folders = [tmp_path / day for day in ("monday", "tuesday", "monday")]
    result = _voxgate("transcribe", *folders, "--output", output, "--decoder", "greedy")
    assert "2 transcribed" in result.stderr
    written = [p.relative_to(output) for p in output.rglob("*.txt")]
    assert sorted(str(path)[-len("monday/1.wav.txt") :] for path in written) == [
        "monday/1.wav.txt",
        "uesday/1.wav.txt",
    ]


def test_transcribe_warns_of_a_recording_that_was_cut_off(recordings: Path) -> None:
    data = (recordings / "a.wav").read_bytes()
    (recordings / "cut.wav").write_bytes(data[: len(data) // 2])
    result = _voxgate("transcribe", recordings / "cut.wav", recordings / "a.wav")
    assert result.returncode == 0
    (warning,) = [line for line in result.stderr.splitlines() if "cut off" in line]
    half_s = soundfile.info(recordings / "a.wav").duration / 2
    assert re.search(rf"cut\.wav: it ends {half_s:.1f}\d s before its header says", warning)


def test_output_that_cannot_be_written_is_named(recordings: Path) -> None:
    output = recordings / "notes.txt"
    result = _voxgate("transcribe", recordings / "a.wav", "--output", output)
    assert result.returncode == 2
    assert f"voxgate: {output}: " in result.stderr
    assert "Traceback" not in result.stderr


def test_version_is_that_of_the_package() -> None:
    result = _voxgate("--version")
    assert (result.returncode, result.stdout) == (0, f"voxgate {version('voxgate')}\n")


def test_transcribe_json_has_the_documented_fields(clips: list[Utterance]) -> None:
    result = _voxgate("transcribe", clips[0].audio_path, "--format", "json", "--alternatives", "3")
    row = json.loads(result.stdout)
    assert set(row) == {
        "audio_filepath",
        "duration_s",
        "transcript",
        "confidence",
        "words",
        "alternatives",
    }
    assert row["audio_filepath"] == str(clips[0].audio_path)
    assert row["duration_s"] == pytest.approx(clips[0].duration_s, abs=0.05)
    assert " ".join(w["word"] for w in row["words"]) == row["transcript"]
    assert set(row["words"][0]) == {"word", "start_s", "end_s", "confidence"}
    assert len(row["alternatives"]) == 3
    assert row["alternatives"][0]["transcript"] == row["transcript"]


def test_transcribe_folder_writes_files_and_skips_its_output(recordings: Path) -> None:
    output = recordings / "out"
    for _ in range(2):  # the second time the folder holds its own output
        result = _voxgate("transcribe", recordings, "--output", output, "--decoder", "greedy")
        assert result.returncode == 0, result.stderr
        written = sorted(str(p.relative_to(output)) for p in output.rglob("*") if p.is_file())
        assert written == ["a.flac.txt", "a.wav.txt", "day one/b.txt"]
        assert result.stdout == ""
    assert (output / "a.wav.txt").read_text() == (output / "day one" / "b.txt").read_text()


def test_transcribe_reports_bad_files_and_goes_on(recordings: Path) -> None:
    (recordings / "letter.wav").write_text("Dear Sir or Madam, this is no recording.")
    (recordings / "empty.wav").write_bytes(b"")
    missing = recordings / "missing.wav"
    result = _voxgate("transcribe", recordings, missing, "--decoder", "greedy")
    assert result.returncode == 1
    assert len(result.stdout.splitlines()) == 3
    assert "3 transcribed" in result.stderr
    assert "3 failed" in result.stderr
    for name in ("letter.wav", "empty.wav", "missing.wav"):
        assert name in result.stderr


def test_transcribe_resume_leaves_out_what_exists(recordings: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "a.wav.txt").write_text("done before\n")
    result = _voxgate("transcribe", recordings, "--output", output, "--resume")
    assert result.returncode == 0
    assert "1 of 3 transcripts exist" in result.stderr
    assert (output / "a.wav.txt").read_text() == "done before\n"
    assert (output / "a.flac.txt").read_text() != ""


def test_transcribe_manifest_writes_below_output(
    recordings: Path, tmp_path: Path, clips: list[Utterance]
) -> None:
    manifest = recordings / "list.jsonl"
    rows = [
        {"audio_filepath": "a.wav", "duration": 1.0, "text": "x"},
        {"audio_filepath": "../" + clips[0].audio_path.name, "duration": 1.0},
    ]
    shutil.copy(clips[0].audio_path, recordings.parent)
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out"
    result = _voxgate("transcribe", manifest, "--output", output, "--format", "json")
    assert result.returncode == 0, result.stderr
    names = sorted(p.name for p in output.rglob("*") if p.is_file())
    assert names == sorted(["a.json", clips[0].audio_path.stem + ".json"])
    assert json.loads((output / "a.json").read_text())["audio_filepath"] == "a.wav"


@pytest.mark.parametrize(
    ("output_format", "first", "arrow"),
    [
        ("srt", r"1\n00:00:0\d,\d{3} --> 00:00:0\d,\d{3}\n[a-z' ]+\n", ","),
        ("vtt", r"WEBVTT\n\n00:00:0\d\.\d{3} --> 00:00:0\d\.\d{3}\n[a-z' ]+\n", "."),
    ],
)
def test_transcribe_writes_captions(
    clips: list[Utterance], output_format: str, first: str, arrow: str
) -> None:
    result = _voxgate("transcribe", clips[0].audio_path, "--format", output_format)
    assert re.match(first, result.stdout)
    times = re.findall(r"\d\d:\d\d:\d\d" + re.escape(arrow) + r"\d{3}", result.stdout)
    assert times == sorted(times)


@pytest.mark.parametrize(
    "arguments",
    [
        ["transcribe"],
        ["transcribe", "x.wav", "--decoder", "magic"],
        ["transcribe", "x.wav", "--bundle", "/nonexistent"],
        ["transcribe", "x.wav", "--resume"],
        ["transcribe", "x.wav", "y.wav", "--format", "srt"],
        ["stream", "x.wav", "--rate", "8000"],
        ["stream", "/nonexistent.wav"],
        ["health", "--tls-ca", "/nonexistent.pem"],
        ["transcribe", "/nonexistent.jsonl"],
        ["evaluate", "/nonexistent.jsonl"],
        ["nonsense"],
        ["train", "/nonexistent.toml"],
        ["export", "/nonexistent.pt", "never-written"],
    ],
)
def test_wrong_use_ends_with_status_2(arguments: list[str]) -> None:
    result = _voxgate(*arguments)
    assert result.returncode == 2
    assert result.stderr != ""
    assert "Traceback" not in result.stderr


def test_folder_without_recordings_is_wrong_use(tmp_path: Path) -> None:
    result = _voxgate("transcribe", tmp_path)
    assert result.returncode == 2
    assert "no recordings found" in result.stderr


def test_bundle_comes_from_the_environment(clips: list[Utterance], tmp_path: Path) -> None:
    result = _voxgate("transcribe", clips[0].audio_path, VOXGATE_BUNDLE=str(tmp_path / "none"))
    assert result.returncode == 2
    assert str(tmp_path / "none") in result.stderr


def test_evaluate_writes_the_documented_json(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = _voxgate(
        "evaluate", CHECKOUT / "examples" / "manifest.jsonl", "--json", report, "--threads", "1"
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(report.read_text())
    fields = {"wer", "cer", "n_words", "n_substitutions", "n_deletions", "n_insertions"}
    assert set(figures) == {"total", "corpora", "rtf", "failures"}
    assert set(figures["total"]) == {*fields, "wer_interval"}
    low, high = figures["total"]["wer_interval"]
    assert 0 <= low <= figures["total"]["wer"] <= high
    assert figures["corpora"] == {"librispeech-dev-clean": figures["total"]}
    assert figures["total"]["n_words"] == 110
    stages = {"features", "segmentation", "acoustic_model", "decoding", "total"}
    assert set(figures["rtf"]) == stages
    parts = sum(figures["rtf"][k] for k in ("features", "acoustic_model", "decoding"))
    assert figures["rtf"]["total"] == pytest.approx(parts)
    assert "librispeech-dev-clean" in result.stdout


def test_evaluate_counts_every_kind_of_error(tmp_path: Path, clips: list[Utterance]) -> None:
    """The reference is what is recognised, changed in known ways."""
    transcript = _voxgate("transcribe", clips[1].audio_path).stdout.split()
    reference = ["different", *transcript[1:], "missing", "words"]
    manifest = tmp_path / "m.jsonl"
    row = {"audio_filepath": str(clips[1].audio_path), "text": " ".join(reference)}
    manifest.write_text(json.dumps(row) + "\n")
    report = tmp_path / "report.json"
    _voxgate("evaluate", manifest, "--json", report)
    total = json.loads(report.read_text())["total"]
    assert (total["n_substitutions"], total["n_deletions"], total["n_insertions"]) == (1, 2, 0)
    assert total["wer"] == pytest.approx(3 / len(reference))


def test_evaluate_reports_unreadable_recordings(tmp_path: Path, clips: list[Utterance]) -> None:
    manifest = tmp_path / "m.jsonl"
    rows = [
        {"audio_filepath": str(clips[0].audio_path), "text": clips[0].text},
        {"audio_filepath": "gone.wav", "text": "nothing"},
    ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = tmp_path / "new" / "figures.json"
    result = _voxgate("evaluate", manifest, "--decoder", "greedy", "--json", figures)
    assert result.returncode == 1
    assert "gone.wav" in result.stderr
    (failure,) = json.loads(figures.read_text())["failures"]
    assert "gone.wav" in failure
    manifest.write_text(json.dumps(rows[1]) + "\n")
    assert _voxgate("evaluate", manifest, "--json", figures).returncode == 1
    assert json.loads(figures.read_text())["total"]["wer"] is None


def test_stream_prints_interim_and_final_results(
    server: RunningServer, clips: list[Utterance], tmp_path: Path
) -> None:
    wav = tmp_path / "clip.wav"
    soundfile.write(wav, *soundfile.read(clips[1].audio_path))
    result = _voxgate("stream", wav, "--address", server.address, "--realtime")
    assert result.returncode == 0, result.stderr
    kinds = [line.split()[0] for line in result.stdout.splitlines()]
    assert kinds[-1] == "final"
    assert kinds.count("interim") >= 3
    piped = _voxgate("stream", "-", "--address", server.address, stdin=wav.read_bytes())
    assert piped.stdout.splitlines()[-1].split()[2:] == result.stdout.splitlines()[-1].split()[2:]


def test_stream_takes_a_profile_and_declines_the_second_pass(
    server: RunningServer, clips: list[Utterance]
) -> None:
    arguments = ("stream", clips[1].audio_path, "--address", server.address, "--decoder", "greedy")
    fast = _voxgate(*arguments, "--profile", "fast", "--no-second-pass")
    assert fast.stdout.splitlines()[-1].startswith("final"), fast.stderr
    offline = _voxgate(*arguments, "--profile", "offline")
    assert {line.split()[0] for line in offline.stdout.splitlines()} == {"final"}
    wrong = _voxgate(*arguments, "--profile", "slow")
    assert wrong.returncode == 2
    assert "fast, balanced, offline" in wrong.stderr


def test_evaluate_measures_a_first_pass_and_names_the_profiles(
    tmp_path: Path, clips: list[Utterance]
) -> None:
    manifest = tmp_path / "m.jsonl"
    row = {"audio_filepath": str(clips[1].audio_path), "text": clips[1].text}
    manifest.write_text(json.dumps(row) + "\n")
    result = _voxgate("evaluate", manifest, "--decoder", "greedy", "--profile", "fast")
    assert result.returncode == 0, result.stderr
    assert "total" in result.stdout
    wrong = _voxgate("evaluate", manifest, "--profile", "slow")
    assert wrong.returncode == 2
    assert "fast, balanced" in wrong.stderr


def test_evaluate_measures_with_the_words_of_a_domain(
    tmp_path: Path, clips: list[Utterance]
) -> None:
    manifest, report = tmp_path / "m.jsonl", tmp_path / "report.json"
    row = {"audio_filepath": str(clips[0].audio_path), "text": clips[0].text}
    manifest.write_text(json.dumps(row) + "\n")
    wer = {}
    for domain in ([], ["--domain", "barista"]):
        result = _voxgate("evaluate", manifest, "--json", report, *domain)
        assert result.returncode == 0, result.stderr
        wer[bool(domain)] = json.loads(report.read_text())["total"]["wer"]
    assert wer[False] < wer[True]  # a book read aloud is no order of coffee
    wrong = _voxgate("evaluate", manifest, "--domain", "tea")
    assert wrong.returncode == 2
    assert "tea" in wrong.stderr


def test_transcribe_cuts_a_long_recording_and_keeps_its_clock(
    tmp_path: Path, clips: list[Utterance]
) -> None:
    waveform, rate = soundfile.read(clips[1].audio_path)
    noise = np.random.default_rng(1).normal(0, 1e-4, int(1.5 * rate))
    n_times = int(70 * rate / (len(waveform) + len(noise))) + 1
    path = tmp_path / "long.wav"
    soundfile.write(path, np.tile(np.concatenate([waveform, noise]), n_times), rate)
    result = _voxgate("transcribe", path, "--format", "json", "--decoder", "greedy")
    assert result.returncode == 0, result.stderr
    transcript = json.loads(result.stdout)
    starts = [word["start_s"] for word in transcript["words"]]
    assert starts == sorted(starts)
    period_s = (len(waveform) + len(noise)) / rate
    assert {int(start_s / period_s) for start_s in starts} == set(range(n_times))


def test_stream_without_server_says_how_to_start_one(clips: list[Utterance]) -> None:
    result = _voxgate("stream", clips[1].audio_path, "--address", "127.0.0.1:9")
    assert result.returncode == 2
    assert "voxgate serve" in result.stderr


def test_health_tells_by_its_exit_status(server: RunningServer) -> None:
    assert _voxgate("health", "--address", server.address).returncode == 0
    silent = _voxgate("health", "--address", "127.0.0.1:9")
    assert silent.returncode == 1
    assert "UNAVAILABLE" in silent.stderr


def test_training_commands_name_the_missing_packages(tmp_path: Path) -> None:
    """In the default install, without torch, they say which line installs it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('torch', 'tqdm') else real(name, *a)\n"
    )
    commands = ("train x.toml", "export a b", "lm build t --order 3 --output o")
    for arguments in map(str.split, commands):
        result = _voxgate(*arguments, PYTHONPATH=f"{tmp_path}{os.pathsep}{CHECKOUT}")
        assert result.returncode == 2
        assert "pip install 'voxgate[train]'" in result.stderr


def test_whole_path_from_recordings_to_transcript(tmp_path: Path) -> None:
    """train → export → lm build → transcribe on recordings made here, by the command line alone."""
    for part, speaker in (("train", "anna"), ("dev", "ben")):
        rows = []
        for i in range(8):
            word, pitch = (("low", 300), ("high", 1500))[i % 2]
            name = f"{part}{i}.wav"
            tone = 0.3 * np.sin(np.arange(16_000) * 2 * np.pi * pitch / 16_000)
            noise = np.random.default_rng(i).normal(0, 0.01, 24_000)
            soundfile.write(tmp_path / name, np.pad(tone, 4_000) + noise, 16_000)
            rows.append(
                {
                    "audio_filepath": name,
                    "duration": 1.5,
                    "text": word,
                    "speaker": speaker,
                    "corpus": "tones",
                }
            )
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{part}.jsonl").write_text(lines)
    (tmp_path / "config.toml").write_text(
        f"""
        [data]
        train = ["{tmp_path}/train.jsonl"]
        dev = ["{tmp_path}/dev.jsonl"]
        cache = "{tmp_path}/cache"
        n_jobs = 1
        speeds = [1.0]
        [model]
        n_layers = 1
        hidden_size = 32
        dropout = 0.0
        [optimiser]
        n_epochs = 40
        batch_s = 12.0
        learning_rate = 1e-2
        n_warmup_steps = 5
        average_decay = 0.5
        [run]
        directory = "{tmp_path}/run"
        precision = "float32"
        n_threads = 1
        evaluate_every_epochs = 20
        """
    )
    trained = _voxgate("train", tmp_path / "config.toml", "augment.level_db=0", "run.seed=3")
    assert trained.returncode == 0, trained.stderr
    text = tmp_path / "text.txt"
    text.write_text("low\nhigh\nlow low\nhigh low\nhigh high\n" * 5)
    built = _voxgate("lm", "build", text, "--order", "2", "--output", tmp_path / "lm")
    assert built.returncode == 0, built.stderr
    bundle = tmp_path / "tones"
    exported = _voxgate(
        "export",
        tmp_path / "run" / "last.pt",
        bundle,
        "--lm",
        tmp_path / "lm",
        "--dev",
        tmp_path / "dev.jsonl",
        "--weights",
        tmp_path / "w.pt",
    )
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "w.pt").stat().st_size < (tmp_path / "run" / "last.pt").stat().st_size / 2
    heard = _voxgate("transcribe", tmp_path / "dev0.wav", tmp_path / "dev1.wav", "--bundle", bundle)
    assert [line.split("\t")[1] for line in heard.stdout.splitlines()] == ["low", "high"]
