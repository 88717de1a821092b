"""The pocket dictionary: does a model with more experts remember more words, at equal work per word?

An encoder reads `[language] characters </s>`, its outputs are averaged, and a linear layer picks one of 400 concepts.
Two questions are asked: does it know the pairs it was trained on (recall), and can it name held-out words (by guessing
from languages with a similar spelling)?

Shapes: N names, B batch, S sequence, D model width, E experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from moe_edu.config import MoEConfig
from moe_edu.data.dictionary import Dictionary, Entry, load_dictionary
from moe_edu.data.splits import SPLITS
from moe_edu.experiments.sweep import count_parameters
from moe_edu.model.encoder import MoEEncoder
from moe_edu.moe.router_losses import load_balancing_loss, router_z_loss
from moe_edu.moe.routing import RouterOutput, count_per_expert

EOS, PAD, UNKNOWN = 0, 1, 2  # the ids before those of languages and characters
POOL_BATCHES = (
    8  # the names of this many batches are sorted by length together, which saves half of the padding
)
CURVE_EVERY = 50  # steps averaged into one point of the loss curve


@dataclass(frozen=True, kw_only=True)
class DictionarySettings:
    """One run.

    Attributes:
        experts: E of both layers; 1 makes the dense twin.
        dense_width: feed-forward width of the dense twin. A sparse layer runs two experts of `expert_width` per
            token, as much work as a dense layer of twice that width.
        expert_width: feed-forward width of each expert.
        steps: optimizer steps.
        seed: of weights and data order.
        learning_rate: the peak of the schedule: linear warm-up, then a cosine to zero.
        capacity_factor: training capacity of an expert over `2 * ceil(T / E)`, T counting padding; in evaluation
            nothing is dropped.
        balance: weight of the load-balancing loss.
        z: weight of the router z-loss.
    """

    experts: int = 8
    dense_width: int = 48
    expert_width: int = 24
    steps: int = 1500
    seed: int = 0
    learning_rate: float = 2e-2
    capacity_factor: float = 2.0
    balance: float = 0.01
    z: float = 0.001
    batch: int = 512
    warmup: int = 100
    clip: float = 1.0
    d_model: int = 24
    heads: int = 2
    layers: int = 2
    init_std: float = 0.2


class EncodedNames(NamedTuple):
    """Names as padded ids `[N, S]`, their lengths `[N]`, and the concepts they stand for `[N]`, all int64."""

    ids: Tensor
    lengths: Tensor
    concepts: Tensor

    def take(self, rows: Tensor) -> EncodedNames:
        """The names in `rows`, with no more padding than the longest of them needs."""
        lengths = self.lengths[rows]
        return EncodedNames(self.ids[rows, : int(lengths.max())], lengths, self.concepts[rows])


class Spelling:
    """Ids for the languages of a dictionary and for the characters of its training names."""

    def __init__(self, dictionary: Dictionary) -> None:
        characters = sorted({character for entry in dictionary.train for character in entry.name})
        symbols = [*dictionary.languages, *characters]
        self.ids = {symbol: UNKNOWN + 1 + i for i, symbol in enumerate(symbols)}
        self.size = UNKNOWN + 1 + len(symbols)

    def encode(self, entries: Sequence[Entry]) -> EncodedNames:
        """`[language] characters </s>`, padded to the longest; a character not seen in training becomes UNKNOWN."""
        rows = [
            [self.ids[entry.language], *(self.ids.get(c, UNKNOWN) for c in entry.name), EOS]
            for entry in entries
        ]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, PAD)
        lengths = torch.tensor([len(row) for row in rows])
        return EncodedNames(ids, lengths, torch.tensor([entry.concept for entry in entries]))


class ConceptClassifier(nn.Module):
    """A sparse (or dense) encoder, the mean of its outputs, and a linear layer over the concepts."""

    def __init__(self, settings: DictionarySettings, vocab_size: int, num_concepts: int) -> None:
        super().__init__()
        self.encoder = MoEEncoder(make_config(settings, vocab_size))
        self.head = nn.Linear(settings.d_model, num_concepts)

    def forward(self, ids: Tensor) -> tuple[Tensor, tuple[RouterOutput, ...]]:
        """`ids [B, S]` -> logits `[B, concepts]` and the routing of the sparse layers."""
        words = ids != PAD
        output = self.encoder(ids, words)
        mean = (output.last_hidden_state * words[:, :, None]).sum(1) / words.sum(1, keepdim=True)
        return self.head(mean), tuple(layer for layer in output.routing if layer is not None)


def make_config(settings: DictionarySettings, vocab_size: int) -> MoEConfig:
    """The encoder's configuration: both layers sparse, or both dense if there is one expert."""
    dense = settings.experts == 1
    return MoEConfig(
        vocab_size=vocab_size,
        max_position_embeddings=32,
        d_model=settings.d_model,
        encoder_layers=settings.layers,
        encoder_attention_heads=settings.heads,
        decoder_attention_heads=settings.heads,
        encoder_ffn_dim=settings.dense_width if dense else settings.expert_width,
        encoder_sparse_step=0 if dense else 1,
        encoder_layerdrop=0.0,
        num_experts=settings.experts,
        expert_capacity_factor=settings.capacity_factor,
        moe_token_dropout=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=settings.init_std,
        pad_token_id=PAD,
    )


class TrainedModel(NamedTuple):
    """A trained model, its data and its settings.

    `loss_curve` is the cross-entropy averaged over every `CURVE_EVERY` steps; `cpu_seconds` is the processor time of
    training.
    """

    model: ConceptClassifier
    settings: DictionarySettings
    dictionary: Dictionary
    spelling: Spelling
    loss_curve: list[float]
    cpu_seconds: float


def run(
    settings: DictionarySettings, dictionary: Dictionary | None = None, show_progress: bool = False
) -> dict[str, Any]:
    """Train one model and examine it: `examine(train_model(...))`."""
    return examine(train_model(settings, dictionary, show_progress))


def train_model(
    settings: DictionarySettings, dictionary: Dictionary | None = None, show_progress: bool = False
) -> TrainedModel:
    """Train one model on `dictionary` (None: the shipped one). The caller's random state does not change."""
    dictionary = load_dictionary() if dictionary is None else dictionary
    spelling = Spelling(dictionary)
    names = spelling.encode(dictionary.train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = ConceptClassifier(settings, spelling.size, len(dictionary.concepts))
        started = time.process_time()
        curve = train(model, names, settings, show_progress)
        seconds = time.process_time() - started
    return TrainedModel(model, settings, dictionary, spelling, curve, seconds)


def examine(trained: TrainedModel) -> dict[str, Any]:
    """What a trained model knows, in JSON values.

    Returns:
        the settings; all parameters and the active ones (on a token's path); recall of the training names; accuracy on
        the valid and test names, and on those test names whose spelling no training name of the same concept has;
        processor seconds and loss curve; and, for a sparse model, the share of choices that the training capacity
        drops and the share of first choices that the busiest expert of each layer takes.
    """
    model, settings, dictionary, spelling, curve, seconds = trained
    names = {split: spelling.encode(dictionary.split(split)) for split in SPLITS}
    right = {split: named_right(model, names[split]) for split in SPLITS}
    total, active = count_parameters(model, settings.experts)
    return {
        "settings": asdict(settings),
        "parameters": total,
        "active_parameters": active,
        "recall": share(right["train"]),
        "valid": share(right["valid"]),
        "test": share(right["test"]),
        "test_new_spelling": share(right["test"][new_spellings(dictionary)]),
        "cpu_seconds": seconds,
        "loss_curve": curve,
        **routing_summary(model, names["train"]),
    }


def share(right: Tensor) -> float:
    """The share of `right [N]` bool that is True."""
    return right.float().mean().item()


def train(
    model: ConceptClassifier, names: EncodedNames, settings: DictionarySettings, show_progress: bool
) -> list[float]:
    """Train in place; returns the cross-entropy, averaged over every `CURVE_EVERY` steps."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(settings.seed)
    batches = shuffled_batches(names, settings.batch, generator)
    curve, running = [], 0.0
    model.train()
    for step in tqdm(range(settings.steps), disable=not show_progress, leave=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(settings, step)
        batch = next(batches)
        logits, routing = model(batch.ids)
        cross_entropy = F.cross_entropy(logits, batch.concepts)
        loss = cross_entropy
        for layer in routing:
            balance = load_balancing_loss(layer.probs, layer.expert_index, layer.padding)
            loss = loss + settings.balance / len(routing) * balance
            loss = loss + settings.z / len(routing) * router_z_loss(layer.logits, layer.padding)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        running += cross_entropy.item()
        if (step + 1) % CURVE_EVERY == 0:
            curve.append(running / CURVE_EVERY)
            running = 0.0
    return curve


def learning_rate_at(settings: DictionarySettings, step: int) -> float:
    """The learning rate at the 0-based `step`."""
    warmup = min(1.0, (step + 1) / max(settings.warmup, 1))
    return settings.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def shuffled_batches(names: EncodedNames, size: int, generator: torch.Generator) -> Iterator[EncodedNames]:
    """Endless batches of `size` names: shuffled each epoch, then sorted by length within pools of a few batches."""
    while True:
        order = torch.randperm(len(names.lengths), generator=generator)
        for pool in order.split(size * POOL_BATCHES):
            by_length = pool[names.lengths[pool].argsort(stable=True)]
            whole = [rows for rows in by_length.split(size) if len(rows) == size]
            for i in torch.randperm(len(whole), generator=generator).tolist():
                yield names.take(whole[i])


@torch.inference_mode()
def named_right(model: ConceptClassifier, names: EncodedNames) -> Tensor:
    """`[N]` bool: the names whose concept the model, in evaluation, ranks first."""
    model.eval()
    return torch.cat([model(b.ids)[0].argmax(1) == b.concepts for b in in_order(names)])


def in_order(names: EncodedNames) -> Iterator[EncodedNames]:
    for rows in torch.arange(len(names.lengths)).split(1024):
        yield names.take(rows)


def new_spellings(dictionary: Dictionary) -> Tensor:
    """`[N]` bool over the test names: no training name of the concept has this spelling in any language."""
    known = {(entry.concept, entry.name.casefold()) for entry in dictionary.train}
    return torch.tensor([(entry.concept, entry.name.casefold()) not in known for entry in dictionary.test])


@torch.inference_mode()
def routing_summary(model: ConceptClassifier, names: EncodedNames) -> dict[str, Any]:
    """What the training capacity drops and how uneven the first choices are; empty for a dense model."""
    model.train()  # to use the training capacity; there is no dropout
    made = kept = 0
    firsts: list[Tensor] = []
    by_length = names.lengths.argsort(stable=True)
    for rows in by_length.split(512):
        routing = model(names.take(rows).ids)[1]
        if not routing:
            return {}
        made += sum(int((layer.expert_index >= 0).sum()) for layer in routing)
        kept += sum(int(layer.kept.sum()) for layer in routing)
        firsts.append(torch.stack([count_per_expert(r.expert_index[:, 0], r.num_experts) for r in routing]))
    loads = torch.stack(firsts).sum(0).double()  # [layers, E]
    return {
        "dropped_choices": 1 - kept / made,
        "busiest_expert": (loads / loads.sum(1, keepdim=True)).amax(1).tolist(),
    }
