"""Training a translator: the schedule, one step, the loop, and what a run leaves behind.

A run is deterministic for its seed and thread count, and one that was killed resumes to the same weights: the state on
disk holds the weights, the optimizer, the random state and the place in the data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from moe_edu.capstone import Pieces, assemble
from moe_edu.data import Batch, Corpus, PairBatches, SentencePair, Tokenizer
from moe_edu.evaluation import evaluate, sample_examples
from moe_edu.losses import MoELoss, SpecialLossNormalizingFactor, moe_loss
from moe_edu.machine import peak_memory_mb, resolve_device
from moe_edu.metrics import ExpertMetrics, collect_metrics, summarize_metrics
from moe_edu.model import MoETranslator, TranslatorOutput
from moe_edu.pretrained import TextTranslator
from moe_edu.routing import count_per_expert
from moe_edu.runs import LOG_FILE, RESULT_FILE, STATE_FILE, RunLog, load_state, save_state, write_json
from moe_edu.settings import Precision, TrainingSettings, small_config

Record = dict[str, Any]
OnRecord = Callable[[Record, TextTranslator], None]


@dataclass(frozen=True)
class TrainingResult:
    """A trained translator, its log, and the summary that `result.json` holds."""

    translator: TextTranslator
    history: list[Record]
    summary: dict[str, Any]


class TrainingDivergedError(RuntimeError):
    """The loss or its gradient became NaN or infinite; the last good state is still on disk."""


class StepResult(NamedTuple):
    """One optimizer step.

    Attributes:
        loss: its parts.
        expert_metrics: router statistics, one entry a sparse layer.
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


def compute_loss(
    output: TranslatorOutput, batch: Batch, settings: TrainingSettings, pieces: Pieces | None = None
) -> tuple[MoELoss, tuple[ExpertMetrics, ...]]:
    """The loss of one batch, per real target token, and what the routers did; `pieces` may bring the router losses."""
    metrics = collect_metrics(output.routing) if pieces is None else pieces.collect_metrics(output.routing)
    loss = moe_loss(
        output.logits,
        batch.labels,
        batch.decoder_mask,
        expert_metrics=metrics,
        # Without a layer that routed (a dense model, or LayerDrop took them all) there is nothing to balance.
        aux_loss_factor=settings.aux_loss_factor if metrics else 0.0,
        router_z_loss_factor=settings.router_z_loss_factor if metrics else 0.0,
        label_smoothing=settings.label_smoothing,
        z_loss=settings.z_loss,
        loss_normalizing_factor=SpecialLossNormalizingFactor.NUM_REAL_TARGET_TOKENS,
    )
    return loss, metrics


def expert_load(output: TranslatorOutput) -> dict[str, Tensor]:
    """Share of the first choices that each expert received, `[E]`, by sparse layer ("encoder.1")."""
    shares = {}
    for side, routing in (("encoder", output.encoder.routing), ("decoder", output.decoder.routing)):
        for i, layer in enumerate(routing):
            if layer is not None:
                counts = count_per_expert(layer.expert_index[:, 0], layer.num_experts)
                shares[f"{side}.{i}"] = counts / counts.sum().clamp(min=1)
    return shares


class Trainer:
    """A model and its optimizer, one step at a time."""

    def __init__(
        self, model: MoETranslator, settings: TrainingSettings, pieces: Pieces | None = None
    ) -> None:
        self.model = model if pieces is None else assemble(model, pieces)
        self.settings = settings
        self.pieces = pieces
        self.device = model.shared.weight.device
        self.dtype = autocast_dtype(settings.precision, self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def step(self, batch: Batch, learning_rate: float) -> StepResult:
        """Forward, backward, clip, update.

        Raises:
            TrainingDivergedError: a loss or, without a loss scale, a gradient that is not finite. The weights are
                those from before the step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            batch = batch.to(self.device)
            output = self.model(
                batch.source_ids, batch.source_mask, batch.decoder_input_ids, batch.decoder_mask
            )
            loss, metrics = compute_loss(output, batch, self.settings, self.pieces)
        self.scaler.scale(loss.total).backward()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        # With a loss scale an infinite gradient is routine: the scaler skips the step and lowers the scale.
        suspects = loss.total if self.scaler.is_enabled() else loss.total + norm
        if not torch.isfinite(suspects):
            raise TrainingDivergedError(
                f"the loss is {loss.total.item():.4g}, its gradient norm {norm.item():.4g}"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return StepResult(loss, metrics, expert_load(output), norm)


def train(
    corpus: Corpus,
    settings: TrainingSettings | None = None,
    *,
    model_fields: Mapping[str, Any] | None = None,
    pieces: Pieces | None = None,
    out: str | Path | None = None,
    resume: bool = False,
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
        pieces: a learner's functions, to run in the place of ours; see `moe_edu.capstone`.
        out: where to leave the model, tokenizer, log, state and `result.json`; None keeps everything in memory.
        resume: go on from the state in `out`.
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
    languages = settings.languages or corpus.languages
    targets = settings.targets or languages
    corpus = corpus.restrict(languages)
    tokenizer = Tokenizer.train(corpus.train.texts(), languages, settings.vocab_size)
    config = small_config(**{**(model_fields or {}), "vocab_size": len(tokenizer)})
    batches = PairBatches(
        corpus,
        tokenizer,
        targets=targets,
        batch_tokens=settings.batch_tokens,
        und_rate=settings.und_rate,
        max_tokens=config.max_position_embeddings,
        seed=settings.seed,
    )
    # The caller's random state is none of our business, and ours must depend on the seed alone.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        trainer = Trainer(MoETranslator(config).to(device), settings, pieces)
        translator = TextTranslator(trainer.model, tokenizer)
        valid = sample_examples(corpus, "valid", targets, settings.eval_sentences, settings.seed)
        history, progress = run_loop(
            trainer, translator, batches, valid, directory, resume, on_record, show_progress, checkpoint_every
        )
    trainer.model.eval()
    test = sample_examples(corpus, "test", targets, test_sentences, settings.seed)
    summary = {
        "seconds": round(progress.seconds, 1),
        "steps": progress.step,
        "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9)),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "test": evaluate(translator, test).to_json(),
        "peak_rss_mb": peak_memory_mb(),
        "settings": asdict(settings),
        "config": asdict(config),
    }
    if directory is not None:
        translator.save(directory, store_dtype)
        write_json(directory / RESULT_FILE, summary)
    return TrainingResult(translator, history, summary)


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
    identity = {"settings": asdict(settings), "config": asdict(trainer.model.config)}
    progress = Progress()
    if resume and directory is not None:
        saved = load_state(directory, trainer.model, trainer.optimizer)
        check_same_run(saved["identity"], identity)
        trainer.scaler.load_state_dict(saved["scaler"])
        progress = Progress(**saved["progress"])
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
                    score = evaluate(translator, valid).overall
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


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """What autocast computes in; None for plain fp32."""
    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


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
            if saved[part].get(name) != value:
                differences.append(f"{name} was {saved[part].get(name)!r}, is {value!r}")
    if differences:
        raise ValueError(f"the run began with other settings: {'; '.join(differences)}")


def _diverged(error: Exception, step: int, batch: Batch, directory: Path | None) -> str:
    kept = f"; the last good state is in {directory}" if directory is not None else ""
    return (
        f"training diverged at step {step}: {error}{kept}. The batch: {batch.describe()}. "
        "Try a lower learning_rate, more warmup_steps, or precision fp32"
    )
