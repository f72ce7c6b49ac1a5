"""Intents and slots: data are read or refused, sums equal enumeration, graphs equal torch."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny import make_model

from export import understanding as export_module
from export.graph import export_graph
from export.understanding import export_understanding
from service.errors import BundleError, ExportError, TrainingError
from service.understanding import (
    EMPTY_PARSE,
    Parse,
    Transitions,
    Understander,
    Vocabulary,
    find_best_path,
    from_metadata,
    may_follow,
    score_path,
    shape_word,
    spans,
    sum_paths,
    to_metadata,
)
from training import understanding as training_module
from training.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint
from training.config import read_tree, validate
from training.lexicon import Dictionary, load_dictionary
from training.slot_data import (
    LabelledSentence,
    collect_values,
    find_confusions,
    mishear,
    read_confusions,
    read_parts,
    read_sentences,
    repair_labels,
    swap_values,
)
from training.understanding import (
    Crf,
    UnderstandingAugment,
    UnderstandingModel,
    UnderstandingOptimiser,
    UnderstandingScores,
    UnderstandingSettings,
    UnderstandingShape,
    fit,
    load_understanding,
    make_vocabulary,
    predict,
    score_parses,
    train_understanding,
)

_DRINKS = ("latte", "flat white", "mocha", "iced mocha", "tea")
_SIZES = ("small", "large", "12 ounce", "16 ounce")
_ROOMS = ("kitchen", "living room", "hall")
_LABELS = ("O", "B-a", "I-a", "B-b", "I-b")
_SHAPE = UnderstandingShape(
    n_layers=2,
    hidden_size=12,
    word_size=12,
    character_size=6,
    n_filters=8,
    dropout=0.1,
)


def _sentence(text: str, intent: str) -> LabelledSentence:
    """A sentence from words such as `latte/B-drink`; words without a label are outside."""
    pairs = [word.partition("/") for word in text.split()]
    labels = tuple(label or "O" for _, _, label in pairs)
    return LabelledSentence(tuple(word for word, _, _ in pairs), labels, intent)


def _tag(value: str, name: str) -> str:
    first, *others = value.split()
    return " ".join([f"{first}/B-{name}", *(f"{word}/I-{name}" for word in others)])


def _make_sentences() -> list[LabelledSentence]:
    drinks = [
        _sentence(f"give me a {_tag(size, 'size')} {_tag(drink, 'drink')}", "order")
        for drink in _DRINKS
        for size in _SIZES
    ]
    lights = [_sentence(f"light in the {_tag(room, 'room')}", "light") for room in _ROOMS]
    both = [_sentence(f"a {_tag(drink, 'drink')} and light", "order#light") for drink in _DRINKS]
    return [*drinks, *lights, *both, _sentence("hello there", "greet")]


def _fit(directory: Path, **settings: Any) -> Path:
    n_epochs = settings.pop("n_epochs", 3)
    return fit(
        _make_sentences(),
        settings.pop("dev", _make_sentences()),
        directory=directory,
        model=settings.pop("model", _SHAPE),
        augment=settings.pop("augment", UnderstandingAugment(word_dropout=0.05, swap=0.2)),
        confusions=settings.pop("confusions", {"latte": ("latter", "ladder")}),
        optimiser=UnderstandingOptimiser(
            n_epochs=n_epochs,
            batch_size=8,
            learning_rate=2e-2,
            average_decay=0.9,
            consistency=settings.pop("consistency", 0.0),
        ),
        **settings,
    )


@pytest.fixture(scope="module", params=[("lstm", True), ("gru", False)], ids=["lstm-crf", "gru"])
def best(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The best checkpoint of a run that learned its sentences."""
    cell, crf = request.param
    shape = _SHAPE.model_copy(update={"cell": cell, "crf": crf})
    return _fit(tmp_path_factory.mktemp("run"), n_epochs=30, model=shape)


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "int8"])
def graph(
    best: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("graph") / "understanding.onnx"
    export_understanding(best, path, int8=request.param)
    return path


def _same(one: Parse, other: Parse) -> None:
    assert (one.intent, one.labels) == (other.intent, other.labels)
    assert one.intent_confidence == pytest.approx(other.intent_confidence, abs=1e-4)
    assert one.label_confidences == pytest.approx(other.label_confidences, abs=1e-4)
    assert one.score == pytest.approx(other.score, abs=1e-3)


# Labels and words


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("", []),
        ("O O", []),
        ("B-a I-a O B-b", [("a", 0, 2), ("b", 3, 4)]),
        ("B-a B-a I-a", [("a", 0, 1), ("a", 1, 3)]),
        ("I-a I-a O I-b", [("a", 0, 2), ("b", 3, 4)]),
        ("B-a I-b I-b", [("a", 0, 1), ("b", 1, 3)]),
        ("B-a O I-a", [("a", 0, 1), ("a", 2, 3)]),
        ("B-a.b-c I-a.b-c", [("a.b-c", 0, 2)]),
    ],
)
def test_spans_follow_conlleval(labels: str, expected: list[tuple[str, int, int]]) -> None:
    assert spans(labels.split()) == expected


@pytest.mark.parametrize("seed", range(20))
def test_repaired_labels_mark_the_same_spans(seed: int) -> None:
    labels = random.Random(seed).choices(_LABELS, k=12)
    repaired = repair_labels(labels)
    assert spans(repaired) == spans(labels)
    assert all(may_follow(b, a) for a, b in zip((None, *repaired), repaired, strict=False))


def test_digits_of_a_word_share_a_shape() -> None:
    assert shape_word("9pm") == shape_word("4PM") == "0pm"
    assert make_vocabulary([_sentence("at 9pm or 10", "a")]).words == ("00", "0pm", "at", "or")
    assert set("910") <= set(make_vocabulary([_sentence("at 9pm or 10", "a")]).characters)


def test_vocabulary_has_a_begin_for_every_inside() -> None:
    vocabulary = make_vocabulary([LabelledSentence(("a",), ("I-x",), "i")])
    assert vocabulary.labels == ("O", "B-x", "I-x")


# The CRF


def _draw_costs(seed: int) -> tuple[np.ndarray[Any, Any], Transitions]:
    draw = np.random.default_rng(seed)
    between = draw.normal(scale=2, size=(5, 5))
    first = draw.normal(scale=2, size=5)
    for j, label in enumerate(_LABELS):
        first[j] = first[j] if may_follow(label, None) else -np.inf
        for i, before in enumerate(_LABELS):
            between[i, j] = between[i, j] if may_follow(label, before) else -np.inf
    emission = draw.normal(scale=3, size=(4, 5)).astype(np.float32).astype(np.float64)
    return emission, Transitions(between=between, first=first)


def _enumerate(emission: np.ndarray[Any, Any], costs: Transitions) -> dict[tuple[int, ...], float]:
    scores = {}
    for path in itertools.product(range(5), repeat=len(emission)):
        score = emission[0, path[0]] + costs.first[path[0]]
        for place in range(1, len(emission)):
            score += costs.between[path[place - 1], path[place]] + emission[place, path[place]]
        scores[path] = float(score)
    return scores


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n_words", [1, 2, 4])
def test_decoding_equals_enumeration(seed: int, n_words: int) -> None:
    emission, costs = _draw_costs(seed)
    emission = emission[:n_words]
    scores = _enumerate(emission, costs)
    path = find_best_path(emission, costs)
    assert tuple(path) == max(scores, key=lambda p: scores[p])
    assert score_path(emission, path, costs) == pytest.approx(scores[tuple(path)])
    marginals, log_sum = sum_paths(emission, costs)
    assert log_sum == pytest.approx(np.logaddexp.reduce(list(scores.values())))
    for place, label in itertools.product(range(n_words), range(5)):
        ways = [score for path, score in scores.items() if path[place] == label]
        share = np.exp(np.logaddexp.reduce(ways) - log_sum)
        assert marginals[place, label] == pytest.approx(share, abs=1e-9)


def test_sums_survive_extreme_scores() -> None:
    emission, costs = _draw_costs(0)
    emission[1, :] = -1e4
    emission[1, 2] = 1e4  # an inside label, and nothing else
    emission[0, 3] = 1e4  # behind another slot's begin
    marginals, log_sum = sum_paths(emission, costs)
    assert np.isfinite(marginals).all()
    assert np.isfinite(log_sum)


def _make_crf(costs: Transitions) -> Crf:
    crf = Crf(_LABELS, learned=True)
    for parameter, values in ((crf.between, costs.between), (crf.first, costs.first)):
        finite = np.where(np.isfinite(values), values, 7.0)  # forbidden: any number will do
        parameter.data = torch.from_numpy(finite).float()
    return crf


@pytest.mark.parametrize("seed", range(8))
def test_training_sum_equals_enumeration_for_any_padding(seed: int) -> None:
    emission, costs = _draw_costs(seed)
    crf = _make_crf(costs)
    costs = crf.costs()
    lengths = torch.tensor([4, 1, 3])
    emissions = torch.from_numpy(np.stack([emission] * 3)).float()
    emissions[1, 1:] = emissions[2, 3:] = 1e3  # padding
    labels = torch.tensor([[0, 1, 2, 3], [3, 4, 4, 4], [1, 2, 2, 4]])
    found = crf.log_prob(emissions, labels, lengths).tolist()
    for row, n_words in enumerate(lengths.tolist()):
        scores = _enumerate(emission[:n_words], costs)
        path = tuple(labels[row, :n_words].tolist())
        expected = scores[path] - np.logaddexp.reduce(list(scores.values()))
        assert found[row] == pytest.approx(expected, abs=1e-6)


def test_model_without_crf_has_independent_labels() -> None:
    crf = Crf(_LABELS, learned=False)
    emissions = torch.randn(2, 3, 5)
    labels = torch.tensor([[2, 4, 0], [1, 1, 3]])
    own = emissions.log_softmax(-1).gather(2, labels.unsqueeze(-1)).sum((1, 2))
    found = crf.log_prob(emissions, labels, torch.tensor([3, 3]))
    torch.testing.assert_close(found.float(), own)
    assert not any(p.requires_grad for p in crf.parameters())


# The model and its training


def test_model_ignores_padding_and_the_other_utterances() -> None:
    torch.manual_seed(1)
    model = UnderstandingModel(make_vocabulary(_make_sentences()), **_SHAPE.model_dump()).eval()
    lengths = torch.tensor([3, 7, 1])
    words = torch.randint(len(model.vocabulary.words), (3, 9))
    characters = torch.randint(1, 12, (3, 9, 6))
    characters[:, :, 4:] = 0
    with torch.no_grad():
        emissions, intents = model(words, characters, lengths)
        for row, n in enumerate(lengths.tolist()):
            chosen = slice(row, row + 1)
            alone = model(words[chosen, :n], characters[chosen, :n, :4], lengths[chosen])
            torch.testing.assert_close(emissions[row, :n], alone[0][0], atol=1e-5, rtol=0)
            torch.testing.assert_close(intents[row], alone[1][0], atol=1e-5, rtol=0)


def test_training_learns_its_sentences(best: Path) -> None:
    sentences = _make_sentences()
    parses = predict(load_understanding(best), [sentence.words for sentence in sentences])
    scores = score_parses(parses, sentences)
    assert scores.slot_f1 == scores.intent_accuracy == scores.sentence_accuracy == 1.0


def test_noisy_training_learns_its_sentences(tmp_path: Path) -> None:
    augment = UnderstandingAugment(noise=0.1, swap=0.2)
    best = _fit(tmp_path, n_epochs=30, augment=augment)
    sentences = _make_sentences()
    scores = score_parses(
        predict(load_understanding(best), [s.words for s in sentences]), sentences
    )
    assert scores.sentence_accuracy > 0.9


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_consistency_counts_where_readings_differ(tmp_path: Path, dropout: float) -> None:
    weights = [
        load_understanding(
            _fit(
                tmp_path / f"{consistency}",
                n_epochs=1,
                model=_SHAPE.model_copy(update={"dropout": dropout}),
                augment=UnderstandingAugment(word_dropout=0.0, rare_dropout=0.0, swap=0.0),
                consistency=consistency,
            )
        ).state_dict()
        for consistency in (0.5, 50.0)
    ]
    equal = all(
        torch.allclose(weights[0][name], weights[1][name], atol=1e-2) for name in weights[0]
    )
    assert equal == (dropout == 0.0)


def test_training_keeps_the_best_pass(tmp_path: Path) -> None:
    _fit(tmp_path, n_epochs=6)
    rows = [json.loads(row) for row in (tmp_path / "dev.jsonl").read_text().splitlines()]
    errors = [1 - (row["slot_f1"] + row["sentence"]) / 2 for row in rows]
    kept = load_checkpoint(tmp_path / "best.pt").progress
    assert len(rows) == 6
    assert kept.best_cer == pytest.approx(min(errors), abs=1e-3)
    assert errors[kept.epoch - 1] == pytest.approx(min(errors), abs=1e-3)


def test_labels_unseen_in_training_stay_in_the_denominator(best: Path, tmp_path: Path) -> None:
    strange = [
        LabelledSentence(("zzz", "42"), ("B-never", "I-never"), "nothing"),
        _sentence("light in the hall/B-room", "light"),
    ]
    scores = score_parses(predict(load_understanding(best), [s.words for s in strange]), strange)
    assert (scores.n_sentences, scores.n_slots) == (2, 2)
    assert (scores.n_right_intents, scores.n_right_sentences, scores.n_right_slots) == (1, 1, 1)
    assert _fit(tmp_path, n_epochs=1, dev=strange).exists()


def test_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    augment = UnderstandingAugment(noise=0.2)
    _fit(tmp_path / "whole", augment=augment)
    n_steps = load_checkpoint(tmp_path / "whole" / "last.pt").progress.step
    for stop in (2, n_steps // 3, n_steps // 3 + 2):  # inside a pass, and where one begins
        _interrupt(tmp_path / "parts", at_step=stop, augment=augment, monkeypatch=monkeypatch)
    _fit(tmp_path / "parts", augment=augment)
    for name in ("last.pt", "best.pt"):
        one, other = (load_checkpoint(tmp_path / part / name) for part in ("whole", "parts"))
        assert one.progress == other.progress
        assert one.model is not None
        assert other.model is not None
        for ours, theirs in ((one.model, other.model), (one.averaged, other.averaged)):
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    lines = [(tmp_path / part / "dev.jsonl").read_text() for part in ("whole", "parts")]
    assert lines[0] == lines[1]


def _interrupt(
    directory: Path,
    *,
    at_step: int,
    augment: UnderstandingAugment,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Train until a step is about to be made; a checkpoint was written after the one before."""
    make_step = training_module._Run._step

    def stop(run: training_module._Run, *arguments: Any, **settings: Any) -> float:
        if run.weights.progress.step == at_step:
            raise KeyboardInterrupt
        return make_step(run, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(training_module._Run, "_step", stop)
        with pytest.raises(KeyboardInterrupt):
            _fit(directory, augment=augment, checkpoint_every_s=0.0)


def test_run_with_other_settings_or_data_is_refused(tmp_path: Path) -> None:
    _fit(tmp_path, n_epochs=1)
    with pytest.raises(TrainingError, match=r"holds a run with .*'n_epochs': 1.*delete it"):
        _fit(tmp_path, n_epochs=2)
    with pytest.raises(TrainingError, match=r"data_checksum"):
        _fit(tmp_path, n_epochs=1, dev=_make_sentences()[1:])


def test_no_sentences_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="0 sentences to train on and 29 to choose by"):
        fit([], _make_sentences(), directory=tmp_path)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(settings={}, tokens=[], phones=[], averaged={}, progress=Progress())
    save_checkpoint(checkpoint, tmp_path / "best.pt")
    with pytest.raises(TrainingError, match=r"best\.pt is no checkpoint of an understanding"):
        load_understanding(tmp_path / "best.pt")


def test_scores_count_slots_and_sentences() -> None:
    references = [
        _sentence("a/B-x b/I-x c/B-y", "one"),
        _sentence("a/B-x b", "two"),
        _sentence("a b", "one#two"),
    ]
    found: list[tuple[str, Sequence[str]]] = [
        ("one", ("B-x", "O", "B-y")),
        ("one", ("B-x", "O")),
        ("one#two", ("O", "O")),
    ]
    parses = [
        Parse(intent, 1.0, tuple(labels), (1.0,) * len(labels), 0.0) for intent, labels in found
    ]
    scores = score_parses(parses, references)
    assert scores == UnderstandingScores(
        n_sentences=3,
        n_right_intents=2,
        n_right_sentences=1,
        n_slots=3,
        n_found_slots=3,
        n_right_slots=2,
    )
    assert scores.slot_f1 == pytest.approx(2 / 3)
    assert (scores.intent_accuracy, scores.sentence_accuracy) == (2 / 3, 1 / 3)


# The graph


def test_graph_parses_as_torch_does(best: Path, tmp_path: Path) -> None:
    export_understanding(best, tmp_path / "float.onnx", int8=False)
    utterances = [s.words for s in _make_sentences()] + [("x",), ("Ünknown", "99", ""), ("a",) * 40]
    expected = predict(load_understanding(best), utterances)
    found = Understander(tmp_path / "float.onnx").understand_many(utterances)
    for one, other in zip(found, expected, strict=True):
        _same(one, other)


def test_parses_do_not_depend_on_the_other_utterances(graph: Path) -> None:
    understander = Understander(graph)
    utterances = [s.words for s in _make_sentences()] + [("a" * 90, "b"), (), ("large",) * 50]
    together = understander.understand_many(utterances)
    for utterance, parse in zip(utterances, together, strict=True):
        _same(parse, understander.understand(utterance))
    for one, other in zip(
        together[::-1], understander.understand_many(utterances[::-1]), strict=True
    ):
        _same(one, other)


def test_parse_has_a_label_and_a_confidence_a_word(graph: Path) -> None:
    understander = Understander(graph)
    parse = understander.understand("give me a 12 ounce iced mocha".split())
    assert parse.intent == "order"
    assert spans(parse.labels) == [("size", 3, 5), ("drink", 5, 7)]
    assert len(parse.label_confidences) == 7
    assert all(0.0 <= c <= 1.0 for c in (parse.intent_confidence, *parse.label_confidences))
    assert parse.score <= np.log(parse.intent_confidence) + 1e-9
    assert parse.score <= np.log(min(parse.label_confidences)) + 1e-6
    assert understander.understand(["light", "99"]).intent in understander.vocabulary.intents


def test_other_digits_of_the_same_shape_change_no_label(graph: Path) -> None:
    labels = {
        Understander(graph).understand(f"give me a {n} ounce tea".split()).labels
        for n in ("12", "16", "11")
    }
    assert labels == {("O", "O", "O", "B-size", "I-size", "B-drink")}


def test_empty_utterance_means_nothing(graph: Path) -> None:
    understander = Understander(graph)
    assert understander.understand(()) == EMPTY_PARSE == Parse("", 0.0, (), (), 0.0)
    assert understander.understand_many([]) == []
    assert understander.understand_many([(), ("tea",), ()])[2] == EMPTY_PARSE


def test_sets_with_one_intent_and_no_slots_can_be_learned(tmp_path: Path) -> None:
    sentences = [_sentence("yes please", "confirm"), _sentence("yes", "confirm")]
    shape = UnderstandingShape(hidden_size=4, word_size=4, character_size=4, n_filters=4)
    best = fit(sentences, sentences, directory=tmp_path, model=shape)
    export_understanding(best, tmp_path / "understanding.onnx")
    parse = Understander(tmp_path / "understanding.onnx").understand(["no", "thanks"])
    assert (parse.intent, parse.labels) == ("confirm", ("O", "O"))
    assert parse.label_confidences == (1.0, 1.0)
    assert parse.score == pytest.approx(0.0)


def test_graph_that_differs_is_not_written(
    best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = export_module._write_graph

    def write_another(model: UnderstandingModel, path: Path) -> None:
        model.label_head.bias.data[0] += 1.0
        write(model, path)
        model.label_head.bias.data[0] -= 1.0

    monkeypatch.setattr(export_module, "_write_graph", write_another)
    (tmp_path / "understanding.onnx").write_bytes(b"the old one")
    with pytest.raises(ExportError, match="nothing was written"):
        export_understanding(best, tmp_path / "understanding.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["understanding.onnx"]
    assert (tmp_path / "understanding.onnx").read_bytes() == b"the old one"


@pytest.mark.parametrize("content", [None, b"", b"no graph"])
def test_file_that_is_no_graph_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "understanding.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=r"cannot load .*understanding\.onnx"):
        Understander(path)


def test_graph_of_another_model_is_refused(tmp_path: Path) -> None:
    export_graph(make_model(), tmp_path / "offline.onnx")
    with pytest.raises(BundleError, match=r"offline\.onnx is no understanding model: .*lacks"):
        Understander(tmp_path / "offline.onnx")


@pytest.mark.parametrize(
    "change",
    [
        {"labels": "[]"},
        {"labels": "7"},
        {"intents": "no JSON"},
        {"words": '["a", "a"]'},
        {"transitions": "[[0]]"},
        {"first_transitions": "{}"},
    ],
)
def test_metadata_that_makes_no_sense_is_refused(
    graph: Path, tmp_path: Path, change: dict[str, str]
) -> None:
    model = onnx.load(str(graph))
    kept = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**kept, **change})
    onnx.save(model, str(tmp_path / "understanding.onnx"))
    with pytest.raises(BundleError, match="is no understanding model"):
        Understander(tmp_path / "understanding.onnx")


def test_metadata_survives() -> None:
    vocabulary = Vocabulary(("a", "ü"), ("a", "\u2028"), _LABELS, ("i#j", "k"))
    _, costs = _draw_costs(3)
    read, transitions = from_metadata(to_metadata(vocabulary, costs))
    assert read == vocabulary
    np.testing.assert_allclose(transitions.between, costs.between, atol=1e-5)
    np.testing.assert_allclose(transitions.first, costs.first, atol=1e-5)


# Data


def _write_folder(folder: Path, words: str, labels: str, intents: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("seq.in", words), ("seq.out", labels), ("label", intents)):
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return folder


def test_folder_is_read(tmp_path: Path) -> None:
    folder = _write_folder(
        tmp_path, "a  b \r\nc\u2028\n\n", "O B-x \r\nI-y\n\n", "one#two\r\nthree\n\n"
    )
    assert read_sentences(folder) == [
        LabelledSentence(("a", "b"), ("O", "B-x"), "one#two"),
        LabelledSentence(("c\u2028",), ("B-y",), "three"),
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("a b\nc d\n", "O O\nO\n", "i\ni\n"), r"line 2 of seq\.in.*2 words and 1 labels"),
        (("a\n", "O\nO\n", "i\n"), r"seq\.in 1, seq\.out 2, label 1; expected as many"),
        (("a\n", "X-a\n", "i\n"), r"line 1.*'X-a'; expected O, B-name or I-name"),
        (("a\n", "B-\n", "i\n"), r"line 1.*'B-'"),
        (("a\nb\n", "O\nO\n", "\ni\n"), r"line 1.*no intent"),
        (("\na\n", "\nO\n", "i\ni\n"), r"line 1.*0 words"),
        (("", "", ""), "has no sentences"),
    ],
)
def test_wrong_folder_is_refused(tmp_path: Path, files: tuple[str, str, str], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        read_sentences(_write_folder(tmp_path, *files))


def test_folder_without_its_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "seq.in").write_text("a\n")
    with pytest.raises(TrainingError, match=r"lacks seq\.out, label.*folder of one part"):
        read_sentences(tmp_path)
    with pytest.raises(TrainingError, match="has no train, valid or test"):
        read_parts(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    folder = _write_folder(tmp_path, "a\n", "O\n", "i\n")
    (folder / "seq.in").write_bytes(b"caf\xe9\n")
    with pytest.raises(TrainingError, match=r"seq\.in.*UTF-8"):
        read_sentences(folder)


def test_json_lines_are_read(tmp_path: Path) -> None:
    slots = [{"name": "y", "begin": 2, "end": 3}, {"name": "x", "begin": 0, "end": 2}]
    lines = [
        {"text": "a b c", "slots": slots, "intent": "i", "id": 7},
        {"text": "d", "intent": "j"},
    ]
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_sentences(path) == [
        LabelledSentence(("a", "b", "c"), ("B-x", "I-x", "B-y"), "i"),
        LabelledSentence(("d",), ("O",), "j"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no JSON", r"line 2: line: Invalid JSON"),
        ('{"text": "a"}', r"line 2: intent: Field required"),
        ('{"text": 7, "intent": "i"}', r"line 2: text: .*not 7; expected"),
        ('{"text": " ", "intent": "i"}', r"line 2: 0 words"),
        ('{"text": "a", "intent": ""}', r"line 2: no intent"),
        (
            '{"text": "a", "intent": "i", "slots": [{"name": "x", "begin": 0, "end": 2}]}',
            r"slot x from word 0 to 2 of 1; expected begin < end",
        ),
        (
            '{"text": "a", "intent": "i", "slots": [{"name": "x", "begin": "0", "end": 1}]}',
            r"slots\.0\.begin: .*not '0'",
        ),
        (
            '{"text": "a b", "intent": "i", "slots": [{"name": "x", "begin": 0, "end": 2}, '
            '{"name": "y", "begin": 1, "end": 2}]}',
            r"slot y from word 1 to 2 overlaps another",
        ),
    ],
)
def test_wrong_json_line_is_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "a", "intent": "i"}\n' + line + "\n")
    with pytest.raises(TrainingError, match=message):
        read_sentences(path)


def test_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"cannot read .*some\.jsonl"):
        read_sentences(tmp_path / "some.jsonl")


def test_parts_are_found_in_either_layout(tmp_path: Path) -> None:
    _write_folder(tmp_path / "train", "a\n", "O\n", "i\n")
    (tmp_path / "dev.jsonl").write_text('{"text": "b", "intent": "j"}\n')
    parts = read_parts(tmp_path)
    assert [s.words for s in (*parts.train, *parts.dev, *parts.test)] == [("a",), ("b",)]


def test_recipe_trains_a_model(tmp_path: Path) -> None:
    _write_folder(tmp_path / "data" / "train", "a 1\nb\n", "O B-x\nO\n", "i\nj\n")
    _write_folder(tmp_path / "data" / "valid", "c\n", "B-new\n", "new\n")
    recipe = Path(training_module.__file__).parent / "recipes" / "snips.toml"
    overrides = [
        f"data.folder={tmp_path / 'data'}",
        f"run.directory={tmp_path / 'run'}",
        "run.precision=float32",
        "optimiser.n_epochs=1",
        "model.hidden_size=8",
    ]
    settings = validate(UnderstandingSettings, read_tree(recipe, overrides), recipe)
    assert train_understanding(settings) == tmp_path / "run" / "best.pt"
    assert (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(
    "data", [{}, {"train": ["a"]}, {"folder": "a", "train": ["b"], "dev": ["c"]}]
)
def test_recipe_without_clear_data_is_refused(data: dict[str, Any]) -> None:
    tree = {"task": "understanding", "data": data}
    with pytest.raises(TrainingError, match="name either folder, or both train and dev"):
        validate(UnderstandingSettings, tree, Path("recipe.toml"))


# Variations


def test_swapped_values_are_values_of_the_slot() -> None:
    sentences = _make_sentences()
    values = collect_values(sentences)
    assert values["size"] == sorted(tuple(size.split()) for size in _SIZES)
    draw = random.Random(1)
    for sentence in sentences * 5:
        swapped = swap_values(sentence, values, probability=0.7, draw=draw)
        before, after = spans(sentence.labels), spans(swapped.labels)
        assert [name for name, _, _ in after] == [name for name, _, _ in before]
        assert all(swapped.words[begin:end] in values[name] for name, begin, end in after)
        outside = [
            [w for w, label in zip(s.words, s.labels, strict=True) if label == "O"]
            for s in (sentence, swapped)
        ]
        assert outside[0] == outside[1]
        assert swap_values(sentence, values, probability=0.0, draw=draw) == sentence


def test_labels_follow_misheard_words() -> None:
    draw = random.Random(2)
    confusions = {word: (word.upper(),) for s in _make_sentences() for word in s.words}
    changed = 0
    for sentence in _make_sentences() * 20:
        heard = mishear(sentence, confusions, probability=0.3, vocabulary=["um"], draw=draw)
        assert repair_labels(heard.labels) == heard.labels
        names = dict(zip(sentence.words, (label[2:] for label in sentence.labels), strict=True))
        for word, label in zip(heard.words, heard.labels, strict=True):
            assert word == "um" or label[2:] == names[word.lower()]
        changed += heard.words != sentence.words
    assert changed > 200


def test_sentence_of_which_nothing_is_heard_stays() -> None:
    draw = random.Random(3)
    sentence = _sentence("tea/B-drink", "order")
    heard = {
        mishear(sentence, {}, probability=1.0, vocabulary=["um"], draw=draw) for _ in range(50)
    }
    assert sentence in heard
    assert LabelledSentence(("um",), ("B-drink",), "order") in heard


def test_confusions_sound_alike() -> None:
    dictionary: Dictionary = {
        "bat": (("B", "AE", "T"),),
        "cat": (("K", "AE", "T"),),
        "at": (("AE", "T"),),
        "bats": (("B", "AE", "T", "S"),),
        "banana": (("B", "AH", "N", "AE", "N", "AH"),),
    }
    found = find_confusions(["bat", "banana", "zzz"], dictionary)
    assert set(found) == {"bat"}
    assert set(found["bat"]) == {"at", "bats", "cat"}
    assert "there" in find_confusions(["their"], load_dictionary())["their"]


def test_confusions_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "confusions.json"
    path.write_text('{"a": ["b", "c"], "d": []}')
    assert read_confusions(path) == {"a": ("b", "c")}
    for text in ("[]", '{"a": "b"}', '{"a": [""]}', "{"):
        path.write_text(text)
        with pytest.raises(TrainingError, match=r"confusions"):
            read_confusions(path)
