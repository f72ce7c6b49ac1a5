"""Language model building with the real KenLM tools."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import shutil
import sys
from pathlib import Path

import kenlm
import pytest

from service.decoding.ngram import load_ngram
from service.errors import InputError, MissingExtraError, TrainingError
from training.ngram import NgramReport, build_ngram, read_words

_SENTENCES = [
    "The cat sat on the mat.",
    "the dog sat on the rug",
    "a cat and a dog met on the mat",
    "the rare word zyzzyva was seen once",
] * 3 + ["A singleton!"]
_LONG_TEXT = "\n".join(_SENTENCES * 50).encode()
_SPOKEN = (
    "the cat sat on the rug",
    "a dog met the zyzzyva",
    "unknown things were seen",
    "mat the on sat",
    "",
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(_SENTENCES) + "\n")
    return path


def _words(folder: Path) -> list[str]:
    return (folder / "words.txt").read_text(encoding="utf-8").split()


def _load(folder: Path) -> kenlm.Model:
    return kenlm.Model(str(folder / "lm.binary"))


def _unigrams(folder: Path) -> dict[str, float]:
    """Log10 probabilities by word."""
    model = load_ngram(folder / "lm.ngram")
    return dict(zip(model.words, model.unigram_log_probs().tolist(), strict=True))


def _load_arpa(folder: Path) -> kenlm.Model:
    arpa = folder / "lm.arpa"
    with gzip.open(folder / "lm.arpa.gz") as source, arpa.open("wb") as target:
        shutil.copyfileobj(source, target)
    return kenlm.Model(str(arpa))


# What is built


@pytest.mark.parametrize("order", [2, 3, 6])
def test_binary_scores_as_the_arpa_does(text: Path, tmp_path: Path, order: int) -> None:
    build_ngram([text], tmp_path / "lm", order=order, keep_arpa=True)
    arpa, binary = _load_arpa(tmp_path / "lm"), _load(tmp_path / "lm")
    assert binary.order == arpa.order == order
    for sentence in _SPOKEN:
        for ends in (True, False):
            expected = arpa.score(sentence, bos=ends, eos=ends)
            assert binary.score(sentence, bos=ends, eos=ends) == pytest.approx(expected, abs=1e-4)
    assert binary.score("the cat sat") > binary.score("sat cat the")


def test_build_reports_what_it_counted(text: Path, tmp_path: Path) -> None:
    report = build_ngram([text], tmp_path / "lm", order=2)
    assert report == NgramReport(
        n_lines=13,
        n_words=3 * (6 + 6 + 9 + 7) + 2,
        n_types=16 + 1,
        coverage=1.0,
        n_bytes=(tmp_path / "lm" / "lm.ngram").stat().st_size,
    )
    assert report.n_types == len(_words(tmp_path / "lm"))
    assert "13 sentences, 86 words; word list of 17 covers 100.00%" in str(report)


def test_build_leaves_the_model_and_its_words_only(text: Path, tmp_path: Path) -> None:
    build_ngram([text], tmp_path / "lm", order=2)
    assert {p.name for p in (tmp_path / "lm").iterdir()} == {"lm.ngram", "lm.binary", "words.txt"}
    build_ngram([text], tmp_path / "lm", order=3, keep_arpa=True)
    assert {p.name for p in (tmp_path / "lm").iterdir()} == {
        "lm.ngram",
        "lm.binary",
        "words.txt",
        "lm.arpa.gz",
    }
    assert _load(tmp_path / "lm").order == 3


def test_probabilities_after_a_context_sum_to_one(text: Path, tmp_path: Path) -> None:
    build_ngram([text], tmp_path / "lm", order=2)
    model = _load(tmp_path / "lm")
    words = [*_words(tmp_path / "lm"), "<unk>", "</s>"]
    state, after = kenlm.State(), kenlm.State()
    model.BeginSentenceWrite(state)
    total = math.fsum(10 ** model.BaseScore(state, word, after) for word in words)
    assert total == pytest.approx(1.0, abs=1e-3)


def test_text_is_normalised_and_packed_files_are_read(tmp_path: Path) -> None:
    sentences = "It's 2 o'clock, SAID the Café!\n...\n" * 3
    (tmp_path / "a.txt").write_text(sentences, encoding="utf-8")
    with gzip.open(tmp_path / "a.gz", "wt", encoding="utf-8") as packed:
        packed.write(sentences)
    with lzma.open(tmp_path / "a.xz", "wt", encoding="utf-8") as packed:
        packed.write(sentences)
    for name in ("a.txt", "a.gz", "a.xz"):
        report = build_ngram([tmp_path / name], tmp_path / name[2:], order=2)
        assert _words(tmp_path / name[2:]) == ["cafe", "it's", "o'clock", "said", "the", "two"]
        assert (report.n_lines, report.n_words) == (3, 18)


def test_several_texts_make_one_model(text: Path, tmp_path: Path) -> None:
    with gzip.open(tmp_path / "more.gz", "wt") as more:
        more.write("a second text\n" * 2)
    report = build_ngram([text, tmp_path / "more.gz"], tmp_path / "lm", order=2)
    assert report.n_lines == len(_SENTENCES) + 2
    assert {"second", "zyzzyva"} <= set(_words(tmp_path / "lm"))


def test_transcripts_count_as_often_as_asked_whoever_said_them(text: Path, tmp_path: Path) -> None:
    said = ["Café number two", "cafe number two", "a third line"]
    rows = [json.dumps({"audio_filepath": f"{i}.wav", "text": t}) for i, t in enumerate(said)]
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("\n".join([*rows, json.dumps({"audio_filepath": "untold.wav"})]))
    report = build_ngram(
        [text], tmp_path / "lm", order=2, transcripts=[manifest], transcripts_count=4
    )
    assert report.n_lines == len(_SENTENCES) + 2 * 4
    plain = build_ngram([text], tmp_path / "plain", order=2)
    assert report.n_words == plain.n_words + 6 * 4
    assert {"cafe", "third"} <= set(_words(tmp_path / "lm"))


# What makes it smaller


def test_pruning_drops_what_is_rare(text: Path, tmp_path: Path) -> None:
    with text.open("a") as more:
        more.writelines(f"the cat {'x' * (i % 20 + 1)} number {i}\n" for i in range(300))
    full = build_ngram([text], tmp_path / "full", order=3, keep_arpa=True)
    pruned = build_ngram([text], tmp_path / "pruned", order=3, prune=(0, 1), keep_arpa=True)
    assert pruned.n_bytes < full.n_bytes
    assert _words(tmp_path / "pruned") == _words(tmp_path / "full")
    counts = [_count_ngrams(tmp_path / name) for name in ("full", "pruned")]
    assert counts[0][0] == counts[1][0]
    assert counts[0][1] > counts[1][1]  # the last value holds for all higher orders
    assert counts[0][2] > counts[1][2]


def _count_ngrams(folder: Path) -> list[int]:
    """N-grams of each order, from the head of the ARPA."""
    head = gzip.decompress((folder / "lm.arpa.gz").read_bytes()).decode().partition("\\1-grams")[0]
    return [int(line.partition("=")[2]) for line in head.splitlines() if line.startswith("ngram ")]


@pytest.mark.parametrize("prune", [(1,), (3, 3)])
def test_every_listed_word_is_in_the_model(
    text: Path, tmp_path: Path, prune: tuple[int, ...]
) -> None:
    report = build_ngram([text], tmp_path / "lm", order=2, prune=prune)
    model = _load(tmp_path / "lm")
    words = _words(tmp_path / "lm")
    assert [word for word in words if word not in model] == []
    assert "singleton" not in words
    assert report.coverage < 1


def test_words_outside_the_vocabulary_are_unknown(text: Path, tmp_path: Path) -> None:
    report = build_ngram([text], tmp_path / "lm", order=2, n_words=3)
    words = _words(tmp_path / "lm")
    assert words == ["a", "on", "the"]  # 7, 9 and 18 times
    assert report.n_types == 3
    assert report.coverage == pytest.approx(34 / 86)
    model = _load(tmp_path / "lm")
    assert all(word in model for word in words)
    for word in ("cat", "zyzzyva"):
        assert word not in model
        ((_, _, is_unknown),) = model.full_scores(word, bos=False, eos=False)
        assert is_unknown
    assert model.score("the cat") == pytest.approx(model.score("the zyzzyva"))


def test_words_of_equal_count_are_chosen_alphabetically(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("delta alpha charlie bravo\n" * 3 + "alpha\n")
    build_ngram([tmp_path / "text.txt"], tmp_path / "lm", order=2, n_words=3)
    assert _words(tmp_path / "lm") == ["alpha", "bravo", "charlie"]


def test_rare_words_are_left_out_by_their_count(text: Path, tmp_path: Path) -> None:
    for min_count, expected in ((3, True), (4, False)):
        build_ngram([text], tmp_path / "lm", order=2, min_count=min_count)
        assert ("zyzzyva" in _words(tmp_path / "lm")) == expected
        assert ("zyzzyva" in _load(tmp_path / "lm")) == expected
        assert "singleton" not in _words(tmp_path / "lm")


def test_quantised_model_is_smaller_and_close(text: Path, tmp_path: Path) -> None:
    with text.open("a") as more:
        more.writelines(f"{'y' * (i % 30 + 1)} {'x' * (i % 17 + 1)} end\n" for i in range(900))
    full = build_ngram([text], tmp_path / "full", order=3)
    small = build_ngram([text], tmp_path / "small", order=3, quantise_bits=8)
    assert small.n_bytes < full.n_bytes
    models = [_load(tmp_path / name) for name in ("full", "small")]
    for sentence in _SPOKEN:
        scores = [model.score(sentence) for model in models]
        n_scored = len(sentence.split()) + 1
        assert scores[1] == pytest.approx(scores[0], abs=0.1 * n_scored)


# What is refused


@pytest.mark.parametrize("order", [-1, 0, 1, 7])
def test_order_out_of_range_is_refused(text: Path, tmp_path: Path, order: int) -> None:
    with pytest.raises(InputError, match=f"order is {order}, expected 2 to 6"):
        build_ngram([text], tmp_path / "lm", order=order)
    assert not (tmp_path / "lm").exists()


@pytest.mark.parametrize("n_words", [0, -3])
def test_word_list_of_no_words_is_refused(text: Path, tmp_path: Path, n_words: int) -> None:
    with pytest.raises(InputError, match=str(n_words)):
        build_ngram([text], tmp_path / "lm", order=2, n_words=n_words)


def test_count_that_no_word_reaches_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no word occurs 99 times; lower"):
        build_ngram([text], tmp_path / "lm", order=2, min_count=99)


@pytest.mark.parametrize("content", ["", "\n\n", "... !? :\n\n"])
def test_text_without_words_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(InputError, match=r"no words in .*empty\.txt.*a sentence a line"):
        build_ngram([tmp_path / "empty.txt"], tmp_path / "lm", order=2)


def _cut_short(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flip_first_block(data: bytes) -> bytes:
    return data[:10] + bytes([data[10] ^ 0xFF]) + data[11:]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.txt", b"\xff\xfe\x00\x81"),
        ("text.gz", b"this is not gzip"),
        ("text.gz", _cut_short(gzip.compress(_LONG_TEXT))),
        ("text.gz", _flip_first_block(gzip.compress(_LONG_TEXT))),
        ("text.xz", b"this is not xz"),
        ("text.xz", _cut_short(lzma.compress(_LONG_TEXT))),
    ],
    ids=["bytes", "no gzip", "gzip cut short", "gzip damaged", "no xz", "xz cut short"],
)
def test_text_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"cannot read the text .*{name}"):
        build_ngram([tmp_path / name], tmp_path / "lm", order=2)


def test_missing_text_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(InputError, match=f"cannot read the text {path}"):
            build_ngram([path], tmp_path / "lm", order=2)


def test_failed_build_leaves_the_old_model(text: Path, tmp_path: Path) -> None:
    build_ngram([text], tmp_path / "lm", order=2)
    before = {p.name: p.read_bytes() for p in (tmp_path / "lm").iterdir()}
    with pytest.raises(TrainingError, match=r"lmplz failed: .*[Pp]run"):
        build_ngram([text], tmp_path / "lm", order=3, prune=(0, 2, 1))
    with pytest.raises(InputError):
        build_ngram([tmp_path / "absent.txt"], tmp_path / "lm", order=3)
    assert {p.name: p.read_bytes() for p in (tmp_path / "lm").iterdir()} == before


def test_missing_tool_names_its_script(
    monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"lmplz is not.*training/install_lmplz\.sh"):
        build_ngram([text], tmp_path / "lm", order=2)
    assert not (tmp_path / "lm").exists()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "lmplz").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "lmplz").chmod(0o755)
    with pytest.raises(MissingExtraError, match=r"build_binary is not.*install_lmplz\.sh"):
        build_ngram([text], tmp_path / "lm", order=2)


def test_tool_on_the_path_is_used(
    monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.prefix) / "bin"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert build_ngram([text], tmp_path / "lm", order=2).n_lines == len(_SENTENCES)


def test_added_words_are_as_likely_as_the_rarest(text: Path, tmp_path: Path) -> None:
    build_ngram([text], tmp_path / "plain", order=3)
    report = build_ngram([text], tmp_path / "more", order=3, more_words={"zyx", "qaz", "the"})
    assert _words(tmp_path / "more") == sorted({*_words(tmp_path / "plain"), "zyx", "qaz"})
    assert report.n_types == len(_words(tmp_path / "more"))
    before, after = (_unigrams(tmp_path / name) for name in ("plain", "more"))
    changes = [after[word] - before[word] for word in before if word != "<s>"]
    assert max(changes) - min(changes) < 1e-4
    assert changes[0] < 0
    rarest = min(after[word] for word in _words(tmp_path / "plain"))
    assert after["zyx"] == after["qaz"] == pytest.approx(rarest, abs=1e-5)
    assert sum(10 ** after[word] for word in after if word != "<s>") == pytest.approx(1, abs=1e-3)
    assert "zyx" in _load(tmp_path / "more")
    assert "zyx" not in _load(tmp_path / "plain")


def test_words_to_add_are_normalised(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("Voxgate\nSEMI-COLON 7\n")
    assert read_words(tmp_path / "words.txt", dictionary=False) == {
        "voxgate",
        "semi",
        "colon",
        "seven",
    }
    assert read_words(None, dictionary=False) == set()
    known = read_words(None, dictionary=True)
    assert {"the", "computer", "don't"} <= known
    assert len(known) > 100_000
