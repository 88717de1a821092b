"""Training a translator: the schedule, one step, the loop, and what a run leaves behind.

A run is deterministic for its seed and thread count, on one process or several, and one that was killed resumes to the
same weights: the state on disk holds the weights, the optimizer and the step, from which data and dropout follow.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from tqdm.auto import tqdm

from moe_edu.config import MoEConfig
from moe_edu.data import Batch, Corpus, PairBatches, SentencePair, Tokenizer
from moe_edu.model.pretrained import TextTranslator
from moe_edu.model.translator import MoETranslator
from moe_edu.moe.losses import MoELoss, summarize_metrics
from moe_edu.moe.metrics import ExpertMetrics, collect_metrics
from moe_edu.moe.routing import RouterOutput
from moe_edu.system.machine import peak_memory_mb, resolve_device, usable_cores
from moe_edu.training.evaluation import evaluate, sample_examples
from moe_edu.training.run import LOG_FILE, RESULT_FILE, STATE_FILE, RunLog, load_state, save_state, write_json
from moe_edu.training.settings import TrainingSettings, small_config
from moe_edu.training.shards import (
    CollectMetrics,
    add_gradients,
    autocast_dtype,
    bind_parameters,
    cut_shards,
    mean_load,
    mean_loss,
    seeded,
)
from moe_edu.training.workers import WorkerPool

Record = dict[str, Any]
OnRecord = Callable[[Record, TextTranslator], None]


class Pieces(Protocol):
    """Parts of the model and of its losses that the caller brings, to train with in the place of ours."""

    def assemble(self, model: MoETranslator, /) -> MoETranslator:
        """A model of the same weights that runs them."""

    def collect_metrics(self, routing: Iterable[RouterOutput | None], /) -> tuple[ExpertMetrics, ...]:
        """As `moe_edu.collect_metrics`, with the caller's router losses."""


@dataclass(frozen=True)
class TrainingResult:
    """A trained translator, its log, and the summary that `result.json` holds."""

    translator: TextTranslator
    history: list[Record]
    summary: dict[str, Any]


class TrainingDivergedError(RuntimeError):
    """The loss or its gradient became NaN or infinite; a state that was saved before is still on disk."""


class StepResult(NamedTuple):
    """One optimizer step.

    Attributes:
        loss: its parts.
        expert_metrics: router statistics, one entry a sparse layer and shard.
        expert_load: share of the first choices that each expert received, `[E]`, by layer ("encoder.1").
        gradient_norm: before clipping.
    """

    loss: MoELoss
    expert_metrics: tuple[ExpertMetrics, ...]
    expert_load: dict[str, Tensor]
    gradient_norm: Tensor


def learning_rate_at(settings: TrainingSettings, step: int, progress: float) -> float:
    """The rate of `step` (0-based) at `progress` in [0, 1] of the run: linear warm-up, then a cosine to zero."""
    warmup = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    return settings.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class Trainer:
    """A model and its optimizer, one step at a time.

    The model's parameters become views into one long tensor: it has one trainer at a time, and stays on its device.
    """

    def __init__(
        self,
        model: MoETranslator,
        settings: TrainingSettings,
        workers: WorkerPool | None = None,
        measure: CollectMetrics = collect_metrics,
    ) -> None:
        """`measure` gives the router losses; `workers`, if any, have a model and losses of ours."""
        self.model = model
        self.settings = settings
        self.measure = measure
        self.device = model.shared.weight.device
        self.workers = workers
        self.steps_done = 0
        values = parameters_to_vector(model.parameters()).detach()
        self.weights = nn.Parameter(torch.empty_like(values) if workers is None else workers.weights)
        self.gradients = torch.empty_like(values) if workers is None else workers.gradients
        with torch.no_grad():
            self.weights.copy_(values)
        self.weights.grad = self.gradients
        bind_parameters(model, self.weights, self.gradients)
        self.optimizer = torch.optim.AdamW(
            [self.weights],
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        dtype = autocast_dtype(settings.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    def step(self, batch: Batch, learning_rate: float) -> StepResult:
        """Forward, backward, clip, update.

        Raises:
            TrainingDivergedError: a loss or, without a loss scale, a gradient that is not finite. The weights are
                those from before the step.
        """
        if not self.model.training:
            self.model.train()
        shards = cut_shards(
            batch, resolve_shards(self.settings, self.device), self.settings.seed, self.steps_done
        )
        scale = self.scaler.scale(self.gradients.new_ones(()))
        if self.workers is not None:
            self.workers.start(shards[1:], scale.item())
        self.gradients.zero_()
        local = shards if self.workers is None else shards[:1]
        results = [add_gradients(self.model, shard, self.settings, scale, self.measure) for shard in local]
        if self.workers is not None:
            results += self.workers.finish(len(shards) - 1)
        loss = mean_loss(shards, results)

        self.scaler.unscale_(self.optimizer)
        norm = self.gradients.norm()
        self.gradients.mul_((self.settings.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        # With a loss scale an infinite gradient is routine: the scaler skips the step and lowers the scale.
        suspects = loss.total if self.scaler.is_enabled() else loss.total + norm
        if not torch.isfinite(suspects):
            raise TrainingDivergedError(
                f"the loss is {loss.total.item():.4g}, its gradient norm {norm.item():.4g}"
            )
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.steps_done += 1
        metrics = tuple(layer for result in results for layer in result.expert_metrics)
        return StepResult(loss, metrics, mean_load(results), norm)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """As `model.generate`, by all processes of the run; the model must be in eval mode."""
        if self.workers is None:
            return self.model.generate(input_ids, attention_mask, **options)
        return self.workers.generate(self.model, input_ids, attention_mask, **options)


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
        corpus: the shipped one (`load_corpus()`) or the reader's own.
        settings: None for the defaults.
        model_fields: `MoEConfig` fields that override `small_config`'s.
        pieces: the caller's own parts, such as `moe_edu.exercises.capstone.Pieces`; they run in one process.
        out: where to leave the model, tokenizer, log, state and `result.json`; None keeps everything in memory.
        resume: go on from the state in `out`.
        processes: 1, or as many as the batch has shards, on the CPU; None is the latter where there are so many cores.
            The weights are the same either way where each computes on as many threads, else to rounding.
            `torch.get_num_threads()` threads are divided among them.
        on_record: called after each log line with the line and the translator, for live plots.
        show_progress: draw a progress bar.
        checkpoint_every: steps between saved states; only with `out`.
        test_sentences: how many test sentences to translate at the end; None for all, 0 for none.
        store_dtype: precision of the model that is left in `out`.

    Raises:
        TrainingDivergedError: the loss became NaN or infinite; says at which step, on what, and what to try.
        CheckpointError: nothing to resume, or damaged files.
        ValueError: settings that do not fit the corpus, or differ from those of the run to resume.
    """
    settings = settings or TrainingSettings()
    directory = prepare_directory(out, resume)
    device = resolve_device(settings.device)
    languages = tuple(dict.fromkeys(settings.languages or corpus.languages))
    sources = tuple(dict.fromkeys(settings.sources or languages))
    targets = tuple(dict.fromkeys(settings.targets or languages))
    corpus = corpus.restrict(languages)
    tokenizer = Tokenizer.train(corpus.train.texts(), languages, settings.vocab_size)
    config = small_config(**{**(model_fields or {}), "vocab_size": len(tokenizer)})
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
    # The caller's random state is none of our business, and ours must depend on the seed alone.
    with seeded(settings.seed, device):
        model = MoETranslator(config).to(device)
    if pieces is not None:
        model = pieces.assemble(model)
    valid, test = (
        _fitting(
            sample_examples(corpus, split, targets, count, settings.seed, sources), split, tokenizer, config
        )
        for split, count in (("valid", settings.eval_sentences), ("test", test_sentences))
    )
    # The caller's functions cannot be sent to another process.
    with start_workers(model, settings, processes if pieces is None else 1) as workers:
        trainer = Trainer(
            model, settings, workers, collect_metrics if pieces is None else pieces.collect_metrics
        )
        translator = TextTranslator(trainer.model, tokenizer, targets=targets)
        history, progress = run_loop(
            trainer, translator, batches, valid, directory, resume, on_record, show_progress, checkpoint_every
        )
        trainer.model.eval()
        if directory is not None:
            translator.save_pretrained(directory, store_dtype)
        scores = evaluate(translator, test, generate=trainer.generate)
        workers_mb = 0.0 if workers is None else workers.peak_memory_mb()
    own_mb = peak_memory_mb()
    summary = {
        "seconds": round(progress.seconds, 1),
        "steps": progress.step,
        "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9)),
        "parameters": trainer.weights.numel(),
        "test": scores.to_json(),
        "peak_rss_mb": None if own_mb is None else own_mb + workers_mb,
        "settings": asdict(settings),
        "config": asdict(config),
    }
    if directory is not None:
        write_json(directory / RESULT_FILE, summary)
    return TrainingResult(translator, history, summary)


def _fitting(
    examples: list[SentencePair], split: str, tokenizer: Tokenizer, config: MoEConfig
) -> list[SentencePair]:
    """Those that the model has positions for, as in training; says how many it has not."""
    lengths = (
        map(len, tokenizer.encode_pieces([getattr(example, side) for example in examples]))
        for side in ("source", "target")
    )
    limit = config.max_position_embeddings - 2  # the language's tag and </s>
    kept = [example for example, *length in zip(examples, *lengths, strict=True) if max(length) <= limit]
    if len(kept) < len(examples):
        warnings.warn(
            f"{len(examples) - len(kept)} of {len(examples)} {split} pairs have more than {limit} tokens and are left "
            "out, as such pairs are in training: raise max_position_embeddings to read them",
            stacklevel=3,
        )
    return kept


class Progress(NamedTuple):
    """How far a run is: optimizer steps, seconds of training, real tokens seen."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0

    def fraction(self, settings: TrainingSettings) -> float:
        """Share of the run that is done, by the clock where `settings.seconds` is set, else by steps."""
        return self.step / settings.steps if settings.seconds is None else self.seconds / settings.seconds


def run_loop(
    trainer: Trainer,
    translator: TextTranslator,
    batches: PairBatches,
    valid: Sequence[SentencePair],
    directory: Path | None,
    resume: bool,
    on_record: OnRecord | None,
    show_progress: bool,
    checkpoint_every: int,
) -> tuple[list[Record], Progress]:
    """Train to the end of the settings' steps or seconds; returns the log and the progress."""
    settings = trainer.settings
    identity = {
        "settings": asdict(settings),
        "config": asdict(trainer.model.config),
        "data": {"corpus": batches.digest()},
    }
    progress = Progress()
    if resume and directory is not None:
        saved = load_state(directory, trainer.model, trainer.optimizer)
        check_same_run(saved["identity"], identity)
        trainer.scaler.load_state_dict(saved["scaler"])
        progress = Progress(**saved["progress"])
        trainer.steps_done = progress.step
    log = RunLog(None if directory is None else directory / LOG_FILE, progress.step if resume else None)

    def save() -> None:
        if directory is not None and progress.step > 0:
            state = {
                "progress": progress._asdict(),
                "identity": identity,
                "scaler": trainer.scaler.state_dict(),
            }
            save_state(directory, trainer.model, trainer.optimizer, state)

    started = time.perf_counter() - progress.seconds
    with tqdm(total=100, unit="%", disable=not show_progress, bar_format=_BAR) as bar:
        for batch in batches.stream(progress.step):
            fraction = progress.fraction(settings)
            if fraction >= 1:
                break
            try:
                result = trainer.step(batch, learning_rate_at(settings, progress.step, fraction))
            except TrainingDivergedError as error:
                raise TrainingDivergedError(_diverged(error, progress.step, batch, directory)) from error
            progress = Progress(
                progress.step + 1, time.perf_counter() - started, progress.tokens + batch.num_tokens
            )
            finished = progress.fraction(settings) >= 1
            evaluating = finished or progress.step % settings.eval_every == 0
            if evaluating or progress.step % settings.log_every == 0:
                record = make_record(result, batch, progress, trainer.optimizer.param_groups[0]["lr"])
                if evaluating and valid:
                    trainer.model.eval()
                    score = evaluate(translator, valid, generate=trainer.generate).overall
                    record |= {"valid/chrf": score.chrf, "valid/exact_match": score.exact_match}
                log.append(record)
                bar.n = round(100 * min(progress.fraction(settings), 1))
                bar.set_postfix(loss=f"{record['loss']:.3f}", step=progress.step)
                if on_record is not None:
                    trainer.model.eval()
                    on_record(record, translator)
            if progress.step % checkpoint_every == 0:
                save()
    save()
    return log.history, progress


_BAR = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"


def make_record(result: StepResult, batch: Batch, progress: Progress, learning_rate: float) -> Record:
    """One log line: the loss and its parts, every `experts/...` metric, speed."""
    summary = summarize_metrics(result.expert_metrics, result.loss, num_target_tokens=batch.labels.numel())
    values = {
        "loss": result.loss.total,
        "z_loss": result.loss.z_loss,
        "gradient_norm": result.gradient_norm,
        **summary,
    }
    return {
        "step": progress.step,
        "seconds": round(progress.seconds, 3),
        "learning_rate": learning_rate,
        "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9)),
        **{name: value.item() for name, value in values.items()},
        "expert_load": {
            layer: [round(share, 4) for share in shares.tolist()]
            for layer, shares in result.expert_load.items()
        },
    }


def resolve_shards(settings: TrainingSettings, device: torch.device) -> int:
    """How many shards a batch is cut into: `settings.shards`, or by the device where that is None."""
    if settings.shards is not None:
        return settings.shards
    return 2 if device.type == "cpu" else 1


def start_workers(
    model: MoETranslator, settings: TrainingSettings, processes: int | None
) -> AbstractContextManager[WorkerPool | None]:
    """A worker for each shard but the first; None where this process computes all shards."""
    device = model.shared.weight.device
    shards = resolve_shards(settings, device)
    if processes is None:
        processes = shards if device.type == "cpu" and shards <= usable_cores() else 1
    if processes not in (1, shards):
        raise ValueError(f"processes must be 1 or the number of shards, {shards}; got {processes}")
    if processes > 1 and device.type != "cpu":
        raise ValueError(f"several processes train on the CPU only; the device is {device}")
    return nullcontext() if processes == 1 else WorkerPool(shards - 1, model, settings)


def prepare_directory(out: str | Path | None, resume: bool) -> Path | None:
    """Make the run's folder; refuse to overwrite a run, or to resume without one."""
    if out is None:
        if resume:
            raise ValueError("resume needs `out`, the folder of the run to go on with")
        return None
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    if not resume and (directory / STATE_FILE).exists():
        raise ValueError(f"{directory} holds a run already: resume it, or choose another folder")
    return directory


def check_same_run(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to resume with other settings than the run began with.

    Raises:
        ValueError: names each field that differs.
    """
    differences = []
    for part, fields in given.items():
        for name, value in fields.items():
            # JSON has no tuples.
            value = list(value) if isinstance(value, tuple) else value
            before = saved.get(part, {}).get(name)
            if before != value:
                differences.append(f"{name} was {before!r}, is {value!r}")
    if differences:
        raise ValueError(
            f"the run began with other settings: {'; '.join(differences)}. Go on with those, or begin anew in another "
            "folder"
        )


def _diverged(error: Exception, step: int, batch: Batch, directory: Path | None) -> str:
    kept = directory is not None and (directory / STATE_FILE).exists()
    state = f"; the last good state is in {directory}" if kept else ""
    return (
        f"training diverged at step {step}: {error}{state}. The batch: {batch.describe()}. "
        f"Begin anew{' in another folder' if kept else ''} with a lower learning_rate, more warmup_steps, or "
        "precision fp32"
    )
