"""What the token head writes: characters, or pieces of words chosen on the transcripts."""

from __future__ import annotations

import io
from collections.abc import Iterable

import sentencepiece

from service.errors import TrainingError
from service.text import BLANK_TOKEN, CHARACTERS, SPACE

_LETTERS = tuple(c for c in CHARACTERS if c not in (BLANK_TOKEN, SPACE))


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
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=n_pieces + 1,
            character_coverage=1.0,
            required_chars="".join(_LETTERS),
            normalization_rule_name="identity",
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TrainingError(
            f"the transcripts cannot be cut into {n_pieces} pieces; set data.n_pieces to another "
            f"number, or to 0 for characters: {error}"
        ) from error
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return (BLANK_TOKEN, *(trained.id_to_piece(i) for i in range(1, trained.get_piece_size())))
