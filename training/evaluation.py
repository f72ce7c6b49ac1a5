"""Greedy error rates of a model in training, on stored features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from service.scoring import ErrorCounts, count_errors, pool
from service.text import collapse, decode
from training.data import Batch
from training.distributed import World
from training.model import AcousticModel, Chunking


@torch.no_grad()
def greedy_transcripts(
    model: AcousticModel,
    batches: Iterable[Batch],
    *,
    tokens: Sequence[str],
    world: World,
    chunking: Chunking | None = None,
) -> dict[str, str]:
    """Best-path transcripts by utterance id; each process does its share of the batches.

    Args:
        model: what is evaluated.
        batches: the same in every process.
        tokens: token list, blank first.
        world: the processes.
        chunking: how the model reads; None is with full context.
    """
    model.eval()
    transcripts: dict[str, str] = {}
    for number, batch in enumerate(batches):
        if number % world.size != world.rank:
            continue
        logits, _, lengths = model(
            batch.features.to(world.device), batch.feature_lengths.to(world.device), chunking
        )
        paths = logits.argmax(-1).cpu()
        for utterance_id, path, length in zip(
            batch.utterance_ids, paths, lengths.tolist(), strict=True
        ):
            transcripts[utterance_id] = decode(collapse(path[:length].tolist()), tokens)
    gathered: dict[str, str] = {}
    for share in world.gather(transcripts):
        gathered.update(share)
    return gathered


def errors_by_corpus(
    transcripts: Mapping[str, str], references: Mapping[str, str], corpora: Mapping[str, str]
) -> dict[str, ErrorCounts]:
    """Errors of each corpus, and of all under the empty name; all arguments by utterance id."""
    counts: dict[str, ErrorCounts] = {}
    for utterance_id, transcript in transcripts.items():
        corpus = corpora[utterance_id]
        error = count_errors([references[utterance_id]], [transcript])
        counts[corpus] = counts.get(corpus, ErrorCounts()) + error
    return {**counts, "": pool(counts.values())}
