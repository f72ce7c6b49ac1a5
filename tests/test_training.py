"""Training: it learns, it goes on exactly, and it refuses what cannot be trained on."""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    TEXTS,
    TinyCorpus,
    make_checkpoint,
    make_model,
    make_settings,
    write_corpus,
    write_manifest,
    write_recordings,
    write_settings,
)
from torch import Tensor
from torch.nn.functional import ctc_loss
from torch.utils.data import get_worker_info

from service.errors import TrainingError
from service.scoring import count_errors
from service.text import CHARACTERS, WORD_MARK, collapse, encode
from training.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint, save_weights
from training.config import StreamingSettings, load_settings
from training.data import Batch, BatchStream, Labels, collate
from training.distributed import World
from training.evaluation import errors_by_corpus, greedy_transcripts
from training.feature_store import FeatureStore
from training.lexicon import PHONES
from training.loss import Losses, compute_losses
from training.model import Chunking
from training.precision import choose_precision
from training.schedule import learning_rate
from training.tasks import run_task
from training.train import TrainingRun, draw_chunking, train
from training.weights import GradientGuard, average_model

_ALONE = World(rank=0, size=1, device=torch.device("cpu"))
_RANDOM = (
    "data.speeds=[1.0, 1.1]",
    "model.dropout=0.2",
    "augment.n_frequency_masks=1",
    "augment.frequency_width=4",
    "augment.time_masks_per_s=2.0",
    "augment.level_db=3.0",
    "optimiser.phone_weight=0.5",
)
"""Settings of a run in which every step draws something."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def _own_signal_handlers() -> Iterator[None]:
    """Take back the handlers that a run installs, so that Ctrl-C stops the tests."""
    handlers = {sign: signal.getsignal(sign) for sign in (signal.SIGTERM, signal.SIGINT)}
    yield
    for sign, handler in handlers.items():
        signal.signal(sign, handler)


def _stop_after(monkeypatch: pytest.MonkeyPatch, n_steps: int) -> None:
    """Send this process SIGTERM when a run has made its `n_steps`th step."""
    step = TrainingRun.step

    def stopping_step(run: TrainingRun, batch: Batch, *, n_batches: int) -> tuple[Losses, float]:
        result = step(run, batch, n_batches=n_batches)
        if run.progress.step + 1 == n_steps:
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(TrainingRun, "step", stopping_step)


def _all_utterances(run: TrainingRun) -> Batch:
    labels = run.corpus.labels
    ids = sorted(labels)
    features = [run.corpus.stores[0].load(i) for i in ids]
    return collate(ids, features, [labels[i] for i in ids])


def _read_rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "dev.jsonl").read_text().splitlines()]


def _assert_same(actual: object, expected: object, where: str = "checkpoint") -> None:
    """Compare plain data and tensors exactly."""
    assert type(actual) is type(expected), where
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor)
        assert torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert isinstance(actual, dict)
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            _assert_same(actual[key], value, f"{where}.{key}")
    else:
        assert actual == expected, where


# Learning


def test_steps_overfit_one_batch_to_zero_errors(corpus: TinyCorpus, tmp_path: Path) -> None:
    n_steps = 90
    settings = make_settings(
        corpus, tmp_path / "run", "optimiser.n_epochs=1", "optimiser.learning_rate=0.02"
    )
    run = TrainingRun(settings, _ALONE)
    batch = _all_utterances(run)
    first, _ = run.step(batch, n_batches=n_steps)
    for step in range(1, n_steps):
        run.progress = replace(run.progress, batch=step, step=step)
        last, _ = run.step(batch, n_batches=n_steps)
    assert last.combine(0.5).item() < 0.05 * first.combine(0.5).item()

    model = run.averaged.module
    assert isinstance(model, torch.nn.Module)
    transcripts = greedy_transcripts(run.model, [batch], tokens=CHARACTERS, world=_ALONE)
    counts = errors_by_corpus(
        transcripts,
        references={cut.id: cut.supervisions[0].text for cut in run.corpus.cuts},
        corpora={cut.id: cut.supervisions[0].custom["corpus"] for cut in run.corpus.cuts},
    )
    assert counts["tones"].n_words == 2 * sum(len(text.split()) for text in TEXTS)
    assert (counts[""].wer, counts[""].cer) == (0.0, 0.0)
    model.eval()
    _, phone_logits, lengths = model(batch.features, batch.feature_lengths)
    for path, length, phones, n_phones in zip(
        phone_logits.argmax(-1), lengths, batch.phones, batch.phone_lengths, strict=True
    ):
        assert collapse(path[:length].tolist()) == phones[:n_phones].tolist()


def test_train_writes_what_a_run_leaves(corpus: TinyCorpus, tmp_path: Path) -> None:
    settings = make_settings(
        corpus, tmp_path / "run", "optimiser.n_epochs=3", "run.evaluate_every_epochs=2"
    )
    progress = train(settings)
    assert (progress.epoch, progress.batch) == (3, 0)
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert last.progress == progress
    assert last.settings == settings.model_dump(mode="json")
    assert json.loads((tmp_path / "run" / "settings.json").read_text()) == last.settings
    rows = _read_rows(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [2, 3]
    assert rows[0]["tones"] == rows[0]["total"]
    for chunk, right in settings.streaming.chunkings:
        assert set(rows[0][f"{chunk}+{right} frames"]) == {"wer", "cer"}
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    assert best.progress.best_cer == min(row["total"]["cer"] for row in rows)
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    assert not list((tmp_path / "run").glob("*.unfinished"))


def test_train_counts_the_audio_it_has_seen(corpus: TinyCorpus, tmp_path: Path) -> None:
    progress = train(make_settings(corpus, tmp_path / "run", "optimiser.n_epochs=2"))
    rows = [json.loads(line) for line in corpus.train.read_text().splitlines()]
    heard_s = 2 * sum(row["duration"] for row in rows)
    assert progress.audio_s == pytest.approx(heard_s, rel=0.05)  # a window is lost at each end


def test_train_learns_to_understand_an_unknown_speaker(corpus: TinyCorpus, tmp_path: Path) -> None:
    train(
        make_settings(
            corpus,
            tmp_path / "run",
            "optimiser.n_epochs=30",
            "optimiser.learning_rate=0.02",
            "run.evaluate_every_epochs=30",
        )
    )
    (row,) = _read_rows(tmp_path / "run")
    for reading in ("total", "8+8 frames", "16+8 frames", "8+4 frames"):
        assert row[reading] == {"wer": 0.0, "cer": 0.0}
    assert load_checkpoint(tmp_path / "run" / "best.pt").progress.best_cer == 0.0


def test_train_by_crf_in_noise_learns_to_understand_an_unknown_speaker(
    corpus: TinyCorpus, tmp_path: Path
) -> None:
    settings = make_settings(
        corpus,
        tmp_path / "run",
        "optimiser.n_epochs=40",
        "optimiser.learning_rate=0.02",
        "optimiser.phone_criterion=crf",
        "augment.noise_share=0.3",
        "augment.lowest_snr_db=20.0",
        "augment.room_share=0.1",
        "augment.telephone_share=0.3",
        "run.evaluate_every_epochs=40",
    )
    train(settings)
    (row,) = _read_rows(tmp_path / "run")
    assert row["total"]["cer"] < 0.05
    run = TrainingRun(settings, _ALONE)
    batch = _all_utterances(run)
    model = run.averaged.module.eval()
    _, phone_logits, lengths = model(batch.features, batch.feature_lengths)
    paths = zip(phone_logits.argmax(-1), lengths, strict=True)
    heard = [collapse(path[:n].tolist()) for path, n in paths]
    labels = zip(batch.phones, batch.phone_lengths, strict=True)
    said = [row[:n].tolist() for row, n in labels]
    spelled = [[" ".join(map(str, ids)) for ids in rows] for rows in (said, heard)]
    assert count_errors(*spelled).wer < 0.3


def test_words_that_the_dictionary_lacks_are_said_by_the_graph(
    corpus: TinyCorpus, shipped_bundle: Path, tmp_path: Path
) -> None:
    rows = write_recordings(tmp_path, ["dabcade"], speaker="dora", corpus="tones")
    manifest = write_manifest(tmp_path / "more.jsonl", rows)
    more = f'data.train=["{corpus.train}", "{manifest}"]'
    graph = f'data.g2p="{shipped_bundle / "lexicon" / "g2p.onnx"}"'
    without = TrainingRun(make_settings(corpus, tmp_path / "without", more), _ALONE)
    said = TrainingRun(make_settings(corpus, tmp_path / "said", more, graph), _ALONE)
    spelled = tuple(encode("dabcade", CHARACTERS))
    name = next(i for i, labels in said.corpus.labels.items() if labels.tokens == spelled)
    assert without.corpus.labels[name].phones == ()
    phones = [PHONES[i] for i in said.corpus.labels[name].phones]
    assert phones[0] == "D"
    assert "B" in phones
    others = set(without.corpus.labels) - {name}
    assert all(said.corpus.labels[o] == without.corpus.labels[o] for o in others)


# Going on


@pytest.fixture(scope="module")
def uninterrupted(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(make_settings(corpus, directory, *_RANDOM))
    return directory


def _n_steps(directory: Path) -> int:
    return load_checkpoint(directory / "last.pt").progress.step


@pytest.mark.parametrize(
    "share",
    [
        pytest.param(0.0, id="after the first step"),
        pytest.param(0.25, id="inside the first pass"),
        pytest.param(0.5, id="after the last step of the first pass"),
        pytest.param(0.7, id="inside the second pass"),
        pytest.param(1.0, id="after the last step"),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(
    corpus: TinyCorpus,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
) -> None:
    settings = make_settings(corpus, tmp_path / "run", *_RANDOM)
    stop_at = max(1, round(share * _n_steps(uninterrupted)))
    with monkeypatch.context() as stopping:
        _stop_after(stopping, stop_at)
        stopped = train(settings)
    assert stopped.step == stop_at
    assert load_checkpoint(tmp_path / "run" / "last.pt").progress == stopped
    train(settings)
    for name in ("last.pt", "best.pt"):
        actual = torch.load(tmp_path / "run" / name, weights_only=True)
        expected = torch.load(uninterrupted / name, weights_only=True)
        del actual["settings"]["run"]["directory"], expected["settings"]["run"]["directory"]
        _assert_same(actual, expected, name)
    assert _read_rows(tmp_path / "run") == _read_rows(uninterrupted)


def _train_with_a_stop(
    corpus: TinyCorpus, folder: Path, monkeypatch: pytest.MonkeyPatch, *changes: str
) -> Checkpoint:
    """The end of a run, after making sure that it is the same when the run is stopped once."""
    whole, parts = (
        make_settings(corpus, folder / n, *_RANDOM, *changes) for n in ("whole", "parts")
    )
    train(whole)
    with monkeypatch.context() as stopping:
        _stop_after(stopping, 1)
        train(parts)
    train(parts)
    actual, expected = (load_checkpoint(folder / n / "last.pt") for n in ("parts", "whole"))
    _assert_same(actual.model, expected.model)
    _assert_same(actual.optimiser, expected.optimiser)
    return expected


def test_conditioned_layers_learn_and_are_exactly_resumed(
    corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = "model.n_layers=2", "model.conditioned_layers=[1]"
    end = _train_with_a_stop(corpus, tmp_path, monkeypatch, *changes)
    assert end.model is not None
    assert end.model["conditionings.1.head.bias"].abs().max() > 0
    assert end.model["conditionings.1.feedback.weight"].abs().max() > 0


def test_conditioned_layers_must_exist(corpus: TinyCorpus, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"conditioned_layers is \[2\], expected .* 1 to 1"):
        make_settings(corpus, tmp_path, "model.n_layers=2", "model.conditioned_layers=[2]")


def test_resumed_muon_equals_an_uninterrupted_run(
    corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _train_with_a_stop(corpus, tmp_path, monkeypatch, "optimiser.kind=muon")
    with pytest.raises(TrainingError, match=r"optimiser\.kind .* keep it or choose another"):
        train(make_settings(corpus, tmp_path / "whole", *_RANDOM))


def test_run_stops_whole_when_all_its_processes_are_asked_to(
    corpus: TinyCorpus, tmp_path: Path
) -> None:
    path = write_settings(corpus, tmp_path / "run.toml")
    arguments = ["-m", "service.cli", "train", str(path), "optimiser.n_epochs=100000"]
    log = tmp_path / "log.txt"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, *arguments], stdout=output, stderr=output, start_new_session=True
        ) as process,
    ):
        try:
            while "pass 1:" not in log.read_text() and process.poll() is None:
                time.sleep(0.05)
            for sign in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, service managers: the loader too
                os.killpg(process.pid, sign)
            assert process.wait(timeout=30) == 0, log.read_text()
        finally:
            process.kill()
    assert "start again to go on" in log.read_text()
    progress = load_checkpoint(tmp_path / "run" / "last.pt").progress
    assert f"stopped at step {progress.step};" in log.read_text()


def test_another_seed_makes_another_run(
    corpus: TinyCorpus, uninterrupted: Path, tmp_path: Path
) -> None:
    train(make_settings(corpus, tmp_path / "run", *_RANDOM, "run.seed=2"))
    one, other = (load_checkpoint(d / "last.pt") for d in (uninterrupted, tmp_path / "run"))
    assert not torch.equal(one.averaged["token_head.weight"], other.averaged["token_head.weight"])


def test_finished_run_started_again_changes_nothing(corpus: TinyCorpus, tmp_path: Path) -> None:
    settings = make_settings(corpus, tmp_path / "run", "optimiser.n_epochs=1")
    progress = train(settings)
    names = ("last.pt", "best.pt", "dev.jsonl", "settings.json")
    before = {name: (tmp_path / "run" / name).stat().st_mtime_ns for name in names}
    assert train(settings) == progress
    assert {name: (tmp_path / "run" / name).stat().st_mtime_ns for name in names} == before


def test_train_refuses_the_folder_of_another_models_run(
    corpus: TinyCorpus, uninterrupted: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").symlink_to(uninterrupted)
    before = (uninterrupted / "last.pt").read_bytes()
    settings = make_settings(corpus, tmp_path / "run", *_RANDOM, "model.hidden_size=16")
    with pytest.raises(TrainingError, match=r"holds a run of another model.*run\.directory"):
        train(settings)
    assert (uninterrupted / "last.pt").read_bytes() == before


def test_train_leaves_no_process_behind_when_its_loader_fails(
    corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = FeatureStore.load

    def load_in_main_only(store: FeatureStore, utterance_id: str) -> Tensor:
        if get_worker_info() is not None:
            raise OSError(f"{utterance_id}: the disk is gone")
        return load(store, utterance_id)

    monkeypatch.setattr(FeatureStore, "load", load_in_main_only)
    settings = make_settings(corpus, tmp_path / "run")
    loaders = None
    try:
        train(settings)
    except OSError:  # the interpreter, too, keeps the traceback until it ends
        loaders = multiprocessing.active_children()
    gc.collect()  # frees the traceback and with it the loader, whatever is asserted
    assert loaders == []  # they ignore SIGTERM: the interpreter would wait for them forever


# Starting


def test_train_refuses_speakers_on_both_sides(corpus: TinyCorpus, tmp_path: Path) -> None:
    settings = make_settings(corpus, tmp_path / "run", f'data.dev=["{corpus.train}"]')
    with pytest.raises(TrainingError, match=r"speakers \['anna', 'bela'\] are in the training and"):
        train(settings)


def test_one_speaker_alone_can_be_trained_on(
    corpus: TinyCorpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = write_recordings(tmp_path, TEXTS[:6], speaker="me")
    train_set = write_manifest(tmp_path / "mine.jsonl", rows[:4])
    dev_set = write_manifest(tmp_path / "mine-dev.jsonl", rows[4:])
    mine = (f'data.train=["{train_set}"]', f'data.dev=["{dev_set}"]')
    TrainingRun(make_settings(corpus, tmp_path / "run", *mine), _ALONE)
    assert "all is said by me" in caplog.text


def test_speakers_that_are_held_out_may_be_developed_on(corpus: TinyCorpus, tmp_path: Path) -> None:
    both = f'data.train=["{corpus.train}","{corpus.dev}"]'
    speakers = {json.loads(line)["speaker"] for line in corpus.dev.read_text().splitlines()}
    held_out = f"data.held_out_speakers={json.dumps(sorted(speakers))}"
    run = TrainingRun(make_settings(corpus, tmp_path / "run", both, held_out), _ALONE)
    assert not speakers & {cut.supervisions[0].speaker for cut in run.corpus.cuts}


def test_run_refuses_other_data_in_its_folder(corpus: TinyCorpus, tmp_path: Path) -> None:
    train(make_settings(corpus, tmp_path / "run", "optimiser.n_epochs=1"))
    rows = [json.loads(line) for line in corpus.train.read_text().splitlines()]
    rows[0]["text"] = "bad bad bad"
    for row in rows:
        row["audio_filepath"] = str(corpus.train.parent / row["audio_filepath"])
    other = write_manifest(tmp_path / "other.jsonl", rows)
    with pytest.raises(TrainingError, match="on other utterances or transcripts"):
        train(make_settings(corpus, tmp_path / "run", f'data.train=["{other}"]'))


def test_run_refuses_other_batches_inside_a_pass(
    corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stop_after(monkeypatch, 1)
    train(make_settings(corpus, tmp_path / "run", "optimiser.batch_s=6.0"))
    with pytest.raises(TrainingError, match=r"inside a pass .* optimiser\.batch_s 6\.0"):
        train(make_settings(corpus, tmp_path / "run", "optimiser.batch_s=12.0"))


def test_average_of_few_steps_follows_them() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    averaged = average_model(model, 0.999)
    for step in range(50):
        model.weight.data.fill_(step)
        averaged.update_parameters(model)
    (weight,) = averaged.module.parameters()
    assert 40 < weight.item() < 49


def test_run_gives_up_where_no_gradient_is_finite() -> None:
    guard, broken = GradientGuard(), torch.tensor(math.nan)
    assert not any(guard.allows(broken, step=i) for i in range(50))
    assert guard.allows(torch.tensor(1.0), step=50)
    assert not any(guard.allows(broken, step=i) for i in range(99))
    with pytest.raises(TrainingError, match=r"100 steps in a row.*learning_rate"):
        guard.allows(broken, step=99)


@pytest.mark.parametrize("setting", ["run.initial_checkpoint", "data.aligner"])
def test_checkpoint_of_another_kind_is_refused(
    corpus: TinyCorpus, tmp_path: Path, setting: str
) -> None:
    checkpoint = make_checkpoint(make_model(), make_settings(corpus, tmp_path / "old"))
    weights = {"embedding": torch.zeros(2)}
    save_checkpoint(replace(checkpoint, averaged=weights), tmp_path / "other.pt")
    settings = make_settings(corpus, tmp_path / "run", f'{setting}="{tmp_path / "other.pt"}"')
    with pytest.raises(TrainingError, match=r"other\.pt is a checkpoint of another kind"):
        TrainingRun(settings, _ALONE)


def test_train_refuses_settings_that_leave_nothing(corpus: TinyCorpus, tmp_path: Path) -> None:
    settings = make_settings(corpus, tmp_path / "run", "data.shortest_s=15.0")
    with pytest.raises(TrainingError, match="no utterance is left"):
        train(settings)


def test_run_starts_from_the_weights_of_an_initial_checkpoint(
    corpus: TinyCorpus, tmp_path: Path
) -> None:
    model = make_model(seed=7, n_layers=1, hidden_size=32)
    model.feature_mean.fill_(-5.0)
    initial = tmp_path / "initial.pt"
    save_weights(make_checkpoint(model, make_settings(corpus, tmp_path / "old")), initial)
    run = TrainingRun(
        make_settings(corpus, tmp_path / "run", f'run.initial_checkpoint="{initial}"'),
        _ALONE,
    )
    _assert_same(dict(run.model.state_dict()), load_checkpoint(initial).averaged)
    _assert_same(dict(run.averaged.module.state_dict()), load_checkpoint(initial).averaged)
    assert run.progress == Progress(audio_s=7200.0)  # what those weights have heard


def test_fine_tuning_takes_the_shape_of_its_checkpoint(corpus: TinyCorpus, tmp_path: Path) -> None:
    model = make_model(n_layers=1, hidden_size=24, cell="gru")
    old = make_settings(
        corpus, tmp_path / "old", "model.cell=gru", "model.n_layers=1", "model.hidden_size=24"
    )
    initial = tmp_path / "initial.pt"
    save_weights(make_checkpoint(model, old), initial)
    recipe = tmp_path / "fine-tune.toml"
    recipe.write_text(
        f'[data]\ntrain = ["{corpus.train}"]\ndev = ["{corpus.dev}"]\n'
        f'cache = "{tmp_path / "features"}"\n'
        f"[optimiser]\nn_epochs = 1\n"
        f'[run]\ndirectory = "{tmp_path / "run"}"\ninitial_checkpoint = "{initial}"\n'
    )
    run_task(recipe, ["model.dropout=0.3"])
    found = load_checkpoint(tmp_path / "run" / "last.pt").settings
    assert found["model"] == {**old.model_dump(mode="json")["model"], "dropout": 0.3}
    assert found["features"] == old.model_dump(mode="json")["features"]
    with pytest.raises(TrainingError, match=r"another model.*hidden_size is 24 there and 32 here"):
        run_task(recipe, ["model.hidden_size=32", f'run.directory="{tmp_path / "other"}"'])


def test_run_writes_pieces_of_words_and_its_successors_too(
    corpus: TinyCorpus, tmp_path: Path
) -> None:
    pieces = make_settings(corpus, tmp_path / "pieces", "data.n_pieces=30", "optimiser.n_epochs=1")
    train(pieces)
    tokens = load_checkpoint(tmp_path / "pieces" / "last.pt").tokens
    assert len(tokens) == 31
    assert {"a", "z", "'", WORD_MARK} <= set(tokens)
    initial = f'run.initial_checkpoint="{tmp_path / "pieces" / "last.pt"}"'
    successor = TrainingRun(make_settings(corpus, tmp_path / "next", initial), _ALONE)
    assert tuple(successor.corpus.tokens) == tuple(tokens)
    kept = load_checkpoint(tmp_path / "pieces" / "last.pt").averaged
    _assert_same(dict(successor.model.state_dict()), kept)
    other = make_settings(corpus, tmp_path / "other", initial, "data.n_pieces=0")
    characters = dict(TrainingRun(other, _ALONE).model.state_dict())
    assert characters["token_head.weight"].shape[0] == len(CHARACTERS)
    assert torch.equal(characters["phone_head.weight"], kept["phone_head.weight"])
    with pytest.raises(TrainingError, match="another model"):
        TrainingRun(pieces.model_copy(update={"data": other.data}), _ALONE)


def test_run_refuses_more_pieces_than_the_transcripts_have(
    corpus: TinyCorpus, tmp_path: Path
) -> None:
    settings = make_settings(corpus, tmp_path / "run", "data.n_pieces=5000")
    with pytest.raises(TrainingError, match=r"5000 pieces.*data\.n_pieces"):
        TrainingRun(settings, _ALONE)


def test_run_refuses_an_initial_checkpoint_of_another_model(
    corpus: TinyCorpus, tmp_path: Path
) -> None:
    save_checkpoint(
        make_checkpoint(make_model(), make_settings(corpus, tmp_path / "old")),
        tmp_path / "initial.pt",
    )
    settings = make_settings(
        corpus, tmp_path / "run", f'run.initial_checkpoint="{tmp_path / "initial.pt"}"'
    )
    with pytest.raises(TrainingError, match=r"initial\.pt"):
        TrainingRun(settings, _ALONE)


def test_new_run_knows_the_statistics_of_its_features(corpus: TinyCorpus, tmp_path: Path) -> None:
    run = TrainingRun(make_settings(corpus, tmp_path / "run"), _ALONE)
    store = run.corpus.stores[0]
    frames = torch.cat([store.load(i) for i in run.corpus.labels])
    torch.testing.assert_close(run.model.feature_mean, frames.mean(dim=0), atol=1e-4, rtol=0)
    torch.testing.assert_close(run.model.feature_std, frames.std(dim=0), atol=1e-3, rtol=0)


# One step


@pytest.fixture
def run(corpus: TinyCorpus, tmp_path: Path) -> TrainingRun:
    return TrainingRun(make_settings(corpus, tmp_path / "run", "optimiser.clip_norm=0.01"), _ALONE)


def _gradient_norm(run: TrainingRun) -> float:
    gradients = [p.grad.flatten() for p in run.model.parameters() if p.grad is not None]
    return float(torch.cat(gradients).norm())


def test_step_clips_the_gradient(run: TrainingRun) -> None:
    _, norm = run.step(_all_utterances(run), n_batches=1)
    assert norm > 0.1
    assert _gradient_norm(run) == pytest.approx(0.01, rel=1e-3)


def test_step_takes_the_rate_of_the_schedule(run: TrainingRun) -> None:
    options = run.settings.optimiser
    run.progress = Progress(epoch=1, batch=3, step=50)  # of two passes of six batches
    run.step(_all_utterances(run), n_batches=6)
    expected = options.final_learning_rate + (
        options.learning_rate - options.final_learning_rate
    ) * 0.5 * (1 + math.cos(math.pi * 0.75))
    assert [group["lr"] for group in run.optimiser.param_groups] == pytest.approx([expected] * 2)


def test_step_averages_the_weights(run: TrainingRun) -> None:
    batch = _all_utterances(run)
    averaged = dict(run.averaged.module.named_parameters())
    run.step(batch, n_batches=1)
    first = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    _assert_same({n: p.data for n, p in averaged.items()}, first)
    run.step(batch, n_batches=1)
    for name, parameter in run.model.named_parameters():
        expected = 2 / 11 * first[name] + 9 / 11 * parameter  # young averages forget fast
        torch.testing.assert_close(averaged[name], expected, msg=name)
        assert not torch.equal(first[name], parameter), name


def test_step_without_a_finite_gradient_is_left_out(run: TrainingRun) -> None:
    batch = _all_utterances(run)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    averaged = {name: value.clone() for name, value in run.averaged.state_dict().items()}
    broken = replace(batch, features=torch.full_like(batch.features, float("inf")))
    _, norm = run.step(broken, n_batches=1)
    assert not math.isfinite(norm)
    _assert_same(dict(run.model.state_dict()), before)
    _assert_same(dict(run.averaged.state_dict()), averaged)
    assert run.optimiser.state_dict()["state"] == {}
    _, norm = run.step(batch, n_batches=1)
    assert math.isfinite(norm)
    assert not torch.equal(run.model.token_head.weight, before["token_head.weight"])


def test_weight_decay_acts_on_matrices_only(run: TrainingRun) -> None:
    names = {id(p): (name, p.dim()) for name, p in run.model.named_parameters()}
    decayed, others = (
        [names[id(p)] for p in group["params"]] for group in run.optimiser.param_groups
    )
    assert [group["weight_decay"] for group in run.optimiser.param_groups] == [0.01, 0.0]
    assert min(dim for _, dim in decayed) >= 2
    assert all(dim == 1 for _, dim in others)
    assert len(decayed) + len(others) == len(names)


def test_muon_makes_the_steps_of_matrices_orthogonal(corpus: TinyCorpus, tmp_path: Path) -> None:
    changes = ("optimiser.kind=muon", "optimiser.weight_decay=0.0", "optimiser.n_warmup_steps=0")
    run = TrainingRun(make_settings(corpus, tmp_path / "run", *changes), _ALONE)
    matrix, bias = run.model.phone_head.weight, run.model.phone_head.bias
    held_matrix, held_bias = matrix.detach().clone(), bias.detach().clone()
    run.step(_all_utterances(run), n_batches=1)
    (rate,) = {group["lr"] for group in run.optimiser.param_groups}
    assert matrix.grad is not None
    gradient = torch.linalg.svdvals(matrix.grad)
    step = torch.linalg.svdvals((held_matrix - matrix).detach())
    step /= 0.2 * rate * max(matrix.shape) ** 0.5
    assert gradient[5] < 0.3 * gradient[0]
    assert step[0] < 1.3
    assert step[5] > 0.6
    torch.testing.assert_close((held_bias - bias).abs(), torch.full_like(bias, rate))


# Reading window by window


def test_draw_chunking_depends_on_the_seed_alone() -> None:
    settings = StreamingSettings(share=0.5, chunkings=((8, 8), (16, 4)))
    draws = [draw_chunking(settings, seed=seed) for seed in range(400)]
    torch.manual_seed(3)
    assert [draw_chunking(settings, seed=seed) for seed in range(400)] == draws
    counts = [draws.count(c) for c in (None, Chunking(8, 8), Chunking(16, 4))]
    assert sum(counts) == 400
    assert 160 < counts[0] < 240
    assert min(counts[1:]) > 60


def test_draw_chunking_without_a_share_is_always_full_context() -> None:
    for chunkings in ((), ((8, 8),)):
        settings = StreamingSettings(share=0.0, chunkings=chunkings)
        assert {draw_chunking(settings, seed=seed) for seed in range(200)} == {None}


def test_draw_chunking_with_the_whole_share_is_always_one_of_the_chunkings() -> None:
    settings = StreamingSettings(share=1.0, chunkings=((8, 8), (16, 8), (8, 4)))
    drawn = {draw_chunking(settings, seed=seed) for seed in range(200)}
    assert drawn == {Chunking(8, 8), Chunking(16, 8), Chunking(8, 4)}


def test_steps_read_batches_as_drawn(run: TrainingRun) -> None:
    batch, read = _all_utterances(run), []
    run.model.register_forward_pre_hook(lambda _, arguments: read.append(arguments[2]))
    for step in (0, 1, 2, 3, 4, 5, 6, 7, 5, 2):
        run.progress = replace(run.progress, step=step)
        run.step(batch, n_batches=8)
    assert None in read
    assert set(read[:8]) & {Chunking(*c) for c in run.settings.streaming.chunkings}
    assert read[8:] == [read[5], read[2]]


def test_run_without_a_share_is_evaluated_with_full_context_only(
    corpus: TinyCorpus, tmp_path: Path
) -> None:
    train(make_settings(corpus, tmp_path / "run", "optimiser.n_epochs=1", "streaming.share=0"))
    (row,) = _read_rows(tmp_path / "run")
    assert set(row) == {"epoch", "audio_h", "tones", "total"}


def test_transcripts_depend_on_the_chunking(run: TrainingRun) -> None:
    batch = _all_utterances(run)
    read = [
        greedy_transcripts(run.model, [batch], tokens=CHARACTERS, world=_ALONE, chunking=chunking)
        for chunking in (None, Chunking(1000, 1), Chunking(1, 1))
    ]
    assert read[1] == read[0]
    assert read[2] != read[0]
    assert read[2].keys() == read[0].keys()


# Several processes


def test_two_processes_train_as_one_on_both_batches(corpus: TinyCorpus, tmp_path: Path) -> None:
    overrides = ("optimiser.n_epochs=1", "optimiser.learning_rate=1e-7", "optimiser.batch_s=6.0")
    path = write_settings(corpus, tmp_path / "run.toml")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [sys.executable, *command, "-m", "service.cli", "train", str(path), *overrides],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "2 process(es)" in result.stdout + result.stderr
    assert (tmp_path / "run" / "best.pt").is_file()
    assert [row["epoch"] for row in _read_rows(tmp_path / "run")] == [1]
    both = load_checkpoint(tmp_path / "run" / "last.pt")
    assert both.optimiser is not None

    alone = TrainingRun(make_settings(corpus, tmp_path / "alone", *overrides), _ALONE)
    streams = [_stream_rank(alone, rank) for rank in range(2)]
    n_steps = len(streams[0].plan())
    labels, store = alone.corpus.labels, alone.corpus.stores[0]
    for step, batches in enumerate(zip(*(stream.plan() for stream in streams), strict=True)):
        ids = [i for batch in batches for i in batch]
        union = collate(ids, [store.load(i) for i in ids], [labels[i] for i in ids])
        alone.progress = replace(alone.progress, batch=step, step=step)
        alone.step(union, n_batches=n_steps)
    assert both.progress.step == n_steps > 2
    expected = alone.optimiser.state_dict()["state"]
    for i, state in both.optimiser["state"].items():
        torch.testing.assert_close(
            state["exp_avg"], expected[i]["exp_avg"], rtol=1e-3, atol=1e-6, msg=str(i)
        )


def _stream_rank(run: TrainingRun, rank: int) -> BatchStream:
    return BatchStream(
        run.corpus.cuts,
        run.corpus.labels,
        run.corpus.stores,
        batch_s=run.settings.optimiser.batch_s,
        seed=run.settings.run.seed,
        epoch=0,
        shortest_first=True,
        rank=rank,
        world_size=2,
    )


# The loss


def _make_loss_inputs() -> tuple[Tensor, Tensor, Tensor, Batch]:
    generator = torch.Generator().manual_seed(9)
    lengths = torch.tensor([12, 7, 9])
    token_logits = torch.randn(3, 12, 8, generator=generator)
    phone_logits = torch.randn(3, 12, 6, generator=generator)
    labels = [Labels((1, 1, 2), (3,)), Labels((4,), ()), Labels((5, 6), (1, 2, 2))]
    return token_logits, phone_logits, lengths, collate("abc", [torch.zeros(1, 1)] * 3, labels)


def _compute(
    token_logits: Tensor,
    phone_logits: Tensor,
    lengths: Tensor,
    batch: Batch,
    consistency: float = 0.0,
) -> Losses:
    return compute_losses(
        token_logits,
        phone_logits,
        lengths,
        tokens=batch.tokens,
        token_lengths=batch.token_lengths,
        phones=batch.phones,
        phone_lengths=batch.phone_lengths,
        consistency=consistency,
    )


def _ctc(logits: Tensor, n_frames: int, labels: Tensor) -> float:
    log_probs = logits[:n_frames].log_softmax(-1)
    return float(
        ctc_loss(
            log_probs, labels, torch.tensor(n_frames), torch.tensor(len(labels)), reduction="sum"
        )
    )


def test_loss_is_that_of_each_head_by_label() -> None:
    token_logits, phone_logits, lengths, batch = _make_loss_inputs()
    losses = _compute(token_logits, phone_logits, lengths, batch)
    token_nll = sum(
        _ctc(token_logits[i], int(lengths[i]), batch.tokens[i, :n])
        for i, n in enumerate(batch.token_lengths.tolist())
    )
    phone_nll = sum(
        _ctc(phone_logits[i], int(lengths[i]), batch.phones[i, :n])
        for i, n in enumerate(batch.phone_lengths.tolist())
        if n > 0
    )
    assert float(losses.token_nll) == pytest.approx(token_nll, rel=1e-5)
    assert float(losses.phone_nll) == pytest.approx(phone_nll, rel=1e-5)
    assert (int(losses.n_tokens), int(losses.n_phones)) == (6, 4)
    expected = 0.7 * token_nll / 6 + 0.3 * phone_nll / 4
    assert float(losses.combine(0.3)) == pytest.approx(expected, rel=1e-5)


def test_loss_ignores_frames_behind_the_length() -> None:
    token_logits, phone_logits, lengths, batch = _make_loss_inputs()
    expected = _compute(token_logits, phone_logits, lengths, batch)
    behind = torch.arange(12) >= lengths[:, None]
    token_logits[behind] = torch.tensor([9.0] + [0.0] * 7)  # the blank
    phone_logits[behind] = 7.0
    actual = _compute(token_logits, phone_logits, lengths, batch)
    assert torch.equal(actual.combine(0.5), expected.combine(0.5))
    assert torch.equal(actual.blank_share, expected.blank_share)


def test_masked_utterance_gives_the_phone_head_no_gradient() -> None:
    token_logits, phone_logits, lengths, batch = _make_loss_inputs()
    token_logits.requires_grad_()
    phone_logits.requires_grad_()
    _compute(token_logits, phone_logits, lengths, batch).combine(0.5).backward()
    assert token_logits.grad is not None
    assert phone_logits.grad is not None
    assert [bool(g.abs().sum() > 0) for g in phone_logits.grad] == [True, False, True]
    assert [bool(g.abs().sum() > 0) for g in token_logits.grad] == [True, True, True]


def test_two_equal_views_cost_what_one_costs() -> None:
    token_logits, phone_logits, lengths, batch = _make_loss_inputs()
    once = _compute(token_logits, phone_logits, lengths, batch)
    tokens, phones = token_logits.repeat(2, 1, 1), phone_logits.repeat(2, 1, 1)
    twice = _compute(tokens, phones, lengths.repeat(2), batch.twice(), consistency=0.5)
    torch.testing.assert_close(twice.combine(0.3), once.combine(0.3))


def test_views_are_drawn_together_inside_their_lengths() -> None:
    token_logits, phone_logits, lengths, batch = _make_loss_inputs()
    generator = torch.Generator().manual_seed(3)
    tokens, phones = (
        torch.cat([x, x + torch.randn(x.shape, generator=generator)]).requires_grad_()
        for x in (token_logits, phone_logits)
    )
    losses = _compute(tokens, phones, lengths.repeat(2), batch.twice(), consistency=0.5)
    for divergence, logits in (
        (losses.token_divergence, tokens),
        (losses.phone_divergence, phones),
    ):
        log_probs = logits.detach().log_softmax(-1)
        ours, theirs = log_probs[:3], log_probs[3:]
        each = ((ours.exp() - theirs.exp()) * (ours - theirs)).sum(-1)  # both directions
        inside = torch.arange(12) < lengths[:, None]
        torch.testing.assert_close(divergence, 0.5 * each[inside].sum())
        (gradient,) = torch.autograd.grad(divergence, logits)
        # each view goes towards the other, which counts as fixed
        expected = 0.5 * (ours.exp() - theirs.exp()) * inside.unsqueeze(-1)
        torch.testing.assert_close(gradient, torch.cat([expected, -expected]))


def test_run_with_consistency_reads_two_views(corpus: TinyCorpus, tmp_path: Path) -> None:
    more = ("optimiser.consistency=0.2", "model.dropout=0.5")
    run = TrainingRun(make_settings(corpus, tmp_path / "run", *more), _ALONE)
    batch = next(iter(run.open_stream(first_batch=0)))
    losses, norm = run.step(batch, n_batches=1)
    assert int(losses.n_tokens) == 2 * int(batch.token_lengths.sum())
    assert float(losses.token_divergence.detach()) > 0
    assert float(losses.phone_divergence.detach()) > 0
    assert math.isfinite(norm)


def test_batch_that_is_masked_whole_trains_the_token_head_alone() -> None:
    token_logits, phone_logits, lengths, batch = _make_loss_inputs()
    token_logits.requires_grad_()
    phone_logits.requires_grad_()
    masked = replace(batch, phone_lengths=torch.zeros_like(batch.phone_lengths))
    losses = _compute(token_logits, phone_logits, lengths, masked)
    losses.combine(0.5).backward()
    assert phone_logits.grad is not None  # processes that wait for each other need one
    assert token_logits.grad is not None
    assert (phone_logits.grad == 0).all()
    assert (token_logits.grad != 0).any()
    assert losses.combine(0.5).item() == pytest.approx(0.5 * losses.token_nll.item() / 6)


def test_phones_that_do_not_fit_train_nothing() -> None:
    tokens, phones, lengths, batch = _make_loss_inputs()
    phones.requires_grad_()
    trigram = torch.full((6, 6, 6), 1 / 6)
    too_many = torch.full((len(lengths), int(lengths.max())), 3)  # equal ones need blanks between
    losses = compute_losses(
        tokens,
        phones,
        lengths,
        tokens=batch.tokens,
        token_lengths=batch.token_lengths,
        phones=too_many,
        phone_lengths=lengths,
        trigram=trigram,
    )
    losses.phone_nll.backward()
    assert float(losses.phone_nll.detach()) == 0.0
    assert phones.grad is not None
    assert not phones.grad.any()


def test_blank_share_counts_the_frames_inside() -> None:
    _, phone_logits, lengths, batch = _make_loss_inputs()
    token_logits = torch.zeros(3, 12, 8)
    token_logits[:, :, 1] = 1.0
    token_logits[0, :4, 0] = 2.0
    token_logits[1, 7:, 0] = 2.0  # padding
    losses = _compute(token_logits, phone_logits, lengths, batch)
    assert float(losses.blank_share) == pytest.approx(4 / 28)


# The schedule


def _rate(step: int = 1000, *, progress: float = 0.0, n_warmup_steps: int = 10) -> float:
    return learning_rate(
        step, progress=progress, n_warmup_steps=n_warmup_steps, highest=0.2, final=0.01
    )


def test_learning_rate_rises_linearly_to_the_highest() -> None:
    rates = [_rate(step) for step in range(12)]
    assert rates[:10] == pytest.approx([0.02 * (step + 1) for step in range(10)])
    assert rates[10:] == [0.2, 0.2]
    assert _rate(0, n_warmup_steps=0) == 0.2


def test_learning_rate_falls_along_half_a_cosine() -> None:
    assert _rate(progress=0.0) == 0.2
    assert _rate(progress=0.25) == pytest.approx(0.01 + 0.19 * (0.5 + math.sqrt(0.125)))
    assert _rate(progress=0.5) == pytest.approx(0.105)
    assert _rate(progress=1.0) == pytest.approx(0.01)
    assert _rate(progress=1.2) == pytest.approx(0.01)


# The number type


def _step_that_takes(seconds: dict[torch.dtype, float]) -> Callable[[torch.dtype], None]:
    return lambda dtype: time.sleep(seconds[dtype])


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_choose_precision_takes_the_faster(faster: torch.dtype) -> None:
    seconds = {torch.float32: 0.1, torch.bfloat16: 0.1, faster: 0.0}
    assert choose_precision(_step_that_takes(seconds), "auto") == faster


def test_choose_precision_does_not_count_the_first_step() -> None:
    seconds = {torch.float32: [0.2, 0.0, 0.0, 0.0], torch.bfloat16: [0.0, 0.1, 0.1, 0.1]}
    chosen = choose_precision(lambda dtype: time.sleep(seconds[dtype].pop(0)), "auto")
    assert chosen == torch.float32


def test_choose_precision_forgives_a_step_that_something_else_held_up() -> None:
    seconds = {torch.float32: [0.0, 0.05, 0.05, 0.05], torch.bfloat16: [0.0, 0.2, 0.2, 0.0]}
    chosen = choose_precision(lambda dtype: time.sleep(seconds[dtype].pop(0)), "auto")
    assert chosen == torch.bfloat16


@pytest.mark.parametrize("broken", [torch.float32, torch.bfloat16])
def test_choose_precision_passes_over_a_type_that_does_not_run(broken: torch.dtype) -> None:
    def step(dtype: torch.dtype) -> None:
        if dtype == broken:
            raise RuntimeError("not implemented for this type")
        time.sleep(0.01)

    assert choose_precision(step, "auto") != broken


@pytest.mark.parametrize(
    ("requested", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_choose_precision_takes_what_is_requested(requested: str, expected: torch.dtype) -> None:
    def refuse(dtype: torch.dtype) -> None:
        raise AssertionError(f"{dtype} was tried")

    assert choose_precision(refuse, requested) == expected


# Checkpoints


def test_checkpoint_round_trip_is_exact(uninterrupted: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(uninterrupted / "last.pt")
    save_checkpoint(checkpoint, tmp_path / "copy.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["copy.pt"]
    copy = load_checkpoint(tmp_path / "copy.pt")
    assert checkpoint.model is not None
    for field in checkpoint.__dataclass_fields__:
        _assert_same(getattr(copy, field), getattr(checkpoint, field), field)


def test_weights_only_checkpoint_is_small_and_close(
    corpus: TinyCorpus, uninterrupted: Path, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(uninterrupted / "last.pt")
    save_weights(checkpoint, tmp_path / "weights.pt")
    weights = load_checkpoint(tmp_path / "weights.pt")
    assert weights.model is None
    assert weights.optimiser is None
    assert weights.tokens == checkpoint.tokens
    assert weights.averaged.keys() == checkpoint.averaged.keys()
    for name, value in weights.averaged.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, checkpoint.averaged[name], atol=1e-3, rtol=1e-3)
    size = (tmp_path / "weights.pt").stat().st_size
    assert size < 0.25 * (uninterrupted / "last.pt").stat().st_size
    assert str(corpus.train.parent).encode() not in (tmp_path / "weights.pt").read_bytes()


def test_failing_save_keeps_the_old_checkpoint(uninterrupted: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(uninterrupted / "last.pt")
    save_checkpoint(checkpoint, tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(replace(checkpoint, optimiser={"x": lambda: 0}), tmp_path / "last.pt")
    assert (tmp_path / "last.pt").read_bytes() == before


def test_save_that_cannot_be_written_is_named(uninterrupted: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(uninterrupted / "last.pt")
    with pytest.raises(TrainingError, match=r"cannot write .*gone/last\.pt.*make room"):
        save_checkpoint(checkpoint, tmp_path / "gone" / "last.pt")


def test_load_checkpoint_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"there is no checkpoint .*absent\.pt"):
        load_checkpoint(tmp_path / "absent.pt")


@pytest.mark.parametrize("kept", [0, 1, 0.5, 0.999])
def test_load_checkpoint_refuses_a_damaged_file(
    uninterrupted: Path, tmp_path: Path, kept: float
) -> None:
    data = (uninterrupted / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(data[: int(kept * len(data)) if kept < 1 else 1])
    with pytest.raises(TrainingError, match=r"last\.pt cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / "last.pt")


def test_load_checkpoint_refuses_code(tmp_path: Path) -> None:
    torch.save({"format_version": 1, "settings": Path("/")}, tmp_path / "last.pt")
    with pytest.raises(TrainingError, match=r"last\.pt cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize("content", [{"format_version": 2}, {"weights": 1}, [1, 2]])
def test_load_checkpoint_refuses_another_format(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(TrainingError, match=r"last\.pt has checkpoint format .*, expected 1"):
        load_checkpoint(tmp_path / "last.pt")


# Settings


@pytest.mark.parametrize(
    "name", ["en-small", "en-small-streaming", "en-small-deep", "en-small-long", "fine-tune"]
)
def test_load_settings_reads_the_shipped_recipes(name: str) -> None:
    recipe = Path(__file__).parent.parent / "training" / "recipes" / f"{name}.toml"
    settings = load_settings(recipe, ['data.train=["a.jsonl"]', 'data.dev=["b.jsonl"]'])
    assert settings.data.train == (Path("a.jsonl"),)
    assert settings.model.bidirectional


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("optimiser.n_epochs=7", "optimiser", "n_epochs", 7),
        ("optimiser.learning_rate=2e-4", "optimiser", "learning_rate", 2e-4),
        ("model.cell=gru", "model", "cell", "gru"),
        ('model.cell="rnn"', "model", "cell", "rnn"),
        ("model.bidirectional=false", "model", "bidirectional", False),
        ("data.speeds=[1.0, 0.9]", "data", "speeds", (1.0, 0.9)),
        ('data.corpora=["a", "b"]', "data", "corpora", ("a", "b")),
        ("streaming.chunkings=[[4, 2]]", "streaming", "chunkings", ((4, 2),)),
        ("run.directory=/tmp/runs/a=b", "run", "directory", Path("/tmp/runs/a=b")),  # noqa: S108
        ('run.initial_checkpoint="my run/best.pt"', "run", "initial_checkpoint", None),
    ],
)
def test_override_is_read_as_in_toml(
    corpus: TinyCorpus, tmp_path: Path, override: str, section: str, name: str, value: object
) -> None:
    settings = make_settings(corpus, tmp_path / "run", override)
    expected = Path("my run/best.pt") if value is None else value
    assert getattr(getattr(settings, section), name) == expected
    others = make_settings(corpus, tmp_path / "run")
    assert getattr(getattr(others, section), name) != expected
    assert settings.features == others.features


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.n_epoch=3", r"optimiser\.n_epoch: Extra"),
        ("optimizer.n_epochs=3", r"optimizer: Extra"),
        ("n_epochs=3", r"n_epochs: Extra"),
        ("optimiser.n_epochs=many", r"optimiser\.n_epochs: .*integer"),
        ("optimiser.n_epochs=0", r"optimiser\.n_epochs: .*greater than or equal to 1"),
        ("model.cell=transformer", r"model\.cell: .*'lstm', 'gru' or 'rnn'"),
        ("model.subsampling=5", r"model\.subsampling: .*2, 3 or 4"),
        ("model.dropout=1.0", r"model\.dropout: .*less than 1"),
        ("data.train=a.jsonl", r"data\.train: .*tuple"),
        ("data.speeds=[0.9, 1.1]", r"data\.speeds .*1\.0 must be one"),
        ("streaming.chunkings=[]", r"streaming: .*share is above 0 but chunkings is empty"),
        (
            "streaming.chunkings=[[0, 4]]",
            r"streaming\.chunkings\.0\.0: .*greater than or equal to 1",
        ),
        ("streaming.chunkings=[[8, 8], [8, 0]]", r"streaming\.chunkings\.1\.1: .*greater than"),
        ("streaming.chunkings=[[8]]", r"streaming\.chunkings\.0\.1: Field required"),
        ("streaming.share=1.5", r"streaming\.share: .*less than or equal to 1"),
        ("streaming.share=-0.5", r"streaming\.share: .*greater than or equal to 0"),
        ("features.n_mels=1", r"features\.n_mels: .*greater than or equal to 8"),
        ("optimiser.n_epochs", r"'optimiser\.n_epochs' is no setting; expected section"),
        ("=3", r"'=3' is no setting"),
        ("optimiser.n_epochs.more=3", r"n_epochs is a value, not a section"),
        ("optimiser=3", r"optimiser: .*OptimiserSettings"),
    ],
)
def test_wrong_setting_is_refused_by_name(
    corpus: TinyCorpus, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        make_settings(corpus, tmp_path / "run", override)


def test_load_settings_names_all_that_is_wrong(corpus: TinyCorpus, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"data\.cash.*run\.seed") as raised:
        make_settings(corpus, tmp_path / "run", "data.cash=1", "run.seed=x")
    assert "run.toml" in str(raised.value)


def test_load_settings_needs_the_data(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[run]\nseed = 3\n")
    with pytest.raises(TrainingError, match=r"run\.toml.*data: Field required"):
        load_settings(tmp_path / "run.toml")


def test_load_settings_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"cannot read the settings .*absent\.toml"):
        load_settings(tmp_path / "absent.toml")


@pytest.mark.parametrize("content", [b"[run\nseed = 3\n", b"seed = \n", b"\xff\xfe"])
def test_load_settings_names_a_file_that_is_no_toml(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(TrainingError, match=r"cannot read the settings .*run\.toml"):
        load_settings(tmp_path / "run.toml")
