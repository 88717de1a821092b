"""The whole translator and `transformers` with the same weights: training and generation in tokens per second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_edu.analysis.parity import relative_difference
from moe_edu.bench.report import write_json
from moe_edu.bench.timing import Timing, time_in_turn
from moe_edu.data import Batch, PairBatches, Tokenizer, eval_batches, load_corpus
from moe_edu.model.pretrained import load_pretrained
from moe_edu.model.translator import MoETranslator
from moe_edu.system.machine import Machine
from moe_edu.training.evaluation import sample_examples
from moe_edu.training.settings import TrainingSettings, small_config
from moe_edu.training.trainer import Trainer, start_workers
from moe_edu.training.workers import WorkerPool

OURS, REFERENCE = "moe_edu", "transformers"
TARGET = "eng_Latn"
LOGITS_TOLERANCE = 1e-4  # largest deviation of the logits, relative to the largest logit


@dataclass(frozen=True)
class Comparison:
    """Both contenders' timings of the same work, and its number of tokens without padding."""

    ours: Timing
    reference: Timing
    tokens: int

    @property
    def speedup(self) -> float:
        """Our speed as a multiple of transformers'."""
        return self.reference.median_ms / self.ours.median_ms


@dataclass(frozen=True)
class ModelResult:
    """`processes` is the number that our model ran in; transformers uses PyTorch's threads in one process."""

    training: Comparison
    generation: Comparison
    processes: int
    beams: int


def run_model_bench(
    *, batches: int, sentences: int, beams: int, repeats: int, processes: int | None, quick: bool = False
) -> ModelResult:
    """Train on `batches` batches of the shipped corpus and translate `sentences` sentences, both contenders in turn.

    Raises:
        ArithmeticError: the two models disagree before training.
        ImportError: transformers 4.57.6 is not installed.
    """
    if quick:
        batches, sentences, repeats = 1, 2, 1
    settings = TrainingSettings(vocab_size=600 if quick else 3000)
    corpus = load_corpus(["eng_Latn", "fra_Latn", "ell_Grek"] if quick else None)
    tokenizer = Tokenizer.train(corpus.train.texts(), corpus.languages, settings.vocab_size)
    torch.manual_seed(settings.seed)
    # transformers has no capacity factor.
    model = MoETranslator(small_config(vocab_size=len(tokenizer), expert_capacity_factor=1.0))

    # A trained model, since it ends its sentences.
    shipped = load_pretrained(device="cpu")
    pairs = sample_examples(load_corpus(), "valid", [TARGET], sentences, settings.seed)
    (source,) = eval_batches(pairs, shipped.tokenizer, batch_tokens=10**9)
    stream = PairBatches(corpus, tokenizer, batch_tokens=settings.batch_tokens, seed=settings.seed).stream()
    data = [next(stream) for _ in range(batches)]
    options = {
        "forced_bos_token_id": shipped.tokenizer.language_id(TARGET),
        "num_beams": beams,
        "max_new_tokens": 64,
    }
    threads = torch.get_num_threads()
    with start_workers(shipped.model, settings, processes) as workers:
        generation = _compare_generation(shipped.model, source, options, workers, threads, repeats)
    with start_workers(model, settings, processes) as workers:
        training = _compare_training(model, data, settings, workers, threads, repeats)
    return ModelResult(training, generation, 1 if workers is None else workers.count + 1, beams)


def make_reference(model: MoETranslator) -> nn.Module:
    """`NllbMoeForConditionalGeneration` with the weights of `model`.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

    fields = asdict(model.config)
    names = NllbMoeConfig().to_dict().keys() & fields.keys()
    reference = NllbMoeForConditionalGeneration(NllbMoeConfig(**{name: fields[name] for name in names}))
    # Only one state dict has the computed positions; equal logits show that everything else was loaded.
    reference.load_state_dict(model.hf_state_dict(), strict=False)
    return reference


def _compare_generation(
    model: MoETranslator,
    source: Batch,
    options: dict[str, Any],
    workers: WorkerPool | None,
    threads: int,
    repeats: int,
) -> Comparison:
    """Both translate the same sentences, transformers on `threads` threads."""
    reference: Any = make_reference(model).eval()
    model.eval()
    generate = model.generate if workers is None else workers.generate

    def ours() -> Tensor:
        return generate(source.source_ids, source.source_mask, **options)

    def theirs() -> Tensor:
        with on_threads(threads):
            return reference.generate(source.source_ids, attention_mask=source.source_mask, **options)

    _check_agreement(model, reference, source, ours(), theirs())
    timings = time_in_turn({OURS: ours, REFERENCE: theirs}, repeats)
    tokens = int((ours() != model.config.pad_token_id).sum())
    return Comparison(timings[OURS], timings[REFERENCE], tokens)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Compute on `count` CPU threads inside the `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_agreement(
    model: MoETranslator, reference: Any, source: Batch, ours: Tensor, theirs: Tensor
) -> None:
    inputs = (source.source_ids, source.source_mask, source.decoder_input_ids, source.decoder_mask)
    with torch.no_grad():
        logits = model(*inputs).logits
        expected = reference(
            input_ids=inputs[0],
            attention_mask=inputs[1],
            decoder_input_ids=inputs[2],
            decoder_attention_mask=inputs[3],
        ).logits
    real = source.decoder_mask.bool()
    error = relative_difference(logits[real], expected[real])
    if not error <= LOGITS_TOLERANCE:
        raise ArithmeticError(f"the logits of moe_edu and transformers differ by {error:.1e}")
    if not torch.equal(ours, theirs):
        raise ArithmeticError("moe_edu and transformers generate different translations")


def _compare_training(
    model: MoETranslator,
    data: Sequence[Batch],
    settings: TrainingSettings,
    workers: WorkerPool | None,
    threads: int,
    repeats: int,
) -> Comparison:
    """Both train on the same batches with AdamW and clipping, transformers on `threads` threads.

    Ours also balances its experts and keeps metrics.
    """
    reference = make_reference(model).train()
    optimizer = torch.optim.AdamW(reference.parameters(), settings.learning_rate, (0.9, 0.98), fused=True)
    trainer = Trainer(model, settings, workers=workers)

    def train_ours() -> None:
        for batch in data:
            trainer.step(batch, settings.learning_rate)

    def train_reference() -> None:
        with on_threads(threads):
            for batch in data:
                _reference_step(reference, optimizer, batch, settings)

    train_ours()
    train_reference()
    timings = time_in_turn({OURS: train_ours, REFERENCE: train_reference}, repeats)
    return Comparison(timings[OURS], timings[REFERENCE], sum(batch.num_tokens for batch in data))


def _reference_step(
    reference: Any, optimizer: torch.optim.Optimizer, batch: Batch, settings: TrainingSettings
) -> None:
    for module in reference.modules():
        if hasattr(module, "expert_capacity"):
            module.expert_capacity = None  # otherwise it keeps the first batch's capacity
    optimizer.zero_grad(set_to_none=True)
    logits = reference(
        input_ids=batch.source_ids,
        attention_mask=batch.source_mask,
        decoder_input_ids=batch.decoder_input_ids,
        decoder_attention_mask=batch.decoder_mask,
        use_cache=False,
    ).logits
    F.cross_entropy(logits[batch.decoder_mask.bool()], batch.labels[batch.decoder_mask.bool()]).backward()
    nn.utils.clip_grad_norm_(reference.parameters(), settings.clip_norm)
    optimizer.step()


def format_model_result(result: ModelResult) -> str:
    """The table: tokens per second from the medians, and the median, fastest and slowest time of a call."""
    lines = [f"{'':12} {'tokens/s':>10} {'transformers':>13} {'speedup':>8}   ms per call [fastest-slowest]"]
    for name, part in (("training", result.training), (f"beams {result.beams}", result.generation)):
        speeds = [part.tokens / timing.median_ms * 1e3 for timing in (part.ours, part.reference)]
        spreads = " and ".join(
            f"{t.median_ms:.0f} [{t.fastest_ms:.0f}-{t.slowest_ms:.0f}]" for t in (part.ours, part.reference)
        )
        lines.append(f"{name:12} {speeds[0]:10.0f} {speeds[1]:13.0f} {part.speedup:7.2f}x   {spreads}")
    lines.append(
        f"moe_edu runs in {result.processes} process(es), transformers in one with all threads. Training counts\n"
        "source and target tokens, generation the tokens written, both without padding."
    )
    return "\n".join(lines)


def write_model_json(path: Path, machine: Machine, result: ModelResult) -> None:
    """Every number in the table, and those it comes from."""
    speedups = {"training": result.training.speedup, "generation": result.generation.speedup}
    write_json(path, machine, result=asdict(result), speedup=speedups)
