"""An encoder that restores masked letters in many languages, small enough to train in a minute.

It reads `[language] letters </s>`, one letter per token, with a share of the letters replaced by `_`, and names these
(masked language modelling, Devlin et al. 2019, without its replaced or kept tokens). Its second layer has experts.
Digits, signs and spaces are never masked: they cannot be guessed.

Shapes: B sentences, S tokens, M masked letters, D model width, V alphabet.
"""

from __future__ import annotations

import json
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from moe_edu.config import MoEConfig
from moe_edu.data import Table, normalize_text, require_languages
from moe_edu.data.batches import cut_batches
from moe_edu.model.checkpoint import CheckpointError
from moe_edu.model.encoder import EncoderOutput, MoEEncoder
from moe_edu.model.pretrained import pad_ids
from moe_edu.moe.losses import SpecialLossNormalizingFactor, moe_loss
from moe_edu.moe.metrics import collect_metrics
from moe_edu.training.loop import learning_rate_at
from moe_edu.training.settings import TrainingSettings

MASK = "_"
SHIPPED = Path(__file__).parent / "results" / "specialisation_letters.safetensors"

_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", MASK)
_POOL = 2048  # sentences sorted by length together


@dataclass(frozen=True)
class Alphabet:
    """Ids of the special tokens, one tag per language, and the letters, in this order."""

    languages: tuple[str, ...]
    letters: tuple[str, ...]

    pad_id, eos_id, unk_id, mask_id = 1, 2, 3, 4

    @classmethod
    def learn(cls, table: Table, at_least: int = 10) -> Alphabet:
        """Every character that occurs at least `at_least` times in `table`, in Unicode order, without `_`."""
        counts = Counter(char for text in table.texts() for char in text)
        letters = sorted(char for char, n in counts.items() if n >= at_least and char != MASK)
        return cls(table.languages, tuple(letters))

    def __len__(self) -> int:
        return self.first_letter + len(self.letters)

    @property
    def first_letter(self) -> int:
        return len(_SPECIALS) + len(self.languages)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What each id stands for."""
        return (*_SPECIALS, *self.languages, *self.letters)

    @cached_property
    def maskable(self) -> Tensor:
        """`[V]` bool: letters, and the vowel signs of scripts that write vowels as marks."""
        flags = [unicodedata.category(char)[0] in "LM" for char in self.letters]
        return torch.tensor([False] * self.first_letter + flags)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {char: i for i, char in enumerate(self.letters, start=self.first_letter)} | {
            MASK: self.mask_id
        }

    def encode(self, text: str, language: str) -> list[int]:
        """`[language] letters </s>`; a letter that the alphabet lacks becomes `<unk>`, and `_` is a masked letter.

        Raises:
            UnknownLanguageError: the model was not trained on `language`.
        """
        require_languages([language], self.languages, "this model")
        tag = len(_SPECIALS) + self.languages.index(language)
        return [tag, *(self._ids.get(char, self.unk_id) for char in normalize_text(text)), self.eos_id]


class Sentence(NamedTuple):
    text: str
    language: str


class LetterBatch(NamedTuple):
    """B sentences.

    ids: `[B, S]` int64, as written; masked: `[B, S]` bool, the letters to restore; attention_mask: `[B, S]`, 1 for
    tokens, 0 for padding.
    """

    ids: Tensor
    masked: Tensor
    attention_mask: Tensor

    def inputs(self, alphabet: Alphabet) -> Tensor:
        """What the encoder reads: `ids` with the masked letters hidden."""
        return self.ids.masked_fill(self.masked, alphabet.mask_id)


def sentences_of(table: Table) -> list[Sentence]:
    """Every sentence of every language, row by row."""
    return [
        Sentence(normalize_text(text), language)
        for row in table.rows
        for language, text in zip(table.languages, row, strict=True)
        if text is not None
    ]


def make_batch(
    rows: Sequence[Sequence[int]], alphabet: Alphabet, share: float, generator: torch.Generator
) -> LetterBatch:
    """Pad `rows` and mask each of their letters with probability `share`."""
    ids, attention_mask = pad_ids(rows, alphabet.pad_id, torch.device("cpu"))
    masked = alphabet.maskable[ids] & (torch.rand(ids.shape, generator=generator) < share)
    return LetterBatch(ids, masked, attention_mask)


def make_test_batch(
    sentences: Sequence[Sentence], alphabet: Alphabet, share: float, seed: int = 0
) -> LetterBatch:
    """Like `make_batch`, but the letters masked in a sentence depend only on that sentence and the seed."""
    generator = torch.Generator()
    rows = [alphabet.encode(*sentence) for sentence in sentences]
    ids, attention_mask = pad_ids(rows, alphabet.pad_id, torch.device("cpu"))
    draws = torch.ones(ids.shape)
    for i, (sentence, row) in enumerate(zip(sentences, rows, strict=True)):
        generator.manual_seed(zlib.crc32(f"{seed} {sentence.language} {sentence.text}".encode()))
        draws[i, : len(row)] = torch.rand(len(row), generator=generator)
    return LetterBatch(ids, alphabet.maskable[ids] & (draws < share), attention_mask)


def stream_batches(
    rows: Sequence[Sequence[int]], alphabet: Alphabet, share: float, batch_tokens: int, seed: int
) -> Iterator[LetterBatch]:
    """Endless shuffled batches of at most `batch_tokens` tokens, padding included, with new masks each time."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    widths = np.array([len(row) for row in rows])
    while True:
        order: NDArray[np.int64] = rng.permutation(len(rows))
        order = order[np.lexsort((widths[order], np.arange(len(order)) // _POOL))]
        edges = list(pairwise(cut_batches(widths[order].tolist(), batch_tokens)))
        for b in rng.permutation(len(edges)):
            start, end = edges[b]
            yield make_batch([rows[i] for i in order[start:end]], alphabet, share, generator)


def letter_config(alphabet: Alphabet, **fields: Any) -> MoEConfig:
    """The encoder's configuration: two layers, the second with 16 experts; `fields` override it."""
    defaults: dict[str, Any] = {
        "vocab_size": len(alphabet),
        "max_position_embeddings": 128,
        "d_model": 64,
        "encoder_layers": 2,
        "encoder_ffn_dim": 128,
        "encoder_attention_heads": 4,
        "encoder_sparse_step": 2,
        "encoder_layerdrop": 0.0,
        "decoder_layers": 0,
        "num_experts": 16,
        "expert_capacity_factor": 1.25,
        "moe_token_dropout": 0.0,
        "router_aux_loss_coef": 0.01,
        "router_z_loss_coef": 0.001,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "init_std": 0.1,
    }
    return MoEConfig(**{**defaults, **fields})


@dataclass(frozen=True)
class LetterModel:
    """An encoder in eval mode and its alphabet."""

    encoder: MoEEncoder
    alphabet: Alphabet

    @torch.no_grad()
    def restore(self, text: str, language: str) -> str:
        """Replace every `_` in `text` by the most likely letter.

        Raises:
            UnknownLanguageError: the model was not trained on `language`.
            ValueError: the text is longer than the model's positions.
        """
        ids, mask = pad_ids([self.alphabet.encode(text, language)], self.alphabet.pad_id, torch.device("cpu"))
        logits = letter_logits(self.encoder, self.encoder(ids, mask).last_hidden_state[0, 1:-1])
        guesses = (logits[:, self.alphabet.first_letter :].argmax(-1) + self.alphabet.first_letter).tolist()
        written = normalize_text(text)
        return "".join(
            self.alphabet.names[guess] if char == MASK else char
            for char, guess in zip(written, guesses, strict=True)
        )

    def save(self, path: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write one safetensors file with the weights, and with configuration and alphabet in its header."""
        header = {"config": asdict(self.encoder.config), "alphabet": asdict(self.alphabet)}
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in self.encoder.state_dict().items()}
        save_file(tensors, path, metadata={name: json.dumps(value) for name, value in header.items()})


def load_letter_model(path: str | Path = SHIPPED) -> LetterModel:
    """The trained model that ships, or one that `LetterModel.save` wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            header = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
        alphabet = Alphabet(**{name: tuple(values) for name, values in header["alphabet"].items()})
        encoder = MoEEncoder(MoEConfig(**header["config"]))
        encoder.load_state_dict(tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a readable letter model: {error}") from error
    return LetterModel(encoder.eval(), alphabet)


def untrained_twin(model: LetterModel, seed: int = 0) -> LetterModel:
    """A model of the same shape with new random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return replace(model, encoder=MoEEncoder(model.encoder.config).eval())


def letter_logits(encoder: MoEEncoder, hidden: Tensor) -> Tensor:
    """Scores `[..., V]` of the alphabet for `hidden [..., D]`, using the embedding that also reads the letters."""
    return F.linear(hidden, encoder.embed_tokens.weight)


def train_letter_model(
    table: Table,
    alphabet: Alphabet,
    settings: TrainingSettings,
    *,
    mask_share: float = 0.4,
    config: MoEConfig | None = None,
) -> LetterModel:
    """Train on `table`; `settings` gives steps, seed, batch tokens and the schedule."""
    rows = [alphabet.encode(*sentence) for sentence in sentences_of(table)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        encoder = MoEEncoder(config or letter_config(alphabet)).train()
    optimizer = torch.optim.AdamW(
        encoder.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    batches = stream_batches(rows, alphabet, mask_share, settings.batch_tokens, settings.seed)
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(settings, step, step / settings.steps)
        batch = next(batches)
        optimizer.zero_grad(set_to_none=True)
        letter_loss(encoder, batch, alphabet).backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), settings.clip_norm)
        optimizer.step()
    return LetterModel(encoder.eval(), alphabet)


def letter_loss(encoder: MoEEncoder, batch: LetterBatch, alphabet: Alphabet) -> Tensor:
    """Cross-entropy of the masked letters plus the router losses, a scalar."""
    output: EncoderOutput = encoder(batch.inputs(alphabet), batch.attention_mask)
    logits = letter_logits(encoder, output.last_hidden_state[batch.masked])
    metrics = collect_metrics(output.routing)
    return moe_loss(
        logits[None],
        batch.ids[batch.masked][None],
        expert_metrics=metrics,
        router_aux_loss_coef=encoder.config.router_aux_loss_coef if metrics else 0.0,
        router_z_loss_coef=encoder.config.router_z_loss_coef if metrics else 0.0,
        loss_normalizing_factor=SpecialLossNormalizingFactor.NUM_REAL_TARGET_TOKENS,
    ).total
