"""Two training runs to look through step by step: with and without the balancing loss.

This is lesson 07's model with six languages and 1,000 steps, so that both runs take only a few minutes.
`python -m moe_edu.experiments.learning_history` trains them and writes `results/learning_history.json`. One seed
each: a history to look through, not a measurement of a difference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moe_edu.data import Corpus, SentencePair, load_corpus
from moe_edu.data.corpus import choose_phrases
from moe_edu.model.pretrained import TextTranslator
from moe_edu.training.loop import Record, train
from moe_edu.training.settings import TrainingSettings

HISTORY = Path(__file__).parent / "results" / "learning_history.json"
AUX_LOSS_COEFS = (0.01, 0.0)
LANGUAGES = ("arb_Arab", "deu_Latn", "eng_Latn", "fra_Latn", "hin_Deva", "jpn_Jpan")
WINDOW = 20  # steps averaged into one point of the curves
SNAPSHOT_EVERY = 100  # steps between evaluations on the validation split; a multiple of WINDOW
PHRASES = (
    ("fra_Latn", "relative_time"),
    ("jpn_Jpan", "unit"),
    ("deu_Latn", "date"),
    ("arb_Arab", "countries"),
)


SETTINGS = TrainingSettings(
    steps=1000,
    seed=7,
    languages=LANGUAGES,
    batch_tokens=400,
    vocab_size=1500,
    learning_rate=1.5e-3,
    warmup_steps=100,
    shards=1,
    device="cpu",
    log_every=1,
    eval_every=SNAPSHOT_EVERY,
    eval_sentences=80,
)


def model_fields(router_aux_loss_coef: float) -> dict[str, float]:
    """What differs from `small_config` in the run with this weight of the balancing loss."""
    return {"router_aux_loss_coef": router_aux_loss_coef, "router_z_loss_coef": 0.001}


def watch(corpus: Corpus, fields: Mapping[str, float], phrases: Sequence[SentencePair]) -> dict[str, Any]:
    """Train a model with these fields and keep what the reader will look through.

    Returns:
        `points`: one per window of WINDOW steps, with its last `step` and its means of `loss`, `load` [E] (share of the
        first choices) and `left_behind` (share of the tokens); `snapshots`: `step`, `chrf`, `translations`.
    """
    records: list[Record] = []
    snapshots: list[dict[str, Any]] = []

    def keep(record: Record, translator: TextTranslator) -> None:
        records.append(record)
        if "valid/chrf" in record:
            snapshots.append(
                {
                    "step": record["step"],
                    "chrf": round(record["valid/chrf"], 1),
                    "translations": [
                        translator.translate(phrase.source, source=phrase.source_language)  # into English
                        for phrase in phrases
                    ],
                }
            )
            print(
                f"step {record['step']}: loss {record['loss']:.2f}, chrF++ {record['valid/chrf']:.1f}",
                flush=True,
            )

    result = train(
        corpus,
        SETTINGS,
        model_fields=fields,
        on_record=keep,
        show_progress=False,
        test_sentences=0,
    )
    windows = [records[start : start + WINDOW] for start in range(0, len(records), WINDOW)]
    return {
        "points": [summarize(window) for window in windows],
        "snapshots": snapshots,
        "seconds": result.summary["seconds"],
        "settings": asdict(SETTINGS),
        "model_fields": dict(fields),
    }


def summarize(window: Sequence[Record]) -> dict[str, Any]:
    """The means over a window of log lines, and the step of the last line."""
    loads = torch.tensor([next(iter(record["expert_load"].values())) for record in window])
    left_behind = [record["experts/fraction_tokens_left_behind"] for record in window]
    return {
        "step": window[-1]["step"],
        "loss": round(sum(record["loss"] for record in window) / len(window), 3),
        "load": [round(share, 3) for share in loads.mean(dim=0).tolist()],
        "left_behind": round(sum(left_behind) / len(left_behind), 4),
    }


def read_history(path: Path = HISTORY) -> dict[str, Any]:
    """What `main` wrote: `phrases`, and `runs` by the weight of the balancing loss, "0.01" and "0"."""
    history: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return history


def main() -> None:
    torch.set_num_threads(1)
    corpus = load_corpus(LANGUAGES)
    languages, kinds = zip(*PHRASES, strict=True)
    phrases = choose_phrases(corpus, languages, kinds, seed=7)
    shown = [
        {"language": phrase.source_language, "source": phrase.source, "human": phrase.target}
        for phrase in phrases
    ]
    runs = {}
    for coef in AUX_LOSS_COEFS:
        print(f"balancing loss with weight {coef:g}", flush=True)
        runs[f"{coef:g}"] = watch(corpus, model_fields(coef), phrases)
        history = {"phrases": shown, "runs": runs}
        HISTORY.write_text(
            json.dumps(history, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
        )
    print(f"{HISTORY.name}: {HISTORY.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
