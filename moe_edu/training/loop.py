"""Training a translator: the schedule, a run's data, and the loop over its steps.

A run is deterministic for a given seed and thread count, in one process or several. A killed run resumes and ends with
the same weights: the state on disk holds the weights, the optimizer and the step, which determines data and dropout.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from tqdm.auto import tqdm

from moe_edu.config import MoEConfig
from moe_edu.data import Batch, Corpus, PairBatches, SentencePair, Tokenizer
from moe_edu.model.pretrained import TextTranslator
from moe_edu.model.translator import MoETranslator
from moe_edu.moe.losses import summarize_metrics
from moe_edu.moe.metrics import ExpertMetrics, collect_metrics
from moe_edu.moe.routing import RouterOutput
from moe_edu.system.machine import resolve_device
from moe_edu.training.evaluation import evaluate, sample_examples
from moe_edu.training.run import STATE_FILE, Record, Run, prepare_directory
from moe_edu.training.settings import TrainingSettings, small_config
from moe_edu.training.shards import CollectMetrics, seeded
from moe_edu.training.trainer import StepResult, Trainer, TrainingDivergedError, start_workers

OnRecord = Callable[[Record, TextTranslator], None]


class Pieces(Protocol):
    """The caller's own parts of the model and of its losses, which replace ours in training."""

    def assemble(self, model: MoETranslator, /) -> MoETranslator:
        """A model with the same weights that runs these parts."""

    def collect_metrics(self, routing: Iterable[RouterOutput | None], /) -> tuple[ExpertMetrics, ...]:
        """Like `moe_edu.collect_metrics`, with the caller's router losses."""


@dataclass(frozen=True)
class TrainingResult:
    """A trained translator, its log, and the summary that `result.json` holds."""

    translator: TextTranslator
    history: list[Record]
    summary: dict[str, Any]


def learning_rate_at(settings: TrainingSettings, step: int, progress: float) -> float:
    """The rate of `step` (0-based) at `progress` in [0, 1] of the run: linear warm-up, then a cosine to zero."""
    warmup = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    return settings.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def train(
    corpus: Corpus,
    settings: TrainingSettings | None = None,
    *,
    model_fields: Mapping[str, Any] | None = None,
    pieces: Pieces | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    processes: int | None = None,
    on_record: OnRecord | None = None,
    show_progress: bool = True,
    checkpoint_every: int = 200,
    test_sentences: int | None = None,
    store_dtype: torch.dtype = torch.float32,
) -> TrainingResult:
    """Train a translator on `corpus` and test it on the held-out split.

    Args:
        corpus: the one that ships (`load_corpus()`) or your own.
        settings: None for the defaults.
        model_fields: `MoEConfig` fields that override `small_config`'s.
        pieces: the caller's own parts, such as `moe_edu.exercises.capstone.Pieces`; they run in one process.
        out: folder for the model, tokenizer, log, state and `result.json`; None keeps everything in memory.
        resume: continue from the state in `out`.
        processes: 1, or on the CPU the number of shards per batch; None means the latter if there are that many cores.
            The weights are the same either way if each process uses the same number of threads, else up to rounding.
            `torch.get_num_threads()` threads are divided among the processes.
        on_record: called with each log line and the translator, for live plots.
        show_progress: draw a progress bar.
        checkpoint_every: steps between saved states; only with `out`.
        test_sentences: how many test sentences to translate at the end; None for all, 0 for none.
        store_dtype: precision of the model saved in `out`.

    Raises:
        TrainingDivergedError: the loss became NaN or infinite; the message says at which step, on which batch, and
            what to try.
        CheckpointError: there is nothing to resume, or files are damaged.
        ValueError: settings do not fit the corpus, or differ from those of the run to resume.
    """
    settings = settings or TrainingSettings()
    directory = prepare_directory(out, resume)
    device = resolve_device(settings.device)
    data = prepare_data(corpus, settings, model_fields or {}, test_sentences)
    # Weights must depend on the seed alone, and the caller's random state stays as it was.
    with seeded(settings.seed, device):
        model = MoETranslator(data.config).to(device)
    measure: CollectMetrics = collect_metrics
    if pieces is not None:
        # The caller's functions cannot be sent to worker processes.
        model, measure, processes = pieces.assemble(model), pieces.collect_metrics, 1
    with start_workers(model, settings, processes) as workers:
        trainer = Trainer(model, settings, workers, measure)
        # All processes translate the validation and test sentences together.
        translator = TextTranslator(
            model,
            data.tokenizer,
            targets=data.targets,
            generate=None if workers is None else workers.generate,
        )
        run = Run(trainer, translator, data.batches.digest(), directory)
        if resume:
            run.resume()
        else:
            run.begin()
        with tqdm(total=100, unit="%", disable=not show_progress, bar_format=_BAR) as bar:
            for record in run_steps(run, data.batches, data.valid, checkpoint_every):
                bar.n = round(100 * min(run.fraction, 1))
                bar.set_postfix(loss=f"{record['loss']:.3f}", step=record["step"])
                if on_record is not None:
                    model.eval()
                    on_record(record, translator)
        summary = run.finish(data.test, store_dtype)
    return TrainingResult(replace(translator, generate=None), run.log.history, summary)


_BAR = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"


class TrainingData(NamedTuple):
    """A run's data: tokenizer, target languages, configuration, batches, held-out sentences."""

    tokenizer: Tokenizer
    targets: tuple[str, ...]
    config: MoEConfig
    batches: PairBatches
    valid: list[SentencePair]
    test: list[SentencePair]


def prepare_data(
    corpus: Corpus, settings: TrainingSettings, model_fields: Mapping[str, Any], test_sentences: int | None
) -> TrainingData:
    """Learn the tokenizer and prepare batches from the settings' languages; arguments and errors as in `train`."""
    languages = tuple(dict.fromkeys(settings.languages or corpus.languages))
    sources = tuple(dict.fromkeys(settings.sources or languages))
    targets = tuple(dict.fromkeys(settings.targets or languages))
    corpus = corpus.restrict(languages)
    tokenizer = Tokenizer.train(corpus.train.texts(), languages, settings.vocab_size)
    config = small_config(**{**model_fields, "vocab_size": len(tokenizer)})
    batches = PairBatches(
        corpus,
        tokenizer,
        sources=sources,
        targets=targets,
        batch_tokens=settings.batch_tokens,
        und_rate=settings.und_rate,
        max_tokens=config.max_position_embeddings,
        seed=settings.seed,
    )
    valid, test = (
        _fitting(
            sample_examples(corpus, split, targets, count, settings.seed, sources), split, tokenizer, config
        )
        for split, count in (("valid", settings.eval_sentences), ("test", test_sentences))
    )
    return TrainingData(tokenizer, targets, config, batches, valid, test)


def _fitting(
    examples: list[SentencePair], split: str, tokenizer: Tokenizer, config: MoEConfig
) -> list[SentencePair]:
    """The examples that the model has positions for, as in training; warns how many are left out."""
    lengths = (
        map(len, tokenizer.encode_pieces([getattr(example, side) for example in examples]))
        for side in ("source", "target")
    )
    limit = config.max_position_embeddings - 2  # the language's tag and </s>
    kept = [example for example, *length in zip(examples, *lengths, strict=True) if max(length) <= limit]
    if len(kept) < len(examples):
        warnings.warn(
            f"{len(examples) - len(kept)} of {len(examples)} {split} pairs have more than {limit} tokens and are left "
            "out, as such pairs are in training: raise max_position_embeddings to include them",
            stacklevel=3,
        )
    return kept


def run_steps(
    run: Run, batches: PairBatches, valid: Sequence[SentencePair], checkpoint_every: int
) -> Iterator[Record]:
    """Train for the settings' steps or seconds, and yield each log line when it is written.

    Errors as in `train`.
    """
    trainer, settings = run.trainer, run.trainer.settings
    started = time.perf_counter() - run.seconds
    for batch in batches.stream(trainer.steps_done):
        if run.fraction >= 1:
            break
        rate = learning_rate_at(settings, trainer.steps_done, run.fraction)
        try:
            result = trainer.step(batch, rate)
        except TrainingDivergedError as error:
            raise TrainingDivergedError(_diverged(error, run, batch)) from error
        run.seconds = time.perf_counter() - started
        run.tokens += batch.num_tokens
        evaluating = run.fraction >= 1 or trainer.steps_done % settings.eval_every == 0
        if evaluating or trainer.steps_done % settings.log_every == 0:
            record = make_record(run, result, batch, rate)
            if evaluating and valid:
                trainer.model.eval()
                score = evaluate(run.translator, valid).overall
                record |= {"valid/chrf": score.chrf, "valid/exact_match": score.exact_match}
            run.log.append(record)
            yield record
        if trainer.steps_done % checkpoint_every == 0:
            run.save()
    run.save()


def make_record(run: Run, result: StepResult, batch: Batch, learning_rate: float) -> Record:
    """One log line: the loss and its parts, every `experts/...` metric, and the speed."""
    summary = summarize_metrics(result.expert_metrics, result.loss, num_target_tokens=batch.labels.numel())
    values = {
        "loss": result.loss.total,
        "z_loss": result.loss.z_loss,
        "gradient_norm": result.gradient_norm,
        **summary,
    }
    return {
        "step": run.trainer.steps_done,
        "seconds": round(run.seconds, 3),
        "learning_rate": learning_rate,
        "tokens_per_second": run.tokens_per_second,
        **{name: value.item() for name, value in values.items()},
        "expert_load": {
            layer: [round(share, 4) for share in shares.tolist()]
            for layer, shares in result.expert_load.items()
        },
    }


def _diverged(error: Exception, run: Run, batch: Batch) -> str:
    kept = run.directory is not None and (run.directory / STATE_FILE).exists()
    state = f"; the last good state is in {run.directory}" if kept else ""
    return (
        f"training diverged at step {run.trainer.steps_done}: {error}{state}. The batch: {batch.describe()}. "
        f"Start again{' in another folder' if kept else ''} with a lower learning_rate, more warmup_steps, or "
        "precision fp32"
    )
