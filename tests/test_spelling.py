"""Spelling: cuts of what was heard, sentences put together from them, and what a run learns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TinyCorpus, make_checkpoint, make_model, make_settings, write_corpus

from service.errors import TrainingError
from service.text import BLANK
from training import spelling
from training.checkpoint import load_checkpoint, load_model, save_weights
from training.corpus import prepare_corpora
from training.distributed import World
from training.lexicon import PHONES
from training.spelling import Heard, Voice, hear
from training.tasks import run_task

_A, _B, _C = 1, 2, 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def _heard(cuts: Sequence[tuple[int, int, int, int, int]]) -> Heard:
    """Probabilities that tell their frame: column 0 counts frames."""
    n_frames = max(end for *_, end in cuts)
    probabilities = np.zeros((n_frames, len(PHONES)), np.float16)
    probabilities[:, 0] = np.arange(n_frames)
    return Heard(probabilities, np.array([0, n_frames]), np.array(["x"]), np.array(cuts))


def _frames(voice: Voice, words: list[tuple[int, ...]], seed: int = 0) -> list[int]:
    return [int(row[0]) for row in voice.say(words, np.random.default_rng(seed))]


def test_voice_takes_each_phone_from_where_it_was_heard_in_the_same_place() -> None:
    voice = Voice(
        _heard(
            [
                (BLANK, _A, 0, 0, 2),
                (_A, _B, 0, 2, 4),
                (_B, _A, 1, 4, 7),
                (_A, _B, 1, 7, 8),  # the same phones, but here a word ends
                (_B, BLANK, 1, 8, 12),
            ]
        )
    )
    assert _frames(voice, [(_A, _B)]) == [0, 1, 2, 3, *range(8, 12)]
    assert _frames(voice, [(_A,), (_B,)]) == [0, 1, 7, *range(8, 12)]


def test_voice_falls_back_to_the_phone_before_others_and_knows_what_it_cannot_say() -> None:
    voice = Voice(_heard([(BLANK, _A, 0, 0, 1), (_A, _B, 0, 1, 3), (_B, BLANK, 1, 3, 4)]))
    assert _frames(voice, [(_A, _A, _B)]) == [0, 1, 2, 1, 2, 3]
    assert voice.can_say((_A, _B))
    assert not voice.can_say((_C, _B))
    assert not voice.can_say((_B, _A))  # no _A ends a word


def test_voice_draws_among_all_that_it_heard() -> None:
    voice = Voice(_heard([(BLANK, _A, 0, 0, 1), (_A, BLANK, 1, 1, 2), (_A, BLANK, 1, 2, 3)]))
    assert {_frames(voice, [(_A,)], seed)[1] for seed in range(20)} == {1, 2}


def test_hearing_keeps_what_the_phone_head_says_and_cuts_all_frames(corpus: TinyCorpus) -> None:
    settings = make_settings(corpus, corpus.cache.parent / "hear")
    train, _ = prepare_corpora(settings, World(rank=0, size=1, device=torch.device("cpu")))
    model = make_model(n_layers=1, hidden_size=32)
    heard = hear(model, train.open_stream(batch_s=3.0), train.variants)
    assert set(heard.names) == set(train.labels)
    assert np.allclose(heard.probabilities.sum(1), 1, atol=0.01)
    ends = np.where(heard.cuts[:, 1] == BLANK)[0]
    for utterance, (first, last) in enumerate(zip([0, *(ends[:-1] + 1)], ends, strict=True)):
        cuts = heard.cuts[first : last + 1]
        assert cuts[0, 3] == heard.starts[utterance]
        assert cuts[-1, 4] == heard.starts[utterance + 1]
        assert (cuts[1:, 3] == cuts[:-1, 4]).all()
        assert (cuts[:-1, 1] == cuts[1:, 0]).all()
        name = str(heard.names[utterance])
        assert len(cuts) == 1 + len(train.labels[name].phones)
        assert cuts[:, 2].sum() == len(train.texts[name].split())


def _write_run(corpus: TinyCorpus, folder: Path, *, n_epochs: int = 2) -> Path:
    """The settings file of a tiny run, beside everything that it needs."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = make_settings(corpus, folder / "acoustic")
    initial = folder / "initial.pt"
    save_weights(make_checkpoint(make_model(n_layers=1, hidden_size=32), settings), initial)
    (folder / "text.txt").write_text("bad cab\nunknownword cab\ndab add cab\n" * 20)
    lexicon = {"bad": "B AE D", "cab": "K AE B", "dab": "D AE B", "add": "AE D"}
    (folder / "lexicon.txt").write_text("".join(f"{w} {p}\n" for w, p in lexicon.items()))
    path = folder / "spelling.toml"
    path.write_text(
        'task = "spelling"\n'
        + (folder / "acoustic.toml")
        .read_text()
        .replace("[model]", "[model]\nn_spelling_layers = 1")
        .replace("n_epochs = 2", f"n_epochs = {n_epochs}")
        .replace("[run]", f'[run]\ninitial_checkpoint = "{initial}"')
        + f'\n[text]\nlexicon = "{folder / "lexicon.txt"}"\n'
        f'[[text.train]]\npath = "{folder / "text.txt"}"\n'
    )
    return path


@pytest.fixture(scope="module")
def trained(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run_task(_write_run(corpus, folder))
    return folder


def test_run_learns_to_spell_and_leaves_the_rest(trained: Path) -> None:
    before = load_checkpoint(trained / "initial.pt").averaged
    after = load_checkpoint(trained / "acoustic" / "best.pt").averaged
    for name, weights in before.items():
        if not name.startswith("token_head."):
            assert torch.equal(weights.half(), after[name].half()), name
    assert any(name.startswith("spelling.layers.") for name in after)
    model = load_model(load_checkpoint(trained / "acoustic" / "best.pt"))
    assert model.spelling is not None
    rows = [line for line in (trained / "acoustic" / "dev.jsonl").read_text().splitlines() if line]
    assert len(rows) == 2


def test_run_that_stopped_goes_on_as_if_it_had_not(
    corpus: TinyCorpus, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write_run(corpus, tmp_path)
    steps = spelling._Run._step

    def stop_in_the_second_pass(run: spelling._Run, batch: object, *, n_batches: int) -> float:
        if run.weights.progress.epoch == 1 and run.weights.progress.batch == 1:
            run.weights.save("last.pt")
            raise KeyboardInterrupt
        return steps(run, batch, n_batches=n_batches)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(spelling._Run, "_step", stop_in_the_second_pass)
        with pytest.raises(KeyboardInterrupt):
            run_task(path)
    run_task(path)
    whole = load_checkpoint(trained / "acoustic" / "last.pt").averaged
    continued = load_checkpoint(tmp_path / "acoustic" / "last.pt").averaged
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_run_refuses_settings_that_train_nothing(corpus: TinyCorpus, tmp_path: Path) -> None:
    path = _write_run(corpus, tmp_path)
    with pytest.raises(TrainingError, match="n_spelling_layers of at least 1"):
        run_task(path, ["model.n_spelling_layers=0"])


def test_run_refuses_text_that_cannot_be_said(corpus: TinyCorpus, tmp_path: Path) -> None:
    path = _write_run(corpus, tmp_path)
    (tmp_path / "text.txt").write_text("unknownword cab\n")
    with pytest.raises(TrainingError, match="no sentence whose words are all in"):
        run_task(path)
