"""The recurrent language model: it learns, runs go on exactly, its perplexity is a true one."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny  # noqa: F401  # one thread, so that results repeat bit for bit
import torch

from service.errors import InputError, TrainingError
from service.rescorer import BOUNDARY_ID, UNKNOWN_ID, WORD_START, Pieces
from service.text import LETTERS
from training import rnn_lm as training_module
from training.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint
from training.lm_text import (
    EncodedText,
    TextPart,
    count_words,
    encode_text,
    make_batches,
    make_passages,
    make_pieces,
    pad_batch,
    read_sentences,
)
from training.model import Cell
from training.rnn_lm import (
    LanguageModel,
    LanguageModelSettings,
    load_language_model,
    perplexity,
    score_tokens,
    train_language_model,
)

_SENTENCES = ("the cat sat", "a dog ran home", "it's fine", "we all went to the house", "oh")


def _write_text(folder: Path, n_lines: int = 120) -> Path:
    draw = random.Random(1)
    path = folder / "text.txt"
    path.write_text("".join(f"{draw.choice(_SENTENCES)}\n" for _ in range(n_lines)))
    return path


def _make_settings(text: Path, directory: Path, **changes: Any) -> LanguageModelSettings:
    data = {
        "train": [{"path": text, "n_repeats": 2}],
        "dev": [{"path": text, "last_line": 40}],
        "n_pieces": 60,
        "alone_share": 0.7,
        "longest_tokens": 60,
    }
    model = {"embedding_size": 48, "hidden_size": 40, "dropout": 0.1, "embedding_dropout": 0.1}
    optimiser = {"batch_tokens": 200, "n_passes": 2, "n_warmup_steps": 5, "learning_rate": 2e-2}
    run = {"directory": directory, "precision": "float32", "evaluate_every_steps": 20}
    tree: dict[str, dict[str, Any]] = {
        "data": data,
        "model": model,
        "optimiser": optimiser,
        "run": run,
    }
    for name, value in changes.items():
        tree[name] = {**tree[name], **value}
    return LanguageModelSettings.model_validate(tree)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    text = _write_text(folder)
    quiet = {"dropout": 0.0, "embedding_dropout": 0.0}
    train_language_model(
        _make_settings(text, folder / "run", model=quiet, optimiser={"n_passes": 30})
    )
    return folder / "run"


def _make_tiny_model(cell: Cell = "lstm", *, n_pieces: int = 5) -> LanguageModel:
    torch.manual_seed(1)
    model = LanguageModel(n_pieces, cell=cell, n_layers=2, embedding_size=6, hidden_size=4)
    torch.nn.init.normal_(model.embedding.weight)
    return model.eval()


def _make_text(sentences: list[list[int]]) -> EncodedText:
    tokens = [token for sentence in sentences for token in (*sentence, BOUNDARY_ID)]
    starts = [0, *itertools.accumulate(len(sentence) + 1 for sentence in sentences)]
    return EncodedText(
        tokens=np.array(tokens, np.int32),
        starts=np.array(starts),
        counted=np.ones(len(tokens), np.bool_),
        n_counted=len(tokens),
    )


def test_training_learns_the_text(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "dev.jsonl").read_text().splitlines()]

    # the five sentences have 16 words and ends in all and are equally likely: 5 ** (1 / 4.2)
    assert rows[-1]["perplexity"] < 2
    assert rows[0]["perplexity"] > 3 * rows[-1]["perplexity"]
    assert load_checkpoint(run / "best.pt").progress.best_cer == pytest.approx(
        min(row["perplexity"] for row in rows), abs=0.01
    )


@pytest.mark.parametrize("n_steps", [3, 25])
def test_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_steps: int
) -> None:
    text = _write_text(tmp_path)
    train_language_model(_make_settings(text, tmp_path / "whole"))
    step = training_module._Run._step

    def stop(self: training_module._Run, *args: Any, **kwargs: Any) -> None:
        if self.weights.progress.step == n_steps:
            raise KeyboardInterrupt
        step(self, *args, **kwargs)

    settings = _make_settings(text, tmp_path / "parts", run={"checkpoint_every_s": 1e-9})
    settings = settings.model_copy(
        update={"run": settings.run.model_copy(update={"directory": tmp_path / "parts"})}
    )
    with monkeypatch.context() as patched:
        patched.setattr(training_module._Run, "_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train_language_model(settings)
    assert load_checkpoint(tmp_path / "parts" / "last.pt").progress.step == n_steps
    train_language_model(settings)

    one, other = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert one.progress == other.progress
    assert all(torch.equal(one.averaged[name], other.averaged[name]) for name in one.averaged)


def test_run_refuses_the_folder_of_another(run: Path) -> None:
    text = run.parent / "text.txt"

    with pytest.raises(TrainingError, match="choose another directory"):
        train_language_model(_make_settings(text, run))  # it has dropout


def test_fine_tuning_starts_from_the_weights_and_pieces_of_a_checkpoint(
    run: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("the house sat\na cat ran\n" * 40)
    quiet = {"dropout": 0.0, "embedding_dropout": 0.0}
    settings = _make_settings(
        other,
        tmp_path / "run",
        model=quiet,
        optimiser={"learning_rate": 1e-9, "final_learning_rate": 0.0, "n_passes": 1},
        run={"initial_checkpoint": run / "best.pt"},
    )

    tuned, pieces = load_language_model(train_language_model(settings))

    initial, initial_pieces = load_language_model(run / "best.pt")
    assert pieces == initial_pieces
    assert torch.allclose(tuned.embedding.weight, initial.embedding.weight, atol=1e-5)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_sentence_probabilities_sum_to_one(cell: Cell) -> None:
    """All sentences of up to 3 pieces, and all beginnings of 4: nothing else can happen."""
    model = _make_tiny_model(cell)
    others = range(1, 5)
    ended = [list(s) for n in range(4) for s in itertools.product(others, repeat=n)]
    begun = [list(s) for s in itertools.product(others, repeat=4)]

    whole = _sum_probabilities(model, ended, with_end=True)
    cut = _sum_probabilities(model, begun, with_end=False)

    assert whole + cut == pytest.approx(1, abs=1e-5)


def _sum_probabilities(
    model: LanguageModel, sentences: list[list[int]], *, with_end: bool
) -> float:
    text = _make_text(sentences)
    scores = score_tokens(model, text)
    totals = [
        scores[begin : end - (not with_end)].sum()
        for begin, end in itertools.pairwise(text.starts.tolist())
    ]
    return float(torch.stack(totals).exp().sum())


def test_perplexity_equals_a_word_by_word_count(tmp_path: Path) -> None:
    pieces = Pieces(
        ("</s>", "<unk>", WORD_START, f"{WORD_START}a", "b", "c"), (-9.0, -9, -2, -1, -1, -1)
    )
    path = tmp_path / "text.txt"
    path.write_text("ab c\nc abc\n")
    model = _make_tiny_model(n_pieces=6)
    sentences = [[["ab"], ["c"]], [["c"], ["abc"]]]

    log_prob, n_counted = 0.0, 0
    for sentence in sentences:
        read = [BOUNDARY_ID]
        for (word,) in sentence:
            for piece in pieces.encode(word):
                if word != "abc":
                    log_prob += _log_prob(model, read, piece)
                read.append(piece)
            n_counted += word != "abc"
        log_prob += _log_prob(model, read, BOUNDARY_ID)
        n_counted += 1

    text = encode_text([TextPart(path)], pieces, {"ab", "c"})
    assert text.n_counted == n_counted == 5
    assert perplexity(model, text) == pytest.approx(math.exp(-log_prob / n_counted), rel=1e-5)


def _log_prob(model: LanguageModel, read: list[int], piece: int) -> float:
    with torch.inference_mode():
        return float(model(torch.tensor([read]))[0, -1].log_softmax(-1)[piece])


def test_padding_and_neighbours_change_no_score() -> None:
    model = _make_tiny_model()
    sentences = [[1, 2], [3, 4, 1, 2, 2, 3, 4], [], [2]]

    together = score_tokens(model, _make_text(sentences))
    alone = torch.cat([score_tokens(model, _make_text([sentence])) for sentence in sentences])

    assert torch.allclose(together, alone, atol=1e-5)


def test_a_word_is_cut_into_its_likeliest_pieces() -> None:
    names = ("</s>", "<unk>", WORD_START, "a", "b", f"{WORD_START}a", "ab", "ba")
    pieces = Pieces(names, (-9.0, -9.0, -1.0, -2.0, -2.0, -2.5, -2.4, -2.1))

    for letters in itertools.product("ab", repeat=5):
        text = WORD_START + "".join(letters)
        found = pieces.encode(text[1:])
        assert "".join(names[i] for i in found) == text
        best = max(_scores_of_cuts(text, pieces))
        assert sum(pieces.scores[i] for i in found) == pytest.approx(best)


def _scores_of_cuts(text: str, pieces: Pieces) -> list[float]:
    if not text:
        return [0.0]
    return [
        pieces.scores[pieces.ids[text[:n]]] + rest
        for n in range(1, len(text) + 1)
        if text[:n] in pieces.ids
        for rest in _scores_of_cuts(text[n:], pieces)
    ]


def test_letters_that_no_piece_has_are_unknown() -> None:
    pieces = Pieces(("</s>", "<unk>", f"{WORD_START}a", "b"), (-9.0, -9.0, -1.0, -1.0))

    assert pieces.encode("aéb") == (2, UNKNOWN_ID, 3)
    assert Pieces(("</s>", "<unk>", "cat")).encode("dog") == (UNKNOWN_ID,)


def test_pieces_survive_their_metadata_and_refuse_what_makes_no_sense() -> None:
    pieces = Pieces(("</s>", "<unk>", f"{WORD_START}a", "b"), (-9.0, -9.0, -1.25, -1.0))

    assert Pieces.from_metadata(pieces.to_metadata()) == pieces
    with pytest.raises(ValueError, match="lacks"):
        Pieces.from_metadata({"pieces": "[]"})
    with pytest.raises(ValueError, match="begin with"):
        Pieces(("a", "b"))
    with pytest.raises(ValueError, match="1 scores for 3 pieces"):
        Pieces(("</s>", "<unk>", "a"), (0.0,))


def test_subwords_have_every_letter(tmp_path: Path) -> None:
    counts = count_words([TextPart(_write_text(tmp_path))])

    pieces = make_pieces(counts, kind="subword", n_pieces=60)

    assert set(LETTERS) <= set("".join(pieces.names[2:]))
    assert UNKNOWN_ID not in pieces.encode("zyzzyva's")
    assert len(pieces.names) <= 60


def test_word_pieces_are_the_frequent_words(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a b a\nb a c\n")

    pieces = make_pieces(count_words([TextPart(path)]), kind="word", n_pieces=4)

    assert pieces.names == ("</s>", "<unk>", "a", "b")
    assert encode_text([TextPart(path)], pieces).tokens.tolist() == [2, 3, 2, 0, 3, 2, 1, 0]


def test_a_manifest_is_read_as_its_different_transcripts(tmp_path: Path) -> None:
    manifest = tmp_path / "train.jsonl"
    said = ["Two words", "two words!", "a third"]
    rows = [{"audio_filepath": f"{i}.wav", "text": text} for i, text in enumerate(said)]
    manifest.write_text("\n".join(map(json.dumps, [*rows, {"audio_filepath": "untold.wav"}])))
    assert list(read_sentences([TextPart(manifest)])) == ["a third", "two words"]


def test_reading_takes_the_lines_asked_for_and_normalises(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\nTwo, don't''s!\n\nthree 4\nfive\n")

    assert list(read_sentences([TextPart(path, 2, 4)])) == ["two don't s", "three four"]
    with pytest.raises(InputError, match="cannot read"):
        list(read_sentences([TextPart(tmp_path / "none.txt")]))
    with pytest.raises(InputError, match="no words"):
        encode_text([TextPart(path, 3, 3)], Pieces(("</s>", "<unk>")))


@pytest.mark.parametrize("alone_share", [0.0, 0.5, 1.0])
def test_passages_hold_every_token_once_in_book_order(alone_share: float) -> None:
    draw = random.Random(2)
    text = _make_text([[1] * draw.randint(0, 15) for _ in range(200)])

    passages = make_passages(text, alone_share=alone_share, longest=12, seed="1")

    assert passages[0, 0] == 0
    assert passages[-1, 1] == len(text.tokens)
    assert (passages[1:, 0] == passages[:-1, 1]).all()
    assert (passages[:, 1] - passages[:, 0]).max() <= 12
    if alone_share == 1:
        assert set(text.starts[:-1].tolist()) <= set(passages[:, 0].tolist())
    else:
        assert len(passages) < len(make_passages(text, alone_share=1, longest=12, seed="1"))


def test_batches_use_each_passage_once_and_keep_to_their_size() -> None:
    draw = random.Random(3)
    text = _make_text([[1] * draw.randint(0, 30) for _ in range(500)])
    passages = make_passages(text, alone_share=1.0, longest=40, seed="1")

    batches = make_batches(passages, n_tokens=128, seed="1")

    assert sorted(np.concatenate(batches).tolist()) == passages.tolist()
    assert max(pad_batch(text, batch)[0].size for batch in batches) <= 128
    again = make_batches(passages, n_tokens=128, seed="1")
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    assert not np.array_equal(batches[0], make_batches(passages, n_tokens=128, seed="2")[0])


def test_a_batch_reads_what_it_predicted_before() -> None:
    text = _make_text([[1, 2], [3]])

    read, wanted = pad_batch(text, np.array([[0, 3], [3, 5]]))

    assert wanted.tolist() == [[1, 2, 0, -1], [3, 0, -1, -1]]
    assert read.tolist() == [[0, 1, 2, 0], [0, 3, 0, 0]]


def test_locked_dropout_drops_the_same_units_at_all_steps() -> None:
    model = LanguageModel(5, embedding_size=32, hidden_size=8, dropout=0.5).train()
    torch.manual_seed(1)

    dropped = model._lock_dropout(torch.ones(3, 7, 32)) == 0

    assert 0 < dropped.float().mean() < 1
    assert (dropped == dropped[:, :1]).all()
    assert not (dropped == dropped[:1]).all()


def test_loading_refuses_what_is_no_language_model(tmp_path: Path) -> None:
    checkpoint = Checkpoint(settings={}, tokens=[], phones=[], averaged={}, progress=Progress())
    save_checkpoint(checkpoint, tmp_path / "other.pt")

    with pytest.raises(TrainingError, match="no checkpoint of a language model"):
        load_language_model(tmp_path / "other.pt")
