"""Corpora become manifests: LibriSpeech, Common Voice, or a folder of recordings and texts.

Every recording is decoded once, as training stops at one that it cannot read. What cannot be used
is left out, counted and named. The manifests appear when all of them are whole.
"""

from __future__ import annotations

import csv
import hashlib
import http.client
import io
import json
import os
import posixpath
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
import soundfile
from lhotse.audio import get_audio_duration_mismatch_tolerance
from lhotse.audio.backend import LibsndfileBackend, set_current_audio_backend
from lhotse.recipes import download_librispeech as download_with_lhotse
from lhotse.recipes.librispeech import LIBRISPEECH, MINI_LIBRISPEECH, parse_utterance

from service.audio import AUDIO_EXTENSIONS
from service.errors import AudioError, InputError, TrainingError
from service.manifest import Utterance
from service.text import normalise

_RUN_AHEAD: Final = 64  # recordings that are handed to each thread at a time
_BLOCK_FRAMES: Final = 1 << 20
_EXAMPLES: Final = 3  # names in the report for each reason
_LIBRISPEECH_FOLDER: Final = "LibriSpeech"
_CV_SPLIT: Final = ("train", "dev", "test")
_CV_HELD_OUT: Final = ("dev", "test")
_CV_COLUMNS: Final = ("client_id", "path", "sentence")
_LIST_NAMES: Final = frozenset(
    f"{name}{extension}" for name in ("transcripts", "metadata") for extension in (".tsv", ".csv")
)
# what a list may call its columns, the best first
_FILE_COLUMNS: Final = ("file", "file_name", "filename", "audio_filepath", "path", "audio", "id")
_TEXT_COLUMNS: Final = (
    "normalized_text",
    "normalised_text",
    "text",
    "transcript",
    "transcription",
    "sentence",
)
_SPEAKER_COLUMNS: Final = ("speaker", "speaker_id", "client_id")
_NO_SPEAKERS: Final = frozenset({"audio", "clips", "recordings", "wav", "wavs"})

_FOLDER_LAYOUTS: Final = (
    "expected recordings (wav, flac, ogg, opus, mp3) with a .txt of the same name beside each, or "
    "a transcripts.tsv or metadata.csv of lines such as `name|text`"
)


class Reason(str, Enum):
    """Why something is left out, as the report says it."""

    no_text = "no text"
    no_audio = "no audio"
    bad_audio = "unreadable audio"
    bad_text = "unreadable text"
    empty_text = "text empty after normalisation"
    repeated = "the same recording again"
    held_out = "speaker of dev or test"
    bad_name = "file name that is not UTF-8"


@dataclass(frozen=True)
class LeftOut:
    """Something of a corpus that no manifest has."""

    name: str
    """The file, relative to the corpus, or the list's line that names it."""
    reason: Reason
    detail: str = ""
    """What exactly is wrong, where there is more to say."""

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})" if self.detail else self.name


@dataclass(frozen=True)
class WrittenManifest:
    """A manifest and what it holds."""

    path: Path
    n_utterances: int
    duration_s: float
    """Of all its recordings, seconds."""
    n_speakers: int
    """Known ones."""


@dataclass(frozen=True)
class Report:
    """What became of a corpus; print it."""

    manifests: tuple[WrittenManifest, ...]
    left_out: tuple[LeftOut, ...]
    warnings: tuple[str, ...] = ()
    """What the user should know of the manifests."""


_Job = Callable[[], "Utterance | LeftOut"]
_Row = tuple[str, str, str]
"""File, text and speaker as a list names them."""


@dataclass(frozen=True)
class _Corpus:
    """Where a corpus is and where its manifests go; both folders without symbolic links."""

    name: str
    root: Path
    output: Path

    def show(self, path: Path) -> str:
        """A file as reports name it, printable whatever its bytes are."""
        return _printable(str(path.relative_to(self.root)))


def describe(left_out: Iterable[LeftOut]) -> list[str]:
    """Say how many were left out for each reason, the most frequent first, with examples."""
    by_reason = defaultdict(list)
    for each in left_out:
        by_reason[each.reason].append(each)
    lines = []
    for reason, those in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        examples = "; ".join(map(str, those[:_EXAMPLES]))
        n_more = len(those) - _EXAMPLES
        more = f"; and {n_more} more" if n_more > 0 else ""
        lines.append(f"{len(those)} × {reason.value}: {examples}{more}")
    return lines


# LibriSpeech


def download_librispeech(folder: Path, subsets: Sequence[str]) -> None:
    """Download subsets of LibriSpeech into `folder/LibriSpeech`; what is there stays.

    Args:
        folder: gets the archives and what they hold.
        subsets: such as `train-clean-5`.

    Raises:
        TrainingError: none or an unknown subset is named, or the download fails.
    """
    known = [*MINI_LIBRISPEECH, *LIBRISPEECH]
    unknown = [subset for subset in subsets if subset not in known]
    if unknown or not subsets:
        raise TrainingError(
            f"cannot download {', '.join(unknown) or 'no subset'}; name one or more with --subset: "
            f"{', '.join(known)} (train-clean-5 and dev-clean-2 are the smallest)"
        )
    try:
        download_with_lhotse(folder, dataset_parts=list(subsets))
    except (OSError, EOFError, http.client.HTTPException, tarfile.TarError, zlib.error) as error:
        raise TrainingError(
            f"the download of {', '.join(subsets)} into {folder} failed: {error}; run the command "
            "again to go on where it stopped, and delete the .tar.gz there if that fails, too"
        ) from error


def prepare_librispeech(
    folder: Path,
    output: Path,
    *,
    subsets: Sequence[str] = (),
    n_threads: int = 1,
    on_progress: Callable[[int, int], object] = lambda _done, _total: None,
) -> Report:
    """Write a manifest for each subset of a LibriSpeech tree.

    Utterances are read one by one, by the function that lhotse's recipe has for that: the recipe
    as a whole ends at the first file that cannot be read.

    Args:
        folder: holds the subsets, or `LibriSpeech` with the subsets, or is a subset.
        output: folder of the manifests, `SUBSET.jsonl`.
        subsets: those that are wanted; none named means all that are there.
        n_threads: recordings that are read at the same time.
        on_progress: called with the recordings read so far, and with all there are.

    Raises:
        TrainingError: the folder has another layout, or nothing in it can be used.
    """
    found = _find_subsets(_real_folder(folder))
    if not found:
        raise TrainingError(
            f"no LibriSpeech subset in {folder}; expected SUBSET/SPEAKER/CHAPTER/*.flac with "
            "*.trans.txt beside them: name the folder that holds the subsets, or fetch one with "
            "--download --subset dev-clean-2"
        )
    missing = [subset for subset in subsets if subset not in found]
    if missing:
        raise TrainingError(
            f"{folder} has no subset {', '.join(missing)}; it has {', '.join(found)}; "
            "--download fetches what is missing"
        )
    set_current_audio_backend(LibsndfileBackend())  # others need programs, or torchaudio's load
    parts = {}
    for subset in subsets or found:
        part = found[subset]
        corpus = _Corpus(f"librispeech-{subset}", part.parent, _make_folder(output))
        parts[subset] = list(_librispeech_jobs(corpus, part))
    utterances, left_out = _run(parts, n_threads=n_threads, on_progress=on_progress)
    return _finish(utterances, left_out, folder=folder, output=output)


def _find_subsets(folder: Path) -> dict[str, Path]:
    """Folders of the layout SPEAKER/CHAPTER/*.trans.txt, by name."""
    candidates = [folder, *_subfolders(folder), *_subfolders(folder / _LIBRISPEECH_FOLDER)]
    found = {path.name: path for path in candidates if any(path.glob("*/*/*.trans.txt"))}
    return dict(sorted(found.items()))


def _librispeech_jobs(corpus: _Corpus, part: Path) -> Iterator[_Job | LeftOut]:
    files = _list_files(part)
    audio = {path.stem: part / path for path in files if path.suffix == ".flac"}
    named = set()
    for path in (part / path for path in files if path.name.endswith(".trans.txt")):
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            yield LeftOut(corpus.show(path), Reason.bad_text, str(error))
            continue
        for line in filter(str.strip, lines):
            utterance_id, *text = line.split(maxsplit=1)
            named.add(utterance_id)
            if utterance_id not in audio:
                yield LeftOut(f"{corpus.show(path)}: {utterance_id}", Reason.no_audio)
            elif not text:
                yield LeftOut(corpus.show(audio[utterance_id]), Reason.no_text)
            else:
                yield partial(_examine_line, corpus, part, line)
    for utterance_id in sorted(audio.keys() - named):
        yield LeftOut(corpus.show(audio[utterance_id]), Reason.no_text)


def _examine_line(corpus: _Corpus, part: Path, line: str) -> Utterance | LeftOut:
    name = f"{part.name}: {line.split(maxsplit=1)[0]}"
    try:
        found = parse_utterance(part, line, {})
    except (OSError, UnicodeError, soundfile.LibsndfileError) as error:
        return LeftOut(name, Reason.bad_audio, str(error))
    if found is None:
        return LeftOut(name, Reason.no_audio, "not in the folder of its speaker and chapter")
    recording, supervision = found
    return _examine(
        corpus,
        Path(recording.sources[0].source),
        text=supervision.text,
        speaker=supervision.speaker,
    )


# Common Voice


def prepare_common_voice(
    folder: Path,
    output: Path,
    *,
    language: str = "en",
    subsets: Sequence[str] = (),
    n_threads: int = 1,
    on_progress: Callable[[int, int], object] = lambda _done, _total: None,
) -> Report:
    """Write a manifest for each table of a Common Voice release.

    The tables are read here, not by lhotse's recipe, which ends at the first clip that cannot be
    read and at releases that lack a column it wants but nobody needs (`variant`).

    Args:
        folder: holds the release, or is it, or is the folder of its language.
        output: folder of the manifests, `SUBSET.jsonl`.
        language: as the release calls it.
        subsets: tables that are wanted, such as `validated`; none named means train, dev and
            test, as far as they are there. Another table than these lists their clips again; it
            is taken without the speakers of dev and test.
        n_threads: recordings that are read at the same time.
        on_progress: called with the recordings read so far, and with all there are.

    Raises:
        TrainingError: the folder has another layout, or nothing in it can be used.
    """
    root = _find_language(_real_folder(folder), language)
    tables = {path.stem: path for path in sorted(root.glob("*.tsv"))}
    wanted = subsets or [name for name in _CV_SPLIT if name in tables]
    missing = [name for name in wanted if name not in tables]
    if missing or not wanted:
        raise TrainingError(
            f"{root} has no {', '.join(f'{name}.tsv' for name in missing or _CV_SPLIT)}; it has "
            f"{', '.join(path.name for path in tables.values()) or 'no table'}: "
            "name tables that are there with --subset"
        )
    corpus = _Corpus(f"common-voice-{language}", root, _make_folder(output))
    clips = frozenset(path.name for path in (root / "clips").iterdir())
    parts = {}
    for name in wanted:
        others = [] if name in _CV_SPLIT else [tables[n] for n in _CV_HELD_OUT if n in tables]
        held_out = {speaker for table in others for _, _, speaker in _read_table(table)} - {""}
        parts[name] = list(_common_voice_jobs(corpus, tables[name], clips, held_out))
    utterances, left_out = _run(parts, n_threads=n_threads, on_progress=on_progress)
    return _finish(utterances, left_out, folder=folder, output=output)


def _find_language(folder: Path, language: str) -> Path:
    found = [
        path
        for path in (folder, folder / language, *sorted(folder.glob(f"cv-corpus-*/{language}")))
        if (path / "clips").is_dir()
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise TrainingError(
            f"{folder} holds several releases: {', '.join(map(str, found))}; name one of them"
        )
    raise TrainingError(
        f"no Common Voice release of the language {language!r} in {folder}; expected "
        f"{language}/clips with train.tsv, dev.tsv and test.tsv beside it: unpack the release and "
        "name its folder, or another --language"
    )


def _read_table(path: Path) -> Iterator[_Row]:
    """Read a table of tabs; quotation marks have no meaning in it."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            header = file.readline().rstrip("\r\n").split("\t")
            missing = [name for name in _CV_COLUMNS if name not in header]
            if missing:
                raise TrainingError(
                    f"{path} has no column {', '.join(missing)}; expected a table of clips, whose "
                    f"first line names {', '.join(_CV_COLUMNS)}; it has {', '.join(header)}"
                )
            speaker, clip, text = (header.index(name) for name in _CV_COLUMNS)
            for line in filter(str.strip, file):
                cells = line.rstrip("\r\n").split("\t")
                yield _cell(cells, clip), _cell(cells, text), _cell(cells, speaker)
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"cannot read {path}: {error}; unpack the release again") from error


def _common_voice_jobs(
    corpus: _Corpus, table: Path, clips: frozenset[str], held_out: set[str]
) -> Iterator[_Job | LeftOut]:
    for clip, text, speaker in _read_table(table):
        name = clip if Path(clip).suffix else f"{clip}.mp3"  # early releases leave it out
        if name not in clips:
            yield LeftOut(f"{table.name}: {clip}", Reason.no_audio)
        elif speaker in held_out:
            yield LeftOut(f"{table.name}: {clip}", Reason.held_out)
        else:
            yield partial(
                _examine, corpus, corpus.root / "clips" / name, text=text, speaker=speaker
            )


# A folder of recordings


def prepare_folder(
    folder: Path,
    output: Path,
    *,
    corpus: str = "",
    dev_share: float = 0.1,
    n_threads: int = 1,
    on_progress: Callable[[int, int], object] = lambda _done, _total: None,
) -> Report:
    """Write manifests of a folder of recordings, with a text beside each or listed together.

    Args:
        folder: holds recordings at any depth; a speaker's are below a folder with the speaker's
            name, unless a list names the speakers.
        output: folder of the manifests: `train.jsonl` and `dev.jsonl`, or `all.jsonl` where
            nothing is split off.
        corpus: name in the manifests; default the folder's.
        dev_share: share of the hours that goes to the development set, as whole speakers where
            two or more are known, else as utterances; below 1.
        n_threads: recordings that are read at the same time.
        on_progress: called with the recordings read so far, and with all there are.

    Raises:
        TrainingError: nothing in the folder can be used.
    """
    assert 0 <= dev_share < 1
    root = _real_folder(folder)
    files = _list_files(root)
    if not any(path.suffix.lower() in AUDIO_EXTENSIONS for path in files):
        raise TrainingError(f"no recordings in {folder}; {_FOLDER_LAYOUTS}")
    jobs = list(_folder_jobs(_Corpus(corpus or root.name, root, _make_folder(output)), files))
    parts, left_out = _run({"all": jobs}, n_threads=n_threads, on_progress=on_progress)
    warnings: list[str] = []
    if dev_share > 0 and parts["all"]:
        parts, warnings = _split(parts["all"], dev_share, root)
    return _finish(
        parts,
        left_out,
        folder=folder,
        output=output,
        warnings=warnings,
        expected=_FOLDER_LAYOUTS,
    )


def _folder_jobs(corpus: _Corpus, files: Sequence[Path]) -> Iterator[_Job | LeftOut]:
    audio = [path for path in files if path.suffix.lower() in AUDIO_EXTENSIONS]
    names = _AudioNames(audio)
    listed: set[Path] = set()
    for path in (path for path in files if path.name.lower() in _LIST_NAMES):
        try:
            rows = _read_list(corpus.root / path)
        except InputError as error:
            yield LeftOut(_printable(str(path)), Reason.bad_text, str(error))
            continue
        for file, text, speaker in rows:
            recording = names.find(file, path.parent)
            if recording is None:
                yield LeftOut(_printable(f"{path}: {file}"), Reason.no_audio)
            elif recording in listed:
                yield LeftOut(_printable(f"{path}: {file}"), Reason.repeated)
            else:
                listed.add(recording)
                yield partial(
                    _examine,
                    corpus,
                    corpus.root / recording,
                    text=text,
                    speaker=speaker or _speaker_of(recording),
                )
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    spoken = {path.with_suffix("") for path in listed}
    for path in (path for path in audio if path not in listed):
        stem = path.with_suffix("")
        if stem in spoken:  # a text belongs to one recording, or it could be in both train and dev
            yield LeftOut(_printable(str(path)), Reason.repeated)
        elif stem not in texts:
            yield LeftOut(_printable(str(path)), Reason.no_text)
        else:
            spoken.add(stem)
            yield partial(_examine_beside, corpus, path, texts[stem])
    for stem in sorted(texts.keys() - spoken):
        yield LeftOut(_printable(str(texts[stem])), Reason.no_audio)


def _examine_beside(corpus: _Corpus, path: Path, text_path: Path) -> Utterance | LeftOut:
    try:
        text = (corpus.root / text_path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return LeftOut(_printable(str(text_path)), Reason.bad_text, str(error))
    return _examine(corpus, corpus.root / path, text=text, speaker=_speaker_of(path))


def _speaker_of(path: Path) -> str:
    """The topmost folder, unless it is one of those that only keep recordings apart from texts."""
    top = path.parts[0] if len(path.parts) > 1 else ""
    return "" if top.lower() in _NO_SPEAKERS else top


class _AudioNames:
    """Finds the recording that a line of a list means.

    Args:
        paths: of recordings, relative to the corpus.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._by_path: dict[str, Path] = {}
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        for path in paths:
            self._by_path.setdefault(path.with_suffix("").as_posix(), path)
            self._by_name[path.name].append(path)
            self._by_name[path.stem].append(path)
        self._by_path.update({path.as_posix(): path for path in paths})

    def find(self, name: str, folder: Path) -> Path | None:
        """Find by the path from the list's folder, else by a name that one file below it has."""
        wanted = posixpath.normpath(
            posixpath.join(folder.as_posix(), name.strip().replace("\\", "/"))
        )
        if wanted in self._by_path:
            return self._by_path[wanted]
        paths = self._by_name.get(posixpath.basename(wanted), [])
        below = [path for path in paths if path.is_relative_to(folder)]
        return below[0] if len(below) == 1 else None


def _read_list(path: Path) -> list[_Row]:
    """Read a list of recordings and texts, separated by tabs, by `|`, or as CSV.

    Raises:
        InputError: it is no such list.
    """
    try:
        rows, separator = _split_cells(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(str(error)) from error
    if max(map(len, rows), default=0) < 2:
        raise InputError("expected a line `name|text` for each recording, or tabs or commas")
    header = [cell.strip().lower() for cell in rows[0]]
    file, text = (_find_column(header, names) for names in (_FILE_COLUMNS, _TEXT_COLUMNS))
    has_header = file is not None and text is not None
    longest = max(rows, key=len)
    if separator == "," and len(longest) > (len(header) if has_header else 2):
        raise InputError(
            f"the line of {longest[0]!r} has {len(longest)} cells; put texts that have commas in "
            "quotation marks, and name more than two columns in a first line such as file,text"
        )
    if has_header:
        speaker = _find_column(header, _SPEAKER_COLUMNS)
        return [(_cell(row, file), _cell(row, text), _cell(row, speaker)) for row in rows[1:]]
    # LJSpeech writes numbers and abbreviations out in a third column, which makes it longer
    n_words = [sum(len(_cell(row, column).split()) for row in rows) for column in (1, 2)]
    column = 2 if n_words[1] > n_words[0] else 1
    return [(row[0], _cell(row, column), "") for row in rows]


def _split_cells(text: str) -> tuple[list[list[str]], str]:
    """The cells of each line, and what separates them: the first of tab, `|` and comma."""
    lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    separator = next((sign for sign in "\t|" if lines and sign in lines[0]), ",")
    if separator == ",":
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        rows = []
        for row in reader:
            if any("\n" in cell for cell in row):
                raise InputError(
                    f"the cell that ends on line {reader.line_num} goes over several lines: a "
                    "quotation mark before it is not closed"
                )
            rows += [row] if any(row) else []
        return rows, separator
    return [line.split(separator) for line in lines], separator


def _find_column(header: Sequence[str], names: Sequence[str]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)


def _cell(row: Sequence[str], column: int | None) -> str:
    return row[column].strip() if column is not None and column < len(row) else ""


def _split(
    utterances: Sequence[Utterance], dev_share: float, root: Path
) -> tuple[dict[str, list[Utterance]], list[str]]:
    """Split off a development set by speaker, or by utterance where speakers are not known.

    The names alone decide, so that the split is the same wherever the manifests are written.
    """
    speakers = {u.speaker for u in utterances} - {""}
    n_unknown = sum(not u.speaker for u in utterances)
    by_speaker = len(speakers) > 1

    def group(utterance: Utterance) -> str:
        return utterance.speaker if by_speaker else str(utterance.audio_path.relative_to(root))

    durations_s: dict[str, float] = defaultdict(float)
    for utterance in utterances:
        durations_s[group(utterance)] += utterance.duration_s or 0.0
    if by_speaker:
        durations_s.pop("", None)  # could be anybody: stays in training
    chosen = _choose(durations_s, dev_share)
    warnings = []
    if not chosen:
        return {"all": list(utterances)}, ["one utterance cannot be split; it is in all.jsonl"]
    if not by_speaker:
        known = f"one speaker ({next(iter(speakers))})" if speakers else "no speaker"
        warnings.append(
            f"{known} is known, so the split is by utterance: the same voices may be in train and "
            "dev, and error rates on dev will be lower than on new voices"
        )
    elif n_unknown:
        warnings.append(f"{n_unknown} utterances without a known speaker are in train")
    return {
        "train": [u for u in utterances if group(u) not in chosen],
        "dev": [u for u in utterances if group(u) in chosen],
    }, warnings


def _choose(durations_s: Mapping[str, float], share: float) -> set[str]:
    """Choose groups in the order of a hash of their names, as many as fit into the share.

    The shortest is chosen where none fits; none is where there is only one.
    """
    order = sorted(durations_s, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    room_s = share * sum(durations_s.values())
    chosen = set()
    for name in order:
        if durations_s[name] <= room_s:
            chosen.add(name)
            room_s -= durations_s[name]
    if not chosen and len(order) > 1:
        chosen = {min(order, key=lambda name: durations_s[name])}
    return chosen


# What all corpora share


def _real_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise TrainingError(
            f"{folder} is no folder; expected one that holds recordings: unpack an archive first"
        )
    return folder.resolve()


def _make_folder(output: Path) -> Path:
    """Make the folder of the manifests before the long work begins."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot make {output}: {error}; name another --output") from error
    return output.resolve()


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def _list_files(root: Path) -> list[Path]:
    """Files below a folder, relative to it, sorted; hidden ones are passed over."""
    found = []
    for parent, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(path.relative_to(root) for path in found)


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _examine(corpus: _Corpus, path: Path, *, text: str, speaker: str) -> Utterance | LeftOut:
    """Make an utterance of a recording, if training can use it."""
    shown = corpus.show(path)
    if _printable(str(path)) != str(path):
        return LeftOut(shown, Reason.bad_name)
    if not text.strip():
        return LeftOut(shown, Reason.no_text)
    spoken = normalise(text)
    if not spoken:
        return LeftOut(shown, Reason.empty_text, f"{text.strip():.40}")
    try:
        duration_s = _measure(path)
    except AudioError as error:
        return LeftOut(shown, Reason.bad_audio, str(error))
    return Utterance(
        audio_path=path,
        name=os.path.relpath(path, corpus.output),
        duration_s=duration_s,
        text=spoken,
        speaker=speaker,
        corpus=corpus.name,
    )


def _measure(path: Path) -> float:
    """Decode a recording to its end, as training does; return what its header says, seconds.

    Raises:
        AudioError: training would stop at it: it cannot be decoded, holds no samples or some that
            are no numbers, or is not as long as its header says.
    """
    n_frames = 0
    try:
        with soundfile.SoundFile(path) as file:
            duration_s = float(file.frames / file.samplerate)
            while len(block := file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)) > 0:
                n_frames += len(block)
                if not np.isfinite(block).all():
                    raise AudioError("it has samples that are not numbers: record it again")
            decoded_s = n_frames / file.samplerate
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{error.error_string} It may be cut off: copy it again") from error
    if n_frames == 0:
        raise AudioError("it holds no samples")
    if abs(duration_s - decoded_s) > get_audio_duration_mismatch_tolerance():
        raise AudioError(
            f"its header says {duration_s:.2f} s, but {decoded_s:.2f} s can be decoded; it may be "
            "cut off: copy it again"
        )
    return duration_s


def _run(
    parts: Mapping[str, Sequence[_Job | LeftOut]],
    *,
    n_threads: int,
    on_progress: Callable[[int, int], object],
) -> tuple[dict[str, list[Utterance]], list[LeftOut]]:
    """Examine the recordings of each part; the order of the jobs is kept."""
    n_done, n_jobs = 0, sum(map(len, parts.values()))
    found: dict[str, list[Utterance]] = {name: [] for name in parts}
    left_out = []
    with ThreadPoolExecutor(n_threads) as pool:
        for name, jobs in parts.items():
            seen = set()
            for result in _map(pool, jobs, n_ahead=_RUN_AHEAD * n_threads):
                n_done += 1
                on_progress(n_done, n_jobs)
                if isinstance(result, LeftOut):
                    left_out.append(result)
                elif result.name in seen:
                    left_out.append(LeftOut(result.name, Reason.repeated))
                else:
                    seen.add(result.name)
                    found[name].append(result)
    return found, left_out


def _map(
    pool: ThreadPoolExecutor, jobs: Sequence[_Job | LeftOut], *, n_ahead: int
) -> Iterator[Utterance | LeftOut]:
    waiting = iter(jobs)
    while piece := list(islice(waiting, n_ahead)):
        yield from pool.map(lambda job: job if isinstance(job, LeftOut) else job(), piece)


def _finish(
    parts: Mapping[str, Sequence[Utterance]],
    left_out: Sequence[LeftOut],
    *,
    folder: Path,
    output: Path,
    warnings: Sequence[str] = (),
    expected: str = "",
) -> Report:
    """Write a manifest for every part that has utterances."""
    manifests = {output / f"{name}.jsonl": part for name, part in parts.items() if part}
    if not manifests:
        raise TrainingError(
            "\n  ".join([f"nothing in {folder} can be used; left out:", *describe(left_out)])
            + (f"\n{expected}" if expected else "")
        )
    _write_manifests(manifests)
    empty = [name for name, part in parts.items() if not part]
    return Report(
        manifests=tuple(
            WrittenManifest(
                path=path,
                n_utterances=len(part),
                duration_s=sum(u.duration_s or 0.0 for u in part),
                n_speakers=len({u.speaker for u in part} - {""}),
            )
            for path, part in manifests.items()
        ),
        left_out=tuple(left_out),
        warnings=(*warnings, *(f"{name} has nothing that can be used" for name in empty)),
    )


def _write_manifests(manifests: Mapping[Path, Sequence[Utterance]]) -> None:
    """Write manifests so that all of them are whole, or none is there."""
    unfinished = {path: path.with_name(f".{path.name}.unfinished") for path in manifests}
    try:
        for path, utterances in manifests.items():
            unfinished[path].write_text("".join(map(_to_line, utterances)), encoding="utf-8")
        for path in manifests:
            unfinished[path].replace(path)
    except OSError as error:
        raise TrainingError(
            f"cannot write the manifests: {error}; name another --output, or make room there"
        ) from error
    finally:
        for path in unfinished.values():
            with suppress(OSError):
                path.unlink()


def _to_line(utterance: Utterance) -> str:
    row = {
        "audio_filepath": utterance.name,
        "duration": round(utterance.duration_s or 0.0, 4),
        "text": utterance.text,
        "speaker": utterance.speaker,
        "corpus": utterance.corpus,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"
