"""English into 33 languages: does a translator whose decoder is sparse write better than its dense twin?

python -m moe_edu.experiments.english_to_many run --out runs        # resumes: finished runs are kept
python -m moe_edu.experiments.english_to_many collect runs --to results.json
python -m moe_edu.experiments.english_to_many table                 # the results that ship

Both read English with the same dense encoder and do the same work per token. Each is tuned: its learning rate is the
one with the best chrF++ on the validation split; the test split is only for the comparison.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from moe_edu.data import Corpus, load_corpus
from moe_edu.experiments.sweep import Plan, Sweep, count_parameters, make_command
from moe_edu.training.evaluation import evaluate, sample_examples
from moe_edu.training.loop import train
from moe_edu.training.settings import TrainingSettings

SOURCE = "eng_Latn"
VALID_SENTENCES = 990  # and as many test sentences, the same for every run
EXAMPLES_SEED = 0


@dataclass(frozen=True, kw_only=True)
class EnglishToManySettings:
    """One run.

    Attributes:
        experts: E of the decoder's feed-forward layer; 1 makes the dense twin.
        dense_width: feed-forward width of the dense twin. A sparse layer runs two experts of half that width per token.
        steps: optimizer steps.
        seed: of weights and data order.
        learning_rate: the peak of the schedule.
        capacity_factor: training capacity of an expert over `2 * ceil(T / E)`; in evaluation nothing is dropped.
        batch_tokens: as in `TrainingSettings`.
    """

    experts: int = 1
    dense_width: int = 512
    steps: int = 2000
    seed: int = 0
    learning_rate: float = 3e-3
    capacity_factor: float = 2.0
    batch_tokens: int = 500


def model_fields(settings: EnglishToManySettings) -> dict[str, Any]:
    """What differs from `small_config`: a dense encoder, and a decoder layer that is sparse or twice as wide."""
    dense = settings.experts == 1
    return {
        "encoder_sparse_step": 0,
        "decoder_sparse_step": 0 if dense else 1,
        "decoder_ffn_dim": settings.dense_width if dense else settings.dense_width // 2,
        "num_experts": settings.experts,
        "expert_capacity_factor": settings.capacity_factor,
    }


def training_settings(settings: EnglishToManySettings, languages: tuple[str, ...]) -> TrainingSettings:
    """How the translator is trained: as in lesson 7, but only from English."""
    return TrainingSettings(
        steps=settings.steps,
        seed=settings.seed,
        languages=languages,
        sources=(SOURCE,),
        targets=tuple(language for language in languages if language != SOURCE),
        batch_tokens=settings.batch_tokens,
        shards=1,
        und_rate=0.0,
        learning_rate=settings.learning_rate,
        warmup_steps=300,
        eval_sentences=0,
    )


def run(
    settings: EnglishToManySettings, corpus: Corpus | None = None, sentences: int = VALID_SENTENCES
) -> dict[str, Any]:
    """Train one translator on `corpus` (None: the shipped one) and score it on `sentences` of each held-out split.

    Returns:
        JSON values: the settings; all parameters and the active ones (on a token's path); chrF++ on validation and test
        sentences, exact match and chrF++ by target language on the latter; processor seconds of training.
    """
    corpus = load_corpus() if corpus is None else corpus
    how = training_settings(settings, corpus.languages)
    started = time.process_time()
    result = train(
        corpus, how, model_fields=model_fields(settings), processes=1, show_progress=False, test_sentences=0
    )
    seconds = time.process_time() - started
    assert how.targets is not None
    valid, test = (
        evaluate(
            result.translator,
            sample_examples(corpus, split, how.targets, sentences, EXAMPLES_SEED, [SOURCE]),
        )
        for split in ("valid", "test")
    )
    total, active = count_parameters(result.translator.model, settings.experts)
    return {
        "settings": asdict(settings),
        "parameters": total,
        "active_parameters": active,
        "valid_chrf": valid.overall.chrf,
        "test_chrf": test.overall.chrf,
        "test_exact_match": test.overall.exact_match,
        "test_chrf_by_language": {code: score.chrf for code, score in test.by_target_language.items()},
        "cpu_seconds": seconds,
    }


BASE = EnglishToManySettings()
TUNED = 3e-3  # the rate at which both have their best validation chrF++
PLAN: Plan = {
    "rates": {
        f"experts-{e}-rate-{rate:g}": (
            replace(BASE, experts=e, learning_rate=rate),
            5 if rate == TUNED else 2,
        )
        for rate in (1.5e-3, TUNED, 6e-3)
        for e in (1, 16)
    },
}
SWEEP = Sweep(
    name="english_to_many",
    base=BASE,
    plan=PLAN,
    run=run,
    measures={"valid_chrf": 1, "test_chrf": 1, "test_exact_match": 3, "cpu_seconds": 1},
)
main = make_command(SWEEP)

if __name__ == "__main__":
    main()
