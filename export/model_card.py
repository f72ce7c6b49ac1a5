"""The model card: what a bundle was trained on, how well it does on what, what it is not for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def write_model_card(*, name: str, language: str, provenance: Mapping[str, Any], notes: str) -> str:
    """The Markdown text of a bundle's `MODEL_CARD.md`.

    Args:
        name: the model's name.
        language: BCP-47 tag.
        provenance: as in the bundle's `config.json`.
        notes: Markdown on data, licences and limits, from who trained the model.
    """
    model = provenance["model"]
    direction = "bidirectional" if model["bidirectional"] else "forward"
    corpora = provenance["trained_on"]
    trained_on = corpora if isinstance(corpora, str) else ", ".join(corpora)
    sections = [
        f"# {name}",
        f"Language: {language}. A {model['n_layers']} × {model['hidden_size']} {direction} "
        f"{model['cell'].upper()} with CTC over characters and, as a second output, over phones; "
        f"subsampling {model['subsampling']}; weights {provenance['weights']}.",
        f"Trained with `voxgate train` for {provenance['n_epochs']} passes "
        f"({provenance['audio_seen_h']} hours of audio seen, speed-perturbed) on: {trained_on}.",
        _describe_measured(provenance["measured"]),
        notes.strip(),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _describe_measured(measured: Mapping[str, Any]) -> str:
    if not measured:
        return "No error rate was measured when this bundle was written."
    decoders = list(measured)
    corpora = sorted(measured[decoders[0]]["corpora"])
    header = "| development set | words | " + " | ".join(f"{d} WER / CER" for d in decoders) + " |"
    rows = [
        _describe_row(corpus, [measured[d]["corpora"][corpus] for d in decoders])
        for corpus in corpora
    ]
    rows.append(_describe_row("all", [measured[d]["total"] for d in decoders]))
    return "\n".join(
        [
            "## Error rates",
            "",
            "Development set; its speakers are not in the training set. `beam` is the search with "
            "the bundle's language model at its default settings, `greedy_float32` the graph "
            "before quantisation.",
            "",
            header,
            "| --- " * (len(decoders) + 2) + "|",
            *rows,
        ]
    )


def _describe_row(name: str, counts: list[Mapping[str, Any]]) -> str:
    cells = " | ".join(f"{c['wer']:.1%} / {c['cer']:.1%}" for c in counts)
    return f"| {name} | {counts[0]['n_words']:,} | {cells} |"
