"""Batch transcription: which recordings, where their transcripts go, one after another."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath

from service.audio import AUDIO_EXTENSIONS, Stopwatch, load_blocks
from service.decoding.hypothesis import Phrase
from service.errors import AudioError, InputError
from service.manifest import read_manifest
from service.recogniser import DecoderName, Recogniser
from service.transcript import Format, Transcript, write_as


@dataclass(frozen=True)
class Job:
    """One recording to transcribe."""

    audio_path: Path
    name: str
    """The recording as the user named it."""
    output_stem: PurePosixPath
    """Path of the transcript below the output folder, without extension."""


@dataclass(frozen=True)
class Outcome:
    """What became of a job: a transcript or an error."""

    job: Job
    transcript: Transcript | None
    error: str
    warning: str = ""
    """What is strange about the recording."""


def find_jobs(paths: Sequence[Path], *, output: Path | None) -> list[Job]:
    """List the recordings that files, folders and manifests name.

    Folders are walked for known audio extensions; the output folder inside one is skipped.
    A recording that is named twice is transcribed once. Inputs whose transcripts would collide
    keep their extension, and where that does not help, their folders.

    Raises:
        InputError: two recordings cannot have transcripts of their own.
        ManifestError: a manifest cannot be read.
    """
    found = {job.audio_path.resolve(): job for path in paths for job in _expand(path, output)}
    jobs = list(found.values())
    for rename in (_keep_extension, _keep_folders):
        times = Counter(job.output_stem for job in jobs)
        jobs = [rename(job) if times[job.output_stem] > 1 else job for job in jobs]
    stems: dict[PurePosixPath, Job] = {}
    for job in jobs:
        other = stems.setdefault(job.output_stem, job)
        if other is not job:
            raise InputError(
                f"{other.name} and {job.name} would both be written to {job.output_stem}; "
                "transcribe them into folders of their own"
            )
    return jobs


def run_jobs(
    recogniser: Recogniser,
    jobs: Sequence[Job],
    *,
    decoder: DecoderName,
    n_best: int,
    n_threads: int,
    phrases: Sequence[Phrase] = (),
    on_audio: Callable[[float], object] = lambda _: None,
) -> Iterator[Outcome]:
    """Transcribe jobs on several threads; outcomes come in the order of the jobs.

    Args:
        recogniser: the loaded bundle.
        jobs: the recordings.
        decoder: how emissions are searched.
        n_best: alternatives wanted for each segment.
        n_threads: recordings that are transcribed at the same time.
        phrases: what is expected or unwanted.
        on_audio: called with the seconds of audio dealt with, from any thread.
    """

    def run(job: Job) -> Outcome:
        duration = Stopwatch(recogniser.sample_rate)
        missing_s: list[float] = []
        blocks = load_blocks(
            job.audio_path, target_rate=recogniser.sample_rate, on_shortage=missing_s.append
        )
        try:
            segments = list(
                recogniser.recognise_blocks(
                    duration.measure(blocks),
                    decoder=decoder,
                    n_best=n_best,
                    phrases=phrases,
                    on_audio=on_audio,
                )
            )
        except AudioError as error:
            return Outcome(job, None, str(error))
        transcript = Transcript(job.name, duration.seconds, segments)
        warnings = [
            f"it ends {seconds:.2f} s before its header says; it may be cut off: copy it again"
            for seconds in missing_s
        ]
        return Outcome(job, transcript, "", " ".join(warnings))

    with ThreadPoolExecutor(n_threads) as pool:
        waiting = iter(jobs)
        running: list[Future[Outcome]] = [
            pool.submit(run, job) for job in islice(waiting, 2 * n_threads)
        ]
        while running:
            yield running.pop(0).result()
            running += [pool.submit(run, job) for job in islice(waiting, 1)]


def write_transcript(transcript: Transcript, target: Path, output_format: Format) -> None:
    """Write a transcript so that `target` is whole or absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished")
    unfinished.write_text(write_as(transcript, output_format), encoding="utf-8")
    unfinished.replace(target)


def output_path(job: Job, output: Path, output_format: Format) -> Path:
    """Where a job's transcript goes."""
    return output / f"{job.output_stem}.{output_format}"


def _expand(path: Path, output: Path | None) -> list[Job]:
    if path.suffix == ".jsonl":
        return [
            Job(u.audio_path, u.name, _inside(PurePosixPath(u.name)).with_suffix(""))
            for u in read_manifest(path)
        ]
    if str(path) == "-":
        return [Job(Path("/dev/stdin"), "-", PurePosixPath("stdin"))]
    if path.is_dir():
        return [
            Job(found, str(found), PurePosixPath(found.relative_to(path).with_suffix("")))
            for found in _walk(path, output)
        ]
    return [Job(path, str(path), PurePosixPath(path.stem))]


def _walk(folder: Path, output: Path | None) -> Iterator[Path]:
    skipped = output.resolve() if output is not None else None
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if (Path(parent) / f).resolve() != skipped)
        for name in sorted(files):
            if Path(name).suffix.lower() in AUDIO_EXTENSIONS:
                yield Path(parent) / name


def _inside(name: PurePosixPath) -> PurePosixPath:
    """A manifest's path without what would lead out of the output folder."""
    return PurePosixPath(*(part for part in name.parts if part not in ("/", "..", ".")))


def _keep_extension(job: Job) -> Job:
    extension = job.audio_path.suffix
    return replace(job, output_stem=job.output_stem.with_name(job.output_stem.name + extension))


def _keep_folders(job: Job) -> Job:
    return replace(job, output_stem=_inside(PurePosixPath(job.name)))
