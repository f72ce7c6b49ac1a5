"""The command line: `voxgate`.

Each command reads its arguments, calls one function of the package that does the work, and prints.
Results go to stdout, everything else to stderr. Exit status: 0 all good, 1 something failed, 2
wrong use.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from service.bundle import BUNDLE_VARIABLE, find_bundle
from service.errors import MissingExtraError, VoxgateError
from service.processors import count_usable_processors

if TYPE_CHECKING:
    from service.batch import Job
    from service.evaluation import Evaluation
    from service.recogniser import DecoderName, Recogniser
    from training.prepare import Report

logger = logging.getLogger(__name__)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Voxgate: a speech recogniser that you host and retrain.",
)
lm_app = typer.Typer(no_args_is_help=True, help="Language models.")
app.add_typer(lm_app, name="lm")
bench_app = typer.Typer(no_args_is_help=True, help="Measurements.")
app.add_typer(bench_app, name="bench")
prepare_app = typer.Typer(no_args_is_help=True, help="Manifests of corpora, to train on.")
app.add_typer(prepare_app, name="prepare")
models_app = typer.Typer(no_args_is_help=True, help="Models of a running server.")
app.add_typer(models_app, name="models")
domain_app = typer.Typer(no_args_is_help=True, help="What to listen for, and what it means.")
app.add_typer(domain_app, name="domain")
keys_app = typer.Typer(no_args_is_help=True, help="Keys of a server's clients.")
app.add_typer(keys_app, name="keys")

_stderr = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)

DEFAULT_PORT: Final = 50051


class DecoderChoice(str, Enum):
    """How emissions are searched."""

    greedy = "greedy"
    beam = "beam"
    beam_characters = "beam-characters"
    beam_phones = "beam-phones"
    rescored = "rescored"
    reference = "reference"


class FormatChoice(str, Enum):
    """How transcripts are written."""

    txt = "txt"
    json = "json"
    srt = "srt"
    vtt = "vtt"


class ProviderChoice(str, Enum):
    """Where the acoustic model runs."""

    cpu = "cpu"
    cuda = "cuda"


class ApiChoice(str, Enum):
    """How audio is sent to a server."""

    streaming = "streaming"
    offline = "offline"


class UnsupportedChoice(str, Enum):
    """What is said to requests for what no model here can do."""

    reject = "reject"
    warn = "warn"


class LogFormatChoice(str, Enum):
    """How the log is written."""

    text = "text"
    json = "json"


BundleOption = Annotated[
    Path | None,
    typer.Option(
        "--bundle",
        metavar="DIR",
        help=f"Model folder; default ${BUNDLE_VARIABLE}, else bundles/en-small of the checkout.",
    ),
]
DecoderOption = Annotated[
    DecoderChoice | None,
    typer.Option("--decoder", help="Default the most accurate: rescored, else beam."),
]
BoostOption = Annotated[
    list[str] | None,
    typer.Option("--boost", metavar="PHRASE", help="Prefer a phrase; may be given many times."),
]
BoostWeightOption = Annotated[
    float,
    typer.Option("--boost-weight", help="What a phrase adds to the log score; negative avoids it."),
]
DomainOption = Annotated[
    str,
    typer.Option("--domain", metavar="NAME|DIR", help="Also say what was meant; see `domain`."),
]
AddressOption = Annotated[str, typer.Option("--address", metavar="H:P", help="The server.")]
ApiKeyOption = Annotated[
    str,
    typer.Option(
        "--api-key", envvar="VOXGATE_API_KEY", metavar="KEY", help="Where the server wants one."
    ),
]
TlsCaOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca", envvar="VOXGATE_TLS_CA", metavar="PEM", help="Speak TLS; who signed it."
    ),
]
TlsNameOption = Annotated[
    str,
    typer.Option(
        "--tls-name", envvar="VOXGATE_TLS_NAME", help="Name in the certificate, if not the host."
    ),
]
ClientCertificateOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-cert", envvar="VOXGATE_TLS_CERT", metavar="PEM", help="Where the server wants one."
    ),
]
ClientKeyOption = Annotated[
    Path | None,
    typer.Option("--tls-key", envvar="VOXGATE_TLS_KEY", metavar="PEM", help="Of --tls-cert."),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, metavar="N", help="Threads; default all usable processors."),
]
ManifestsOption = Annotated[
    Path, typer.Option("--output", metavar="DIR", help="Gets the manifests.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"voxgate {importlib.metadata.version('voxgate')}\n")
        raise typer.Exit


@app.callback()
def _take_common_options(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print and exit."),
    ] = False,
) -> None:
    pass  # `--version` has ended the program


def main() -> None:
    """Entry point of the console script."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        app()
    except VoxgateError as error:
        _fail(str(error), status=2)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:  # a folder that cannot be written, a full disk
        _fail(f"{error.filename or 'the output'}: {error.strerror or error}", status=2)


@app.command()
def transcribe(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Files, folders, .jsonl manifests.")
    ],
    *,
    bundle: BundleOption = None,
    decoder: DecoderOption = None,
    output_format: Annotated[FormatChoice, typer.Option("--format")] = FormatChoice.txt,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Write one file a recording below DIR."),
    ] = None,
    alternatives: Annotated[
        int, typer.Option("--alternatives", min=1, metavar="N", help="Readings in JSON.")
    ] = 1,
    boost: BoostOption = None,
    boost_weight: BoostWeightOption = 5.0,
    domain: DomainOption = "",
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out recordings whose transcript exists.")
    ] = False,
    threads: ThreadsOption = None,
) -> None:
    """Transcribe recordings; the channels of each are averaged."""
    from service.batch import output_path, run_jobs, write_transcript  # noqa: PLC0415
    from service.decoding.hypothesis import Phrase  # noqa: PLC0415
    from service.transcript import write_as  # noqa: PLC0415

    jobs = _choose_jobs(paths, output, output_format, resume=resume)
    n_threads = threads or count_usable_processors()
    recogniser = _load(bundle, n_threads=1, decoder=decoder, domain=domain)
    name = recogniser.best_decoder  # the one asked for, where it is the only one
    phrases = [Phrase(text, boost_weight) for text in boost or []]
    recogniser.decoder(name).open(phrases=phrases)  # refuses what cannot be used
    n_failed, audio_s = 0, 0.0
    with _progress_bar() as progress:
        task = progress.add_task("transcribing", total=len(jobs))
        heard = progress.add_task("seconds of audio", total=None)
        outcomes = run_jobs(
            recogniser,
            jobs,
            decoder=name,
            n_best=alternatives,
            n_threads=n_threads,
            phrases=phrases,
            on_audio=lambda seconds: progress.advance(heard, seconds),
        )
        for outcome in outcomes:
            progress.advance(task)
            if outcome.transcript is None:
                n_failed += 1
                progress.console.print(f"{outcome.job.name}: {outcome.error}", style="red")
                continue
            if outcome.warning:
                progress.console.print(f"{outcome.job.name}: {outcome.warning}", style="yellow")
            if output is None:
                if len(jobs) > 1 and output_format is FormatChoice.txt:
                    sys.stdout.write(f"{outcome.job.name}\t")
                sys.stdout.write(write_as(outcome.transcript, output_format.value))
                sys.stdout.flush()
            else:
                target = output_path(outcome.job, output, output_format.value)
                write_transcript(outcome.transcript, target, output_format.value)
            audio_s += outcome.transcript.duration_s
    _stderr.print(
        f"{len(jobs) - n_failed} transcribed ({audio_s:.1f} s of audio), {n_failed} failed"
    )
    if n_failed:
        raise typer.Exit(1)


def _choose_jobs(
    paths: Sequence[Path], output: Path | None, output_format: FormatChoice, *, resume: bool
) -> list[Job]:
    from service.batch import find_jobs, output_path  # noqa: PLC0415

    jobs = find_jobs(paths, output=output)
    if not jobs:
        _fail(f"no recordings found in {', '.join(map(str, paths))}", status=2)
    if output is None:
        if resume:
            _fail("--resume needs --output DIR, where it looks for finished transcripts", status=2)
        if len(jobs) > 1 and output_format.value in ("srt", "vtt"):
            _fail(
                f"{len(jobs)} recordings would make one {output_format.value} of all; write a "
                "file for each with --output DIR",
                status=2,
            )
        return jobs
    if not resume:
        return jobs
    todo = [j for j in jobs if not output_path(j, output, output_format.value).exists()]
    _stderr.print(f"{len(jobs) - len(todo)} of {len(jobs)} transcripts exist already")
    return todo


@app.command()
def evaluate(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST.jsonl")],
    *,
    bundle: BundleOption = None,
    decoder: DecoderOption = None,
    profile: Annotated[
        str | None,
        typer.Option("--profile", metavar="NAME", help="Measure a stream's first pass alone."),
    ] = None,
    domain: Annotated[
        str, typer.Option("--domain", metavar="NAME|DIR", help="Measure with a domain's words.")
    ] = "",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures here.")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Measure word and character error rates and the real-time factor."""
    from service.evaluation import evaluate as run  # noqa: PLC0415
    from service.manifest import read_manifest  # noqa: PLC0415

    utterances = read_manifest(manifest)
    if not utterances:
        _fail(f"{manifest} lists no recording", status=2)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
    n_threads = threads or count_usable_processors()
    recogniser = _load(bundle, n_threads=n_threads, decoder=decoder, domain=domain)
    if profile is not None and profile not in recogniser.profiles:
        _fail(
            f"there is no profile {profile!r}; the model has {', '.join(recogniser.profiles)}",
            status=2,
        )
    with _progress_bar() as progress:
        task = progress.add_task("evaluating", total=len(utterances))
        evaluation = run(
            recogniser,
            utterances,
            decoder=recogniser.best_decoder,
            profile=profile,
            on_done=lambda: progress.advance(task),
        )
    _print_evaluation(evaluation)
    if json_file is not None:
        json_file.write_text(json.dumps(evaluation.as_json(), indent=2) + "\n", encoding="utf-8")
    for failure in evaluation.failures:
        _stderr.print(failure, style="red")
    if evaluation.failures:
        raise typer.Exit(1)


@app.command()
def serve(  # noqa: PLR0913  # every option is an argument
    *,
    bundle: Annotated[
        list[Path] | None,
        typer.Option(
            "--bundle",
            metavar="DIR",
            help="Model folder; may be given several times, the first is the default.",
        ),
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option("--models", metavar="DIR", help="Folder of model folders; watched."),
    ] = None,
    domains: Annotated[
        list[Path] | None,
        typer.Option("--domain", metavar="DIR", help="A domain beside those in the models."),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="TCP port; 0 takes a free one.")
    ] = DEFAULT_PORT,
    provider: Annotated[ProviderChoice, typer.Option("--provider")] = ProviderChoice.cpu,
    decoder: DecoderOption = None,
    threads: ThreadsOption = None,
    max_streams: Annotated[
        int, typer.Option("--max-streams", min=1, help="Streams that are open at a time.")
    ] = 200,
    streams_per_client: Annotated[
        int | None, typer.Option("--streams-per-client", min=1, help="Of one API key.")
    ] = None,
    max_recordings: Annotated[
        int, typer.Option("--max-recordings", min=1, help="Recordings taken at a time.")
    ] = 64,
    max_queued_audio: Annotated[
        float, typer.Option("--max-queued-audio", help="Seconds of audio in them.")
    ] = 3600.0,
    longest_recording: Annotated[
        float, typer.Option("--longest-recording", help="Seconds of audio in one of them.")
    ] = 10_800.0,
    idle_timeout: Annotated[
        float, typer.Option("--idle-timeout", help="Seconds after which a silent stream is ended.")
    ] = 30.0,
    batch_windows: Annotated[
        int | None, typer.Option("--batch-windows", min=1, help="Most windows of streams at once.")
    ] = None,
    batch_utterances: Annotated[
        int | None, typer.Option("--batch-utterances", min=1, help="Most utterances at once.")
    ] = None,
    batch_wait_ms: Annotated[
        float, typer.Option("--batch-wait-ms", min=0, help="Longest wait for a batch to fill.")
    ] = 5.0,
    unsupported: Annotated[
        UnsupportedChoice,
        typer.Option("--unsupported", help="What to do when asked for what no model here does."),
    ] = UnsupportedChoice.reject,
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", metavar="PEM", help="The server's certificate.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", metavar="PEM", help="Its private key.")
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option("--tls-client-ca", metavar="PEM", help="Demand certificates signed by it."),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option("--keys", metavar="FILE", help="API keys; see `voxgate keys add`."),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option("--metrics-port", min=0, max=65535, help="Prometheus figures over HTTP."),
    ] = None,
    max_message_mib: Annotated[
        int, typer.Option("--max-message-mib", min=1, max=2047, help="Largest message.")
    ] = 64,
    max_connection_age: Annotated[
        float | None,
        typer.Option("--max-connection-age", help="Seconds after which clients connect anew."),
    ] = None,
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds that calls have to end at a stop.")
    ] = 10.0,
    log_format: Annotated[LogFormatChoice, typer.Option("--log-format")] = LogFormatChoice.text,
) -> None:
    """Serve voxgate.v1, Riva's and Google's APIs over gRPC, on one port."""
    from service.admission import Limits  # noqa: PLC0415
    from service.observe import log_to_stderr  # noqa: PLC0415
    from service.scheduler import default_batches  # noqa: PLC0415
    from service.server import MIB, ServerSettings, TlsFiles  # noqa: PLC0415
    from service.server import serve as run  # noqa: PLC0415

    log_to_stderr(as_json=log_format is LogFormatChoice.json)
    if (tls_cert is None) != (tls_key is None) or (tls_client_ca and not tls_cert):
        _fail("--tls-cert and --tls-key belong together, --tls-client-ca needs both", status=2)
    folders = bundle or ([] if models else [find_bundle(None)])
    n_threads = threads or count_usable_processors()
    logger.info("loading %s", ", ".join(map(str, [*folders, *([models] if models else [])])))
    settings = ServerSettings(
        folders=[find_bundle(folder) for folder in folders],
        domains=domains or [],
        watched=models,
        host=host,
        port=port,
        provider=provider.value,
        n_threads=n_threads,
        default_decoder=decoder.value if decoder else None,
        decoders=("greedy", "beam", "reference") if decoder is DecoderChoice.reference else None,
        batches=default_batches(
            provider.value,
            n_threads=n_threads,
            most_windows=batch_windows,
            most_utterances=batch_utterances,
            longest_wait_s=batch_wait_ms / 1000,
        ),
        limits=Limits(
            streams=max_streams,
            streams_per_client=streams_per_client,
            recordings=max_recordings,
            queued_audio_s=max_queued_audio,
            longest_recording_s=longest_recording,
            idle_s=idle_timeout,
        ),
        unsupported=unsupported.value,
        tls=TlsFiles(tls_cert, tls_key, tls_client_ca) if tls_cert and tls_key else None,
        keys=keys,
        metrics_port=metrics_port,
        longest_message_bytes=max_message_mib * MIB,
        longest_connection_s=max_connection_age,
        grace_s=grace,
    )

    def say(address: str, names: Sequence[str]) -> None:
        logger.info(
            "listening on %s: %s, %s, %d thread(s)",
            address,
            ", ".join(names),
            provider.value,
            n_threads,
        )

    asyncio.run(run(settings, on_listening=say))


@app.command()
def stream(  # noqa: PLR0913  # every option is an argument
    source: Annotated[
        str, typer.Argument(metavar="FILE|-|mic", help="A recording, stdin, or the microphone.")
    ],
    *,
    address: AddressOption = f"127.0.0.1:{DEFAULT_PORT}",
    realtime: Annotated[
        bool, typer.Option("--realtime", help="Send a file no faster than it was spoken.")
    ] = False,
    api_key: ApiKeyOption = "",
    tls_ca: TlsCaOption = None,
    tls_name: TlsNameOption = "",
    tls_cert: ClientCertificateOption = None,
    tls_key: ClientKeyOption = None,
    model: Annotated[
        str, typer.Option("--model", metavar="NAME", help="As `models list` has it.")
    ] = "",
    decoder: Annotated[
        DecoderChoice | None,
        typer.Option("--decoder", help="How to search; default what the server does."),
    ] = None,
    profile: Annotated[
        str, typer.Option("--profile", metavar="NAME", help="fast, balanced or offline.")
    ] = "",
    second_pass: Annotated[
        bool,
        typer.Option("--second-pass/--no-second-pass", help="Read utterances again at their end."),
    ] = True,
    boost: BoostOption = None,
    boost_weight: BoostWeightOption = 5.0,
    domain: Annotated[
        str, typer.Option("--domain", metavar="NAME", help="Also say what was meant.")
    ] = "",
    single_utterance: Annotated[
        bool, typer.Option("--single-utterance", help="End with the first utterance.")
    ] = False,
    sample_rate: Annotated[
        int, typer.Option("--rate", help="Rate of raw PCM on stdin, Hz; a header needs none.")
    ] = 0,
) -> None:
    """Stream a recording or the microphone to a server and print results as they come."""
    from service.client import (  # noqa: PLC0415
        Server,
        pace,
        read_pcm,
        read_pieces,
        start,
        stream_responses,
    )
    from service.live_text import print_responses  # noqa: PLC0415
    from service.microphone import SAMPLE_RATE, record  # noqa: PLC0415
    from service.pb.voxgate.v1 import speech_pb2 as pb  # noqa: PLC0415

    kind, _, search_tokens = decoder.name.upper().partition("_") if decoder else ("", "", "")
    boosts = bool(boost and boost_weight)  # in the API 0 stands for the default
    recognition = pb.RecognitionConfig(
        model=model,
        decoder=kind or None,
        search_tokens=search_tokens or None,
        domain=domain,
        speech_contexts=[pb.SpeechContext(phrases=boost, boost=boost_weight)] if boosts else [],
    )
    if sample_rate and source != "-":
        _fail(f"--rate is for raw samples on stdin; {source} says itself what it holds", status=2)
    if source == "-":
        recognition.sample_rate_hertz = sample_rate
        pieces = read_pieces(sys.stdin.buffer)
    elif source == "mic":
        recognition.encoding = pb.RecognitionConfig.LINEAR16
        recognition.sample_rate_hertz = SAMPLE_RATE
        pieces = start(record())
        _stderr.print("listening; Ctrl-C ends")
    else:
        rate, n_channels, pieces = read_pcm(Path(source))
        recognition.encoding = pb.RecognitionConfig.LINEAR16
        recognition.sample_rate_hertz = rate
        recognition.audio_channel_count = n_channels
    config = pb.StreamingRecognitionConfig(
        config=recognition,
        interim_results=True,
        profile=profile,
        disable_second_pass=not second_pass,
        single_utterance=single_utterance,
    )
    server = Server(address, api_key, tls_ca, tls_cert, tls_key, tls_name)
    responses = stream_responses(server, pace(pieces) if realtime else pieces, config)
    try:
        print_responses(responses, sys.stdout)
    except KeyboardInterrupt:
        sys.exit(0)


@app.command()
def health(
    *,
    address: AddressOption = f"127.0.0.1:{DEFAULT_PORT}",
    tls_ca: TlsCaOption = None,
    tls_name: TlsNameOption = "",
    tls_cert: ClientCertificateOption = None,
    tls_key: ClientKeyOption = None,
) -> None:
    """Ask a server whether it is serving; exit status 0 if it is, 1 if not."""
    from service.client import Server, check_health  # noqa: PLC0415

    server = Server(address, "", tls_ca, tls_cert, tls_key, tls_name)
    is_serving = check_health(server, on_error=lambda reason: _stderr.print(reason, style="red"))
    sys.stdout.write("serving\n" if is_serving else "not serving\n")
    raise typer.Exit(0 if is_serving else 1)


@app.command()
def doctor(
    *,
    bundle: Annotated[
        list[Path] | None,
        typer.Option("--bundle", metavar="DIR", help="Model folder; may be given several times."),
    ] = None,
    models: Annotated[
        Path | None, typer.Option("--models", metavar="DIR", help="Folder of model folders.")
    ] = None,
    address: AddressOption = f"127.0.0.1:{DEFAULT_PORT}",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Say what is installed and what to fix; exit status 1 if something must be fixed."""
    from service.doctor import examine, print_findings  # noqa: PLC0415

    findings = examine(bundles=bundle or [], models=models, address=address)
    if as_json:
        found = list(findings)
        sys.stdout.write(json.dumps([asdict(finding) for finding in found], indent=2) + "\n")
    else:
        found = print_findings(findings, Console(markup=False, highlight=False, soft_wrap=True))
    raise typer.Exit(1 if any(finding.is_error for finding in found) else 0)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value ...]", help="Settings that replace the file's."),
    ] = None,
) -> None:
    """Train a model, or go on with a run that stopped; `task` in the file says which kind."""
    _require_training("train")
    from training.tasks import run_task  # noqa: PLC0415

    run_task(config, overrides or [])


@prepare_app.command("librispeech")
def prepare_librispeech(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Holds the subsets, or LibriSpeech/ with them.")
    ],
    *,
    output: ManifestsOption,
    subsets: Annotated[
        list[str] | None,
        typer.Option(
            "--subset",
            metavar="NAME",
            help="Such as train-clean-5; may be given many times; default all that are there.",
        ),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="First fetch the subsets named into DIR.")
    ] = False,
    threads: ThreadsOption = None,
) -> None:
    """Write a manifest for each subset of LibriSpeech."""
    _require_training("prepare librispeech")
    from training import prepare  # noqa: PLC0415

    if download:
        prepare.download_librispeech(folder, subsets or [])
    with _recordings_bar() as show:
        report = prepare.prepare_librispeech(
            folder,
            output,
            subsets=subsets or [],
            n_threads=threads or count_usable_processors(),
            on_progress=show,
        )
    _print_prepared(report)


@prepare_app.command("commonvoice")
def prepare_common_voice(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The unpacked release, or what holds it.")
    ],
    *,
    output: ManifestsOption,
    language: Annotated[str, typer.Option("--language", help="As the release calls it.")] = "en",
    subsets: Annotated[
        list[str] | None,
        typer.Option(
            "--subset",
            metavar="NAME",
            help="Such as validated; may be given many times; default train, dev and test.",
        ),
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Write a manifest for each part of a Common Voice release."""
    _require_training("prepare commonvoice")
    from training import prepare  # noqa: PLC0415

    with _recordings_bar() as show:
        report = prepare.prepare_common_voice(
            folder,
            output,
            language=language,
            subsets=subsets or [],
            n_threads=threads or count_usable_processors(),
            on_progress=show,
        )
    _print_prepared(report)


@prepare_app.command("folder")
def prepare_folder(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Recordings with texts; see docs/prepare.md.")
    ],
    *,
    output: ManifestsOption,
    corpus: Annotated[
        str, typer.Option("--corpus", metavar="NAME", help="In the manifests; default DIR's name.")
    ] = "",
    dev_share: Annotated[
        float,
        typer.Option(
            "--dev-share", min=0.0, max=0.9, help="Share of the hours for dev; 0 splits nothing."
        ),
    ] = 0.1,
    threads: ThreadsOption = None,
) -> None:
    """Write manifests of recordings of your own, split into train and dev."""
    _require_training("prepare folder")
    from training import prepare  # noqa: PLC0415

    with _recordings_bar() as show:
        report = prepare.prepare_folder(
            folder,
            output,
            corpus=corpus,
            dev_share=dev_share,
            n_threads=threads or count_usable_processors(),
            on_progress=show,
        )
    _print_prepared(report)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The bundle to write.")],
    *,
    name: Annotated[str, typer.Option("--name", help="Model name; default DIR's name.")] = "",
    language: Annotated[str, typer.Option("--language", help="BCP-47 tag.")] = "en-US",
    like: Annotated[
        Path | None,
        typer.Option(
            "--like",
            metavar="BUNDLE",
            help="Take from this bundle what the options below leave out: language model, "
            "rescorer, --g2p, --decoding, --survival.",
        ),
    ] = None,
    lm: Annotated[
        Path | None,
        typer.Option(
            "--lm", metavar="DIR", help="What `voxgate lm build` wrote, or a bundle's lm."
        ),
    ] = None,
    dev: Annotated[
        Path | None,
        typer.Option("--dev", metavar="MANIFEST", help="Measure the bundle on this manifest."),
    ] = None,
    notes: Annotated[
        Path | None,
        typer.Option("--notes", metavar="FILE.md", help="Data and licences for the model card."),
    ] = None,
    g2p: Annotated[
        Path | None, typer.Option("--g2p", metavar="FILE.onnx", help="What `voxgate g2p` wrote.")
    ] = None,
    rescorer: Annotated[
        Path | None,
        typer.Option(
            "--rescorer",
            metavar="FILE",
            help="Language model that ranks results anew: a checkpoint, or a bundle's "
            "rescorer.onnx.",
        ),
    ] = None,
    decoding: Annotated[
        Path | None,
        typer.Option("--decoding", metavar="FILE.json", help="What `voxgate tune` wrote."),
    ] = None,
    survival: Annotated[
        Path | None,
        typer.Option("--survival", metavar="FILE.json", help="Calibration of interim results."),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8/--no-int8", help="Quantise the graphs.")] = True,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights", metavar="FILE.pt", help="Also write a checkpoint to fine-tune from."
        ),
    ] = None,
) -> None:
    """Turn a checkpoint into a bundle."""
    _require_training("export")
    from export.bundle import export_bundle  # noqa: PLC0415
    from training.checkpoint import load_checkpoint, save_weights  # noqa: PLC0415

    if weights is not None:
        weights.parent.mkdir(parents=True, exist_ok=True)
    export_bundle(
        checkpoint,
        folder,
        name=name or folder.resolve().name,
        language=language,
        like=like,
        lm=lm,
        g2p=g2p,
        rescorer=rescorer,
        decoding=decoding,
        survival=survival,
        dev=dev,
        notes=notes,
        int8=int8,
    )
    if weights is not None:
        save_weights(load_checkpoint(checkpoint), weights)
    _stderr.print(f"wrote {folder}")


@lm_app.command("build")
def lm_build(
    texts: Annotated[
        list[Path], typer.Argument(metavar="TEXT...", help="A sentence a line; plain, .gz or .xz.")
    ],
    *,
    order: Annotated[int, typer.Option("--order", metavar="N", help="Longest n-gram.")],
    output: Annotated[Path, typer.Option("--output", metavar="DIR")],
    transcripts: Annotated[
        list[Path] | None,
        typer.Option(
            "--transcripts", metavar="MANIFEST", help="Also read what its recordings say."
        ),
    ] = None,
    transcripts_count: Annotated[
        int,
        typer.Option("--transcripts-count", min=1, help="How often each transcript counts."),
    ] = 10,
    prune: Annotated[
        str, typer.Option("--prune", help="Per order: drop n-grams seen this often or less.")
    ] = "0",
    vocabulary: Annotated[
        int | None, typer.Option("--vocabulary", min=1, help="Most words in the word list.")
    ] = None,
    min_count: Annotated[
        int, typer.Option("--min-count", min=1, help="Leave out words seen less often.")
    ] = 1,
    words: Annotated[
        Path | None,
        typer.Option("--words", metavar="FILE", help="Words to add that the text may lack."),
    ] = None,
    dictionary: Annotated[
        bool, typer.Option("--dictionary", help="Add all words of the pronouncing dictionary.")
    ] = False,
    quantise: Annotated[
        int | None, typer.Option("--quantise", min=2, max=25, help="Bits of a probability.")
    ] = None,
    arpa: Annotated[bool, typer.Option("--arpa", help="Also write lm.arpa.gz.")] = False,
) -> None:
    """Build a word n-gram language model from text."""
    _require("tqdm", "lm build")
    from training.ngram import build_ngram, read_words  # noqa: PLC0415

    try:
        pruning = [int(n) for n in prune.replace(",", " ").split()]
    except ValueError:
        _fail(f"--prune {prune!r}: expected whole numbers such as '0 0 1'", status=2)
    report = build_ngram(
        texts,
        output,
        order=order,
        transcripts=transcripts or (),
        transcripts_count=transcripts_count,
        prune=pruning or [0],
        n_words=vocabulary,
        min_count=min_count,
        more_words=read_words(words, dictionary=dictionary),
        quantise_bits=quantise,
        keep_arpa=arpa,
    )
    _stderr.print(str(report))


@lm_app.command("compile")
def lm_compile(
    source: Annotated[Path, typer.Argument(metavar="MODEL.arpa", help="Plain, .gz or .xz.")],
    target: Annotated[Path, typer.Argument(metavar="MODEL.ngram", help="The file to write.")],
    *,
    quantise: Annotated[
        bool, typer.Option("--quantise", help="Store a value in a byte, not four.")
    ] = False,
) -> None:
    """Compile an ARPA language model into the form that the beam search maps into memory."""
    _require("tqdm", "lm compile")
    from training.arpa import compile_arpa  # noqa: PLC0415

    compile_arpa(source, quantise=quantise).save(target)
    _stderr.print(f"wrote {target}: {target.stat().st_size / 1e6:.1f} MB")


@models_app.command("list")
def models_list(
    *,
    address: AddressOption = f"127.0.0.1:{DEFAULT_PORT}",
    api_key: ApiKeyOption = "",
    tls_ca: TlsCaOption = None,
    tls_name: TlsNameOption = "",
    tls_cert: ClientCertificateOption = None,
    tls_key: ClientKeyOption = None,
) -> None:
    """List the models that a server has loaded."""
    from service.client import Server, list_models  # noqa: PLC0415

    for model in list_models(Server(address, api_key, tls_ca, tls_cert, tls_key, tls_name)):
        profiles = ", ".join(
            f"{profile.name} ({profile.latency.ToMilliseconds()} ms)" for profile in model.profiles
        )
        domains = ", ".join(model.domains) or "no domains"
        sys.stdout.write(f"{model.name}\t{model.language_code}\t{profiles}\t{domains}\n")


@models_app.command("reload")
def models_reload(
    *,
    address: AddressOption = f"127.0.0.1:{DEFAULT_PORT}",
    api_key: ApiKeyOption = "",
    tls_ca: TlsCaOption = None,
    tls_name: TlsNameOption = "",
    tls_cert: ClientCertificateOption = None,
    tls_key: ClientKeyOption = None,
) -> None:
    """Make a server load bundles that are new or changed; open streams end on the old ones."""
    from service.client import Server, reload_models  # noqa: PLC0415

    changes = reload_models(Server(address, api_key, tls_ca, tls_cert, tls_key, tls_name))
    sys.stdout.write("".join(f"{line}\n" for line in changes) or "nothing has changed\n")


@domain_app.command("build")
def domain_build(
    source: Annotated[Path, typer.Argument(metavar="DOMAIN.yaml", help="What can be said.")],
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Default: domains/NAME in the bundle."),
    ] = None,
    bundle: BundleOption = None,
) -> None:
    """Build a domain from sentences and templates alone; no audio is needed."""
    _require_training("domain build")
    from export.domain import build_domain  # noqa: PLC0415

    folder = find_bundle(bundle)
    with _stderr.status("starting") as status:
        report = build_domain(source, output, folder, on_step=status.update)
    _stderr.print(f"wrote {report.folder}: {report}")


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The client; letters, digits, .-_")],
    *,
    file: Annotated[Path, typer.Option("--file", metavar="FILE", help="The server's key file.")],
    admin: Annotated[bool, typer.Option("--admin", help="Let it manage the server.")] = False,
) -> None:
    """Make a key for a client of the server; the file gets its hash alone."""
    from service.security import add_key  # noqa: PLC0415

    sys.stdout.write(f"{add_key(file, name, is_admin=admin)}\n")
    _stderr.print(f"added {name} to {file}; the key is shown this once and kept nowhere")


@bench_app.command("serve")
def bench_serve(  # noqa: PLR0913  # every option is an argument
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST.jsonl", help="What is said.")],
    *,
    bundle: BundleOption = None,
    address: AddressOption = f"127.0.0.1:{DEFAULT_PORT}",
    api: Annotated[
        ApiChoice, typer.Option("--api", help="Streams, or whole recordings one after another.")
    ] = ApiChoice.streaming,
    streams: Annotated[
        int, typer.Option("--streams", min=1, metavar="N", help="At the same time.")
    ] = 8,
    realtime: Annotated[
        bool, typer.Option("--realtime/--no-realtime", help="Send no faster than speech.")
    ] = True,
    find_capacity: Annotated[
        bool, typer.Option("--find-capacity", help="Try N streams and more, until results are late")
    ] = False,
    bound_ms: Annotated[
        float, typer.Option("--bound-ms", help="How late 95 % of final results may be.")
    ] = 300.0,
    seconds: Annotated[
        float | None,
        typer.Option("--seconds", min=1, help="Time measured; 60, or 20 for each of many trials."),
    ] = None,
    tries: Annotated[
        int, typer.Option("--tries", min=1, help="Trials of a number before it is too many.")
    ] = 1,
    decoder: DecoderOption = None,
    profile: Annotated[str, typer.Option("--profile", metavar="NAME")] = "balanced",
    api_key: ApiKeyOption = "",
    clients: Annotated[
        int, typer.Option("--clients", min=1, metavar="P", help="Processes that send.")
    ] = 1,
    server_pid: Annotated[
        int | None, typer.Option("--server-pid", metavar="PID", help="Also measure its load.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures here.")
    ] = None,
) -> None:
    """Measure how many streams a server carries, and how late its results are."""
    from service import load_test  # noqa: PLC0415
    from service.manifest import read_manifest  # noqa: PLC0415

    is_paced = realtime and api is ApiChoice.streaming
    if find_capacity and not is_paced:
        _fail("--find-capacity needs streams at the pace of speech", status=2)
    utterances = read_manifest(manifest)
    recogniser = _load(bundle, n_threads=1, decoder=decoder) if is_paced else None
    asked: DecoderName | None = decoder.value if decoder else None
    name = recogniser.best_decoder if recogniser else asked
    target = load_test.Target(address, api_key, name, profile, clients, server_pid)
    figures: load_test.Report | load_test.Capacity
    with _progress_bar() as progress:
        task = progress.add_task("starting", total=None)

        def show(what: str, done: float, total: float) -> None:
            progress.update(task, description=what, completed=done, total=total)

        if recogniser is None:
            figures = load_test.measure_throughput(
                target,
                utterances,
                pace="offline" if api is ApiChoice.offline else "fast",
                n_streams=streams,
                seconds=seconds or 60.0,
                on_progress=show,
            )
        elif find_capacity:
            figures = load_test.search_capacity(
                target,
                recogniser,
                utterances,
                first=streams,
                bound_ms=bound_ms,
                seconds=seconds or 20.0,
                n_tries=tries,
                on_trial=lambda trial: progress.console.print(
                    load_test.describe_trial(trial, bound_ms)
                ),
                on_progress=show,
            )
        else:
            figures = load_test.measure_streams(
                target,
                recogniser,
                utterances,
                n_streams=streams,
                seconds=seconds or 60.0,
                on_progress=show,
            )
    if recogniser is not None:
        latency = recogniser.profiles.get(profile) and f"{recogniser.latency_s(profile):.3f} s"
        sys.stdout.write(f"{recogniser.name}, {profile}: look-ahead {latency or 'none'}\n")
    load_test.print_figures(figures, Console(highlight=False, soft_wrap=True))
    if json_file is not None:
        json_file.write_text(json.dumps(figures.as_json(), indent=2) + "\n", encoding="utf-8")
    if figures.n_failed:
        raise typer.Exit(1)


@app.command()
def g2p(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Gets g2p.onnx and the run.")],
    *,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the words.")] = 20,
    threads: ThreadsOption = None,
) -> None:
    """Train letters-to-phones on the pronouncing dictionary; a stopped run goes on."""
    _require_training("g2p")
    import torch  # noqa: PLC0415

    from export.g2p import export_g2p  # noqa: PLC0415
    from training.g2p import evaluate_g2p, train_g2p  # noqa: PLC0415

    torch.set_num_threads(threads or count_usable_processors())
    train_g2p(directory, n_epochs=epochs)
    export_g2p(directory / "best.pt", directory / "g2p.onnx")
    errors = evaluate_g2p(directory / "g2p.onnx")
    _stderr.print(
        f"wrote {directory / 'g2p.onnx'}: word error {errors.word_error:.2%}, phone error "
        f"{errors.phone_error:.2%} on words it has not seen"
    )


@app.command()
def tune(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="Development data.")],
    *,
    bundle: BundleOption = None,
    output: Annotated[
        Path, typer.Option("--output", metavar="FILE.json", help="For `voxgate export`.")
    ] = Path("decoding.json"),
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw a heat map.")
    ] = None,
    alphas: Annotated[str, typer.Option("--alphas", help="Language model weights to try.")] = (
        "0.6,0.7,0.8,0.9,1.0,1.1,1.2"
    ),
    betas: Annotated[str, typer.Option("--betas", help="Word scores to try.")] = (
        "-1,-0.5,0,1,2,3"
    ),
    threads: ThreadsOption = None,
) -> None:
    """Fit the decoder's weights and confidences on development data."""
    from service.tuning import tune_bundle  # noqa: PLC0415

    for path in (output, *([plot] if plot else [])):
        path.parent.mkdir(parents=True, exist_ok=True)  # not after an hour's work
    settings = tune_bundle(
        find_bundle(bundle),
        manifest,
        alphas=_to_numbers("--alphas", alphas),
        betas=_to_numbers("--betas", betas),
        n_threads=threads or count_usable_processors(),
        plot=plot,
        on_line=_stderr.print,
    )
    output.write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
    _stderr.print(f"wrote {output}; put it into a bundle with: voxgate export --decoding {output}")


def _to_numbers(option: str, text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        _fail(f"{option} {text!r}: expected numbers such as 0.5,1", status=2)


def _load(
    bundle: Path | None, *, n_threads: int, decoder: DecoderChoice | None, domain: str = ""
) -> Recogniser:
    from service.domain import find_domain  # noqa: PLC0415
    from service.recogniser import load_recogniser  # noqa: PLC0415

    folder = find_bundle(bundle)
    domains = [find_domain(domain, folder)] if domain else []
    with _stderr.status(f"loading {folder}"):
        recogniser = load_recogniser(
            folder,
            n_threads=n_threads,
            decoders=(decoder.value,) if decoder else "best",
            domains=domains,
        )
    return next(iter(recogniser.domains.values()), recogniser)


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=_stderr,
    )


@contextmanager
def _recordings_bar() -> Iterator[Callable[[int, int], None]]:
    with _progress_bar() as progress:
        task = progress.add_task("looking for recordings", total=None)

        def show(n_done: int, n_all: int) -> None:
            progress.update(task, description="reading recordings", completed=n_done, total=n_all)

        yield show


def _print_prepared(report: Report) -> None:
    from training.prepare import describe  # noqa: PLC0415

    table = Table("manifest", "utterances", "hours", "speakers")
    for written in report.manifests:
        table.add_row(
            written.path.name,
            f"{written.n_utterances}",
            f"{written.duration_s / 3600:.2f}",
            f"{written.n_speakers or 'unknown'}",
        )
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"{len(report.left_out)} left out")
    for line in describe(report.left_out):
        console.print(f"  {line}")
    for warning in report.warnings:
        _stderr.print(f"note: {warning}", style="yellow")
    _stderr.print(f"wrote {', '.join(str(written.path) for written in report.manifests)}")


def _print_evaluation(evaluation: Evaluation) -> None:
    from service.scoring import format_interval, pool  # noqa: PLC0415

    corpus = Column("corpus", overflow="fold")
    table = Table(corpus, "words", "WER", "95 % by speaker", "CER", "sub", "del", "ins")
    everyone = list(evaluation.speakers.values())
    for name, by_speaker in [*evaluation.corpora.items(), ("total", everyone)]:
        counts = pool(by_speaker)
        table.add_row(
            name or "-",
            f"{counts.n_words}",
            f"{counts.wer:.2%}" if counts.n_words else "-",
            format_interval(by_speaker) if counts.n_words else "-",
            f"{counts.cer:.2%}" if counts.n_words else "-",
            f"{counts.n_substitutions}",
            f"{counts.n_deletions}",
            f"{counts.n_insertions}",
        )
    console = Console()
    console.print(table)
    for stage, rtf in evaluation.rtf.items():
        speed = f"{1 / rtf:.0f} × real time" if rtf else "-"
        console.print(f"real-time factor, {stage}: {rtf:.5f} ({speed})")


def _require_training(command: str) -> None:
    for module in ("torch", "torchaudio", "lhotse", "onnx", "tensorboard"):
        _require(module, command)


def _require(module: str, command: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(
            f"`voxgate {command}` needs the training packages ({module} is missing); "
            "install them with: pip install 'voxgate[train]' "
            "(in a checkout: .venv/bin/pip install -e '.[train]')"
        )


def _fail(message: str, *, status: int) -> NoReturn:
    _stderr.print(f"voxgate: {message}", style="red")
    sys.exit(status)


if __name__ == "__main__":
    main()
