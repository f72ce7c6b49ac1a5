"""What the token head writes: characters, or pieces of words chosen on the transcripts."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Literal

import sentencepiece

from service.errors import TrainingError
from service.text import BLANK_TOKEN, CHARACTERS, LETTERS


def choose_tokens(texts: Iterable[str], n_pieces: int) -> tuple[str, ...]:
    """The token list, blank first.

    Args:
        texts: normalised transcripts.
        n_pieces: pieces of words wanted, by byte-pair encoding (Sennrich et al. 2016); all letters
            are among them, so every word can be cut. 0 gives characters.

    Raises:
        TrainingError: the transcripts do not have as many pieces.
    """
    if not n_pieces:
        return CHARACTERS
    try:
        trained = learn_pieces(texts, kind="bpe", n_pieces=n_pieces)
    except RuntimeError as error:
        raise TrainingError(
            f"the transcripts cannot be cut into {n_pieces} pieces; set data.n_pieces to another "
            f"number, or to 0 for characters: {error}"
        ) from error
    return (BLANK_TOKEN, *(trained.id_to_piece(i) for i in range(1, trained.get_piece_size())))


def learn_pieces(
    rows: Iterable[str],
    *,
    kind: Literal["bpe", "unigram"],
    n_pieces: int,
    are_counts: bool = False,
    may_be_fewer: bool = False,
) -> sentencepiece.SentencePieceProcessor:
    """Learn pieces of words; id 0 is what has none, and all letters are pieces.

    Args:
        rows: normalised sentences, or words and how often they occur, separated by a tab.
        kind: of the model.
        n_pieces: pieces wanted.
        are_counts: whether the rows are words and counts.
        may_be_fewer: whether a text that has fewer pieces will do.

    Raises:
        RuntimeError: the text has fewer pieces.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(rows),
        model_writer=model,
        input_format="tsv" if are_counts else "text",
        model_type=kind,
        vocab_size=n_pieces + 1,
        hard_vocab_limit=not may_be_fewer,
        character_coverage=1.0,
        required_chars="".join(LETTERS),
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
