"""Language model building with the real KenLM tools."""

from __future__ import annotations

import gzip
import lzma
import math
import shutil
import sys
from pathlib import Path

import kenlm
import pytest

from service.errors import InputError, MissingExtraError, VoxgateError
from training.ngram import build_ngram

_SENTENCES = [
    "The cat sat on the mat.",
    "the dog sat on the rug",
    "a cat and a dog met on the mat",
    "the rare word zyzzyva was seen once",
] * 3


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(_SENTENCES) + "\n")
    return path


def _words(folder: Path) -> list[str]:
    return (folder / "words.txt").read_text().split()


def test_binary_scores_as_the_arpa_does(text: Path, tmp_path: Path) -> None:
    report = build_ngram([text], tmp_path / "lm", order=3, keep_arpa=True)
    arpa = tmp_path / "lm.arpa"
    with gzip.open(tmp_path / "lm" / "lm.arpa.gz") as source, arpa.open("wb") as target:
        shutil.copyfileobj(source, target)
    from_arpa, binary = kenlm.Model(str(arpa)), kenlm.Model(str(tmp_path / "lm" / "lm.binary"))
    for sentence in ("the cat sat on the rug", "a dog met the zyzzyva", "unknown things", ""):
        assert binary.score(sentence) == pytest.approx(from_arpa.score(sentence), abs=1e-4)
    assert binary.order == 3
    assert binary.score("the cat sat") > binary.score("sat cat the")
    assert report.n_lines == len(_SENTENCES)
    assert report.n_types == len(_words(tmp_path / "lm"))
    assert report.coverage == 1.0


def test_probabilities_after_a_context_sum_to_one(text: Path, tmp_path: Path) -> None:
    build_ngram([text], tmp_path / "lm", order=2)
    model = kenlm.Model(str(tmp_path / "lm" / "lm.binary"))
    words = [*_words(tmp_path / "lm"), "<unk>", "</s>"]
    state, after = kenlm.State(), kenlm.State()
    model.BeginSentenceWrite(state)
    total = math.fsum(10 ** model.BaseScore(state, word, after) for word in words)
    assert total == pytest.approx(1.0, abs=1e-3)


def test_text_is_normalised_and_packed_files_are_read(tmp_path: Path) -> None:
    sentences = "It's 2 o'clock, SAID the Cat!\n" * 3
    (tmp_path / "a.txt").write_text(sentences)
    with gzip.open(tmp_path / "a.gz", "wt") as packed:
        packed.write(sentences)
    with lzma.open(tmp_path / "a.xz", "wt") as packed:
        packed.write(sentences)
    for name in ("a.txt", "a.gz", "a.xz"):
        build_ngram([tmp_path / name], tmp_path / name[2:], order=2)
        assert _words(tmp_path / name[2:]) == ["cat", "it's", "o'clock", "said", "the", "two"]


def test_pruning_and_the_word_list_make_the_model_smaller(text: Path, tmp_path: Path) -> None:
    for i in range(300):
        with text.open("a") as more:
            more.write(f"the cat {'x' * (i % 20 + 1)} number {i}\n")
    full = build_ngram([text], tmp_path / "full", order=3)
    pruned = build_ngram([text], tmp_path / "pruned", order=3, prune=(0, 1))
    assert pruned.n_bytes < full.n_bytes
    small = build_ngram([text], tmp_path / "small", order=2, n_words=3)
    assert len(_words(tmp_path / "small")) == small.n_types == 3
    assert small.coverage < full.coverage
    model = kenlm.Model(str(tmp_path / "small" / "lm.binary"))
    assert "the" in model
    assert "zyzzyva" not in model
    build_ngram([text], tmp_path / "frequent", order=2, min_count=4)
    assert "zyzzyva" not in _words(tmp_path / "frequent")
    assert "zyzzyva" in _words(tmp_path / "full")


def test_quantised_model_is_close(text: Path, tmp_path: Path) -> None:
    build_ngram([text], tmp_path / "full", order=3)
    build_ngram([text], tmp_path / "small", order=3, quantise_bits=8)
    full, small = (kenlm.Model(str(tmp_path / n / "lm.binary")) for n in ("full", "small"))
    assert small.score("the cat sat") == pytest.approx(full.score("the cat sat"), abs=0.2)


@pytest.mark.parametrize("order", [0, 1, 7])
def test_order_out_of_range_is_refused(text: Path, tmp_path: Path, order: int) -> None:
    with pytest.raises(InputError, match="expected 2 to 6"):
        build_ngram([text], tmp_path / "lm", order=order)


def test_texts_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    empty, binary, broken = tmp_path / "empty", tmp_path / "binary", tmp_path / "broken.xz"
    empty.write_text("... 12:\n\n".replace("12", ""))
    binary.write_bytes(b"\xff\xfe\x00\x81")
    broken.write_bytes(b"this is not xz")
    for path in (empty, binary, broken, tmp_path / "missing"):
        with pytest.raises(VoxgateError, match=path.name):
            build_ngram([path], tmp_path / "lm", order=2)


def test_missing_tool_names_its_script(
    monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"install_lmplz\.sh"):
        build_ngram([text], tmp_path / "lm", order=2)
