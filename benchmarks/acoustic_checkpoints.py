"""Error rates of training checkpoints under a bundle's search: what chooses a recipe.

For every checkpoint and condition: greedy word error rate of the token head, phone error rate of
the phone head against the usual pronunciations, and the word error rate of the bundle's search over
phones with weights swept and cross-fitted over two halves of the speakers. With the transcripts of
the training set, also the phone head's loss (CTC-CRF under their phone trigram, nats a phone, usual
pronunciations): chance moves it far less than error rates.

python benchmarks/acoustic_checkpoints.py runs/a/last.pt runs/b/last.pt --dev dev.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from conditions import CONDITIONS
from torch import Tensor
from tqdm import tqdm

from service.audio import load_audio
from service.bundle import load_bundle
from service.decoding.beam import BeamDecoder
from service.decoding.ngram import load_ngram
from service.features import FeatureSettings, log_mel
from service.g2p import Pronouncer
from service.manifest import Utterance, read_manifest
from service.recogniser import make_beam_decoder
from service.scoring import ErrorCounts, count_errors, pool
from service.text import collapse, decode, normalise
from service.tuning import Item, cross_fit, find_lowest
from training.checkpoint import load_checkpoint, load_model
from training.crf import estimate_trigram, log_partition, score_labels
from training.lexicon import PHONES, Dictionary, load_dictionary, make_lexicon, pronounce
from training.loss import ctc_nll
from training.ngram import NGRAM_NAME

FloatArray = npt.NDArray[np.float32]

LEAST_PRIOR = 1e-6


@dataclass(frozen=True)
class Utterances:
    """Development speech under one condition."""

    rows: Sequence[Utterance]
    features: Sequence[FloatArray]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/en-small"))
    parser.add_argument("--lm", type=Path, help="folder of `voxgate lm build`, not the bundle's")
    parser.add_argument("--conditions", nargs="+", choices=sorted(CONDITIONS), default=["clean"])
    parser.add_argument("--corpora", nargs="*", default=[], help="all where none is named")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5, 0.7, 0.9, 1.1])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 1.5, 3.0])
    parser.add_argument("--beam-width", type=int)
    parser.add_argument("--every", type=int, default=1, help="take every n-th utterance")
    parser.add_argument(
        "--prior-scale", type=float, default=0.0, help="of the phones' log priors, subtracted"
    )
    parser.add_argument("--transcripts", type=Path, help="manifest of the training set")
    parser.add_argument("--raw", action="store_true", help="the weights, not their average")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bundle = load_bundle(options.bundle)
    assert bundle.ngram is not None
    assert bundle.g2p_graph is not None
    lm = load_ngram(bundle.ngram)
    lexicon: Dictionary = bundle.read_lexicon()
    if options.lm:
        lm = load_ngram(options.lm / NGRAM_NAME)
        known = {**load_dictionary(), **lexicon}
        lexicon = make_lexicon(lm.vocabulary, known, Pronouncer(bundle.g2p_graph).pronounce)
    wanted = bundle.config.decoding.of("phones")
    if options.beam_width:
        wanted = wanted.model_copy(update={"beam_width": options.beam_width})
    decoders = {}
    for alpha, beta in product(options.alphas, options.betas):
        settings = wanted.model_copy(update={"alpha": alpha, "beta": beta})
        decoders[alpha, beta] = make_beam_decoder(bundle, lm, "phones", settings, lexicon=lexicon)
    rows = [
        row
        for row in read_manifest(options.dev)
        if not options.corpora or row.corpus in options.corpora
    ][:: options.every]
    speech = {
        condition: prepare(rows, CONDITIONS[condition], bundle.config.features)
        for condition in options.conditions
    }
    trigram = None if options.transcripts is None else phone_trigram(options.transcripts)
    for path in options.checkpoints:
        for condition, utterances in speech.items():
            print(f"{path}, {condition}")
            report(
                path,
                utterances,
                decoders,
                trigram,
                prior_scale=options.prior_scale,
                raw=options.raw,
            )


def report(
    path: Path,
    utterances: Utterances,
    decoders: dict[tuple[float, float], BeamDecoder],
    trigram: Tensor | None,
    *,
    prior_scale: float = 0.0,
    raw: bool = False,
) -> None:
    """Print a table of one checkpoint: a line a corpus."""
    checkpoint = load_checkpoint(path)
    if raw and checkpoint.model is not None:
        checkpoint = replace(checkpoint, averaged=checkpoint.model)
    model = load_model(checkpoint)
    items: list[Item] = []
    greedy: list[ErrorCounts] = []
    phone_errors: list[ErrorCounts] = []
    nats = np.zeros(len(utterances.rows))
    dictionary = load_dictionary()
    heard: list[dict[str, FloatArray]] = []
    for features in utterances.features:
        with torch.inference_mode():
            tokens, phones, _ = model(
                torch.from_numpy(features)[None], torch.tensor([len(features)])
            )
        heard.append(
            {
                "characters": tokens[0].log_softmax(-1).numpy(),
                "phones": phones[0].log_softmax(-1).numpy(),
            }
        )
    prior = np.exp(np.concatenate([heads["phones"] for heads in heard])).mean(axis=0)
    for i, (row, heads) in enumerate(zip(utterances.rows, heard, strict=True)):
        scores = heads["phones"] - prior_scale * np.log(np.maximum(prior, LEAST_PRIOR))
        heads["phones"] = torch.from_numpy(scores).log_softmax(-1).numpy()
        reference = normalise(row.text or "")
        items.append(Item(row.speaker, row.corpus, reference, heads))  # type: ignore[arg-type]
        best = decode(collapse(heads["characters"].argmax(-1).tolist()), checkpoint.tokens)
        greedy.append(count_errors([reference], [best]))
        said = pronounce(reference, dictionary) or []
        if trigram is not None and said:
            nats[i] = phone_loss(heads["phones"], said, trigram)
        recognised = collapse(heads["phones"].argmax(-1).tolist())
        names = [" ".join(PHONES[i] for i in ids) for ids in (said, recognised)]
        phone_errors.append(count_errors(names[:1], names[1:]) if said else ErrorCounts())
    counts = {
        weights: [
            count_errors([item.reference], [decoder.decode(item.emissions["phones"])[0].text])
            for item in tqdm(items, f"alpha, beta {weights}", leave=False)
        ]
        for weights, decoder in decoders.items()
    }
    fitted = cross_fit(
        items, lambda half: find_lowest(counts, half), lambda weights, i: counts[weights][i]
    )
    shipped = find_lowest(counts, np.ones(len(items), np.bool_))
    print(f"  best alpha, beta: {shipped}; seen {checkpoint.progress.audio_s / 3600:.0f} hours")
    corpora = np.array([item.corpus for item in items])
    for corpus in [*sorted(set(corpora)), ""]:
        chosen = np.flatnonzero(corpora == corpus) if corpus else np.arange(len(items))
        n_phones = pool(phone_errors[i] for i in chosen).n_words
        loss = "" if trigram is None else f"  loss {nats[chosen].sum() / n_phones:.3f}"
        print(
            f"  {corpus or 'all':26} greedy {pool(greedy[i] for i in chosen).wer:6.1%}  "
            f"phones {pool(phone_errors[i] for i in chosen).wer:6.1%}  "
            f"beam {pool(fitted[i] for i in chosen).wer:6.1%}{loss}"
        )


def phone_trigram(manifest: Path) -> Tensor:
    """The trigram of the usual pronunciations of a manifest's transcripts."""
    dictionary = load_dictionary()
    said = (pronounce(normalise(row.text or ""), dictionary) for row in read_manifest(manifest))
    return estimate_trigram((phones for phones in said if phones), len(PHONES))


def phone_loss(log_probs: FloatArray, said: Sequence[int], trigram: Tensor) -> float:
    """Of CTC-CRF, nats."""
    scores, labels = torch.from_numpy(log_probs)[None], torch.tensor([said])
    lengths, label_lengths = torch.tensor([len(log_probs)]), torch.tensor([len(said)])
    ctc = ctc_nll(scores, lengths, labels, label_lengths)
    everything = log_partition(scores, lengths, trigram)
    return float(ctc + (everything - score_labels(trigram, labels, label_lengths)).sum())


def prepare(
    rows: Sequence[Utterance],
    condition: Callable[[list[FloatArray]], list[FloatArray]],
    settings: FeatureSettings,
) -> Utterances:
    """Features of the utterances under a condition."""
    waveforms = [load_audio(row.audio_path, target_rate=settings.sample_rate) for row in rows]
    return Utterances(rows, [log_mel(w, settings) for w in condition(waveforms)])


if __name__ == "__main__":
    main()
