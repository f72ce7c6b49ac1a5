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
        f"{model['cell'].upper()} with CTC over phones and {_describe_tokens(provenance)}; "
        f"subsampling {model['subsampling']}; weights {provenance['weights']}.",
        f"Trained with `voxgate train` ({provenance['audio_seen_h']} hours of audio seen, "
        f"speed-perturbed) on: {trained_on}.",
        _describe_measured(provenance["measured"]),
        notes.strip(),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _describe_tokens(provenance: Mapping[str, Any]) -> str:
    tokens = f"over {provenance.get('tokens', 'characters')}"
    n_layers = provenance["model"].get("n_spelling_layers", 0)
    if not n_layers:
        return tokens
    return f"{tokens}, which {n_layers} further layers write from the phones"


def _describe_measured(measured: Mapping[str, Any]) -> str:
    if not measured:
        return "No error rate was measured when this bundle was written."
    first = next(iter(measured.values()))
    corpora = sorted(first["corpora"])
    words = [f"{first['corpora'][c]['n_words']:,} words" for c in corpora]
    header = ["reading", *corpora, "all"]
    rows = [["", *words, f"{first['total']['n_words']:,} words"]]
    for name, figures in measured.items():
        counts = [*(figures["corpora"][corpus] for corpus in corpora), figures["total"]]
        rows.append([name, *(f"{c['wer']:.1%} / {c['cer']:.1%}" for c in counts)])
    return "\n".join(
        [
            "## Error rates",
            "",
            "WER / CER on the development set; its speakers are not in the training set. `beam` is "
            "the search over phones or characters with the bundle's language model at its default "
            "settings, `rescored` (the default) the search and the recurrent second pass, "
            "`reference` pyctcdecode over characters with the same language model, "
            "`greedy_float32` the graph before quantisation; a profile's name stands for the first "
            "pass of a stream alone, no name for reading with full context, as the second pass "
            "does.",
            "",
            *(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)),
        ]
    )
