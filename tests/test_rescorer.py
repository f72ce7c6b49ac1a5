"""Second-pass rescoring: a list is scored as its hypotheses alone, a graph says what torch says."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny import PIECES, save_language_model

from export import rescorer as export_module
from export.rescorer import RescorerStep, export_rescorer
from service.errors import BundleError, ExportError, InputError, TrainingError
from service.rescorer import BOUNDARY_ID, Rescorer, build_trie
from training.rnn_lm import Cell, LanguageModel


def _make_hypotheses(n: int = 60) -> list[list[str]]:
    """Changes of one sentence, as a search gives them."""
    draw = random.Random(1)
    words = ["bad", "gab", "a", "cab", "edge", "fig", "bag", "hi'd"]
    sentence = draw.choices(words, k=9)
    hypotheses = [
        [draw.choice(words) if draw.random() < 0.2 else w for w in sentence] for _ in range(n)
    ]
    return [[], *hypotheses, sentence[:4], hypotheses[3]]


def _score_by_torch(model: LanguageModel, words: list[str]) -> float:
    pieces = [piece for word in words for piece in PIECES.encode(word)] + [BOUNDARY_ID]
    with torch.inference_mode():
        log_probs = model(torch.tensor([[BOUNDARY_ID, *pieces[:-1]]]))[0].log_softmax(-1)
    return sum(float(log_probs[i, piece]) for i, piece in enumerate(pieces))


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rescorer")
    save_language_model(folder / "best.pt")
    export_rescorer(folder / "best.pt", folder / "rescorer.onnx")
    return folder / "rescorer.onnx"


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("int8", [False, True])
def test_graph_says_what_torch_says(tmp_path: Path, cell: Cell, int8: bool) -> None:
    model = save_language_model(tmp_path / "best.pt", cell=cell)
    export_rescorer(tmp_path / "best.pt", tmp_path / "rescorer.onnx", int8=int8)
    hypotheses = _make_hypotheses()

    scores = Rescorer(tmp_path / "rescorer.onnx").score(hypotheses)

    expected = [_score_by_torch(model, words) for words in hypotheses]
    np.testing.assert_allclose(scores, expected, rtol=0.02 if int8 else 1e-5)


def test_a_list_is_scored_as_its_hypotheses_alone(graph: Path) -> None:
    rescorer, hypotheses = Rescorer(graph), _make_hypotheses()

    together = rescorer.score(hypotheses)

    alone = [rescorer.score([words])[0] for words in hypotheses]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert together[4] == together[-1]  # the same hypothesis twice


def test_probabilities_sum_to_one(graph: Path) -> None:
    """The empty sentence and all first pieces: nothing else can begin."""
    rescorer = Rescorer(graph)
    n_pieces = len(PIECES.names)
    begun = [[i, BOUNDARY_ID] for i in range(1, n_pieces)]
    levels, _ = build_trie([[BOUNDARY_ID], *begun])

    log_probs = rescorer._run(levels[0], rescorer._start)[0]

    assert len(log_probs) == n_pieces
    assert np.exp(log_probs).sum() == pytest.approx(1, abs=1e-5)


def test_empty_inputs_have_their_meaning(graph: Path) -> None:
    rescorer = Rescorer(graph)

    assert rescorer.score([]).shape == (0,)
    (end,) = rescorer.score([[]])
    assert end == rescorer.score([["bad"], []])[1]
    assert np.isfinite(end)
    assert end < 0


def test_unknown_letters_are_scored_and_non_words_refused(graph: Path) -> None:
    rescorer = Rescorer(graph)

    assert np.isfinite(rescorer.score([["zé", "bad"]])).all()
    for strange in ("", "two words"):
        with pytest.raises(InputError, match="is no word"):
            rescorer.score([["bad", strange]])


def test_trie_holds_every_beginning_once() -> None:
    draw = random.Random(1)
    sentences = [
        (*(draw.choice((1, 2)) for _ in range(draw.randint(0, 6))), BOUNDARY_ID) for _ in range(50)
    ]

    levels, ends = build_trie(sentences)

    beginnings = {s[: i + 1] for s in sentences for i in range(len(s))}
    assert sum(len(level.wanted) for level in levels) == len(beginnings)
    for sentence, (depth, edge) in zip(sentences, ends, strict=True):
        assert _read_back(levels, depth, edge) == sentence
    for above, level in itertools.pairwise(levels):
        assert level.tokens.tolist() == above.wanted[level.edges].tolist()
        assert level.parents.tolist() == above.rows[level.edges].tolist()


def _read_back(levels: list, depth: int, edge: int) -> tuple[int, ...]:  # type: ignore[type-arg]
    pieces: tuple[int, ...] = ()
    for level in reversed(levels[: depth + 1]):
        pieces = (int(level.wanted[edge]), *pieces)
        edge = int(level.edges[level.rows[edge]])
    return pieces


def test_int8_graph_is_smaller_and_holds_no_large_float(graph: Path) -> None:
    large = [
        tensor.name
        for tensor in onnx.load(str(graph)).graph.initializer
        if numpy_helper.to_array(tensor).ndim == 2
        and numpy_helper.to_array(tensor).shape[1] > 1
        and tensor.data_type == onnx.TensorProto.FLOAT
    ]

    assert large == []


def test_export_writes_nothing_where_the_graph_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_language_model(tmp_path / "best.pt")
    forward = RescorerStep.forward
    monkeypatch.setattr(
        RescorerStep,
        "forward",
        lambda self, *inputs: (forward(self, *inputs)[0] * 1.1, *forward(self, *inputs)[1:]),
    )

    with pytest.raises(ExportError, match="nothing was written"):
        export_module.export_rescorer(tmp_path / "best.pt", tmp_path / "rescorer.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_what_is_no_rescorer_is_refused(tmp_path: Path, graph: Path) -> None:
    model = onnx.load(str(graph))
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "bare.onnx"))

    with pytest.raises(BundleError, match="lacks"):
        Rescorer(tmp_path / "bare.onnx")
    with pytest.raises(BundleError, match="cannot load"):
        Rescorer(tmp_path / "none.onnx")
    with pytest.raises(TrainingError, match="no checkpoint"):
        export_rescorer(tmp_path / "none.pt", tmp_path / "rescorer.onnx")
