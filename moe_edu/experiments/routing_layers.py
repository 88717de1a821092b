"""A translator whose four encoder layers are all sparse, and how it routes a few sentences through them.

The model that ships has one sparse encoder layer; this one exists to be looked at. It translates five languages into
English, with four layers of eight experts and the losses of lesson 07. `python -m moe_edu.experiments.routing_layers`
trains it (about two minutes on one free CPU core) and writes `results/routing_layers.json`: every choice and gate of
the trained model, and of the same model before its first step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from moe_edu.data import Corpus, SentencePair, load_corpus
from moe_edu.model.pretrained import TextTranslator
from moe_edu.model.translator import MoETranslator
from moe_edu.moe.routing import RouterOutput
from moe_edu.training.loop import train
from moe_edu.training.settings import TrainingSettings

ROUTES = Path(__file__).parent / "results" / "routing_layers.json"
LANGUAGES = ("deu_Latn", "eng_Latn", "fra_Latn", "hin_Deva", "jpn_Jpan", "spa_Latn")
MODEL_FIELDS = {
    "d_model": 64,
    "encoder_layers": 4,
    "encoder_ffn_dim": 96,
    "encoder_sparse_step": 1,
    "decoder_ffn_dim": 192,
    "router_z_loss_coef": 0.001,
}
SETTINGS = TrainingSettings(
    steps=1200,
    seed=7,
    device="cpu",
    languages=LANGUAGES,
    batch_tokens=300,
    vocab_size=1500,
    learning_rate=2e-3,
    warmup_steps=100,
    shards=1,
    log_every=100,
    eval_every=1200,
)
SHOWN = (
    ("spa_Latn", "date"),
    ("fra_Latn", "countries"),
    ("deu_Latn", "two_units"),
    ("hin_Deva", "two_units"),
    ("jpn_Jpan", "date"),
)
SIX_WORDS = SentencePair("le chat dort", "the cat sleeps", "fra_Latn", "eng_Latn", "example")
MOST_TOKENS = 12


def choose_sentences(corpus: Corpus, translator: TextTranslator) -> list[SentencePair]:
    """For each of SHOWN the longest validation sentence of at most MOST_TOKENS tokens; then the six words."""
    chosen = []
    for language, kind in SHOWN:
        pairs = [p for p in corpus.sentence_pairs("valid", [language], ["eng_Latn"]) if p.kind == kind]
        lengths = [len(translator.tokenizer.encode_source(pair.source, language)) for pair in pairs]
        short = [(length, pair) for length, pair in zip(lengths, pairs, strict=True) if length <= MOST_TOKENS]
        chosen.append(max(short, key=lambda item: item[0])[1])
    return [*chosen, SIX_WORDS]


def describe_layer(layer: RouterOutput) -> dict[str, Any]:
    """`experts` [S, 2] and `gates` [S, 2] of one layer, gates in hundredths."""
    return {
        "experts": layer.expert_index.tolist(),
        "gates": layer.combine_weights.mul(100).round().int().tolist(),
    }


def describe_routes(translator: TextTranslator, pair: SentencePair) -> list[dict[str, Any]]:
    """`describe_layer` of every encoder layer, for one sentence."""
    return [
        describe_layer(layer)
        for layer in translator.route(pair.source, source=pair.source_language).layers.values()
    ]


def read_routes(path: Path = ROUTES) -> dict[str, Any]:
    """What `main` wrote: `sentences`, each with `tokens` and `layers` by "trained" and "untrained"; and `result`."""
    routes: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return routes


def main() -> None:
    torch.set_num_threads(1)
    corpus = load_corpus(LANGUAGES)
    result = train(corpus, SETTINGS, model_fields=MODEL_FIELDS, test_sentences=300)
    trained = result.translator
    torch.manual_seed(SETTINGS.seed)  # as at the start of train()
    untrained = TextTranslator(MoETranslator(trained.model.config).eval(), trained.tokenizer)
    sentences = []
    for pair in choose_sentences(corpus, trained):
        ids = trained.tokenizer.encode_source(pair.source, pair.source_language)
        sentences.append(
            {
                "language": pair.source_language,
                "text": pair.source,
                "english": pair.target,
                "translation": trained.translate(pair.source, source=pair.source_language),
                "tokens": trained.tokenizer.tokens(ids),
                "layers": {
                    "trained": describe_routes(trained, pair),
                    "untrained": describe_routes(untrained, pair),
                },
            }
        )
    summary = {key: result.summary[key] for key in ("steps", "seconds", "parameters", "settings", "config")}
    summary["test"] = {key: result.summary["test"][key] for key in ("chrf", "exact_match", "sentences")}
    routes = {"sentences": sentences, "result": summary}
    ROUTES.write_text(json.dumps(routes, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{ROUTES.name}: {ROUTES.stat().st_size / 1000:.0f} kB; test {summary['test']}")


if __name__ == "__main__":
    main()
