"""What the letter model can still restore without some experts: without one at a time, or all but a few.

Shapes: N tokens, E experts, G languages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_edu.analysis.specialisation import (
    Ablation,
    load_matrix,
    mean_by_label,
    rank_by_activity,
    without_experts,
)
from moe_edu.experiments.specialisation_letters import (
    Alphabet,
    LetterModel,
    Sentence,
    letter_logits,
    make_test_batch,
)
from moe_edu.experiments.specialisation_measure import RoutedTokens
from moe_edu.moe.layer import SparseMLP

BATCH_SENTENCES = 256


@dataclass(frozen=True)
class LetterPass:
    """One pass over masked sentences.

    Attributes:
        tokens: the letters, digits, signs and spaces of all sentences.
        masked: `[N]` bool, the hidden ones.
        restored: `[N]` bool, the hidden ones that were named correctly.
    """

    tokens: RoutedTokens
    masked: Tensor
    restored: Tensor

    def accuracy(self) -> float:
        """Share of the masked letters that were restored."""
        return float(self.restored.sum() / self.masked.sum().clamp(min=1))

    def accuracy_by_language(self) -> Tensor:
        """The same for each language: `[G]` float64."""
        tokens = self.tokens
        return mean_by_label(self.restored[self.masked], tokens.language[self.masked], len(tokens.languages))


@torch.no_grad()
def run_letters(
    model: LetterModel, sentences: Sequence[Sentence], mask_share: float = 0.4, seed: int = 0
) -> LetterPass:
    """Mask `sentences`, restore them and record the routing. The same letters are masked for every model."""
    alphabet, encoder = model.alphabet, model.encoder
    words = WordIndex(alphabet)
    parts, masked, restored = [], [], []
    for start in range(0, len(sentences), BATCH_SENTENCES):
        chosen = sentences[start : start + BATCH_SENTENCES]
        batch = make_test_batch(chosen, alphabet, mask_share, seed)
        inputs = batch.inputs(alphabet)
        output = encoder(inputs, batch.attention_mask)
        guess = torch.zeros_like(batch.ids)
        guess[batch.masked] = letter_logits(encoder, output.last_hidden_state[batch.masked]).argmax(-1)
        text = (batch.ids >= alphabet.first_letter) | (batch.ids == alphabet.unk_id)
        routing = next((layer for layer in reversed(output.routing) if layer is not None), None)
        B, S = batch.ids.shape
        language = torch.tensor([alphabet.languages.index(s.language) for s in chosen])
        parts.append(
            RoutedTokens(
                # A dense layer is one expert that every token chooses.
                num_experts=1 if routing is None else routing.num_experts,
                expert_index=torch.tensor([[0, -1]]).expand(int(text.sum()), 2)
                if routing is None
                else routing.expert_index[text.flatten()],
                sentence=(torch.arange(B)[:, None] + start).expand(B, S)[text],
                language=language[:, None].expand(B, S)[text],
                token=inputs[text],
                position=torch.arange(S).expand(B, S)[text],
                word=words.of_sentences([s.text for s in chosen], S)[text],
                languages=alphabet.languages,
                words=(),
            )
        )
        masked.append(batch.masked[text])
        restored.append((guess == batch.ids)[text] & batch.masked[text])
    tokens = replace(RoutedTokens.join(parts), words=words.words())
    return LetterPass(tokens, torch.cat(masked), torch.cat(restored))


class WordIndex:
    """Gives each distinct word an index: each run of letters, and each single digit or sign; spaces do not count."""

    def __init__(self, alphabet: Alphabet) -> None:
        self._letters = {
            char for char, flag in zip(alphabet.names, alphabet.maskable.tolist(), strict=True) if flag
        }
        self._numbers: dict[str, int] = {}

    def of_sentences(self, texts: Sequence[str], width: int) -> Tensor:
        """`[B, width]` int64: the word of each letter, after a tag; -1 for what is in no word."""
        result = torch.full((len(texts), width), -1)
        for row, text in enumerate(texts):
            numbers = [number for word in self._split(text) for number in [self._number(word)] * len(word)]
            result[row, 1 : len(numbers) + 1] = torch.tensor(numbers)
        return result

    def words(self) -> tuple[str, ...]:
        return tuple(self._numbers)

    def _number(self, word: str) -> int:
        return -1 if word == " " else self._numbers.setdefault(word, len(self._numbers))

    def _split(self, text: str) -> Iterator[str]:
        word = ""
        for char in text:
            if char in self._letters:
                word += char
                continue
            if word:
                yield word
            word = ""
            yield char
        if word:
            yield word


def sparse_layer(model: LetterModel) -> SparseMLP:
    """The encoder's last sparse layer.

    Raises:
        ValueError: it has none.
    """
    for layer in reversed(model.encoder.layers):
        if isinstance(layer.ffn, SparseMLP):
            return layer.ffn
    raise ValueError("this model has no sparse layer, so there are no experts to leave out")


def ablate_each(model: LetterModel, sentences: Sequence[Sentence], how: Ablation) -> Tensor:
    """Accuracy by language with each expert removed in turn: `[E, G]`."""
    layer = sparse_layer(model)
    rows = []
    for expert in range(layer.config.num_experts):
        with without_experts(layer, [expert], how):
            rows.append(run_letters(model, sentences).accuracy_by_language())
    return torch.stack(rows)


def ablation_report(model: LetterModel, sentences: Sequence[Sentence], how: Ablation) -> dict[str, Any]:
    """What each missing expert costs each language, compared with how much the language used it.

    Returns:
        drop: `[E][G]`, accuracy lost; correlation of the drop with the share of the language's tokens that chose the
        expert first, over all pairs of expert and language; the mean drop of the language that used each expert
        most, and of all the others.
    """
    whole = run_letters(model, sentences)
    drop = whole.accuracy_by_language()[None] - ablate_each(model, sentences, how)  # [E, G]
    load = whole.tokens.load().double().T
    share = load / load.sum(dim=0, keepdim=True)  # [E, G], each column sums to 1
    fan = share.argmax(dim=1, keepdim=True)
    others = torch.ones_like(drop).scatter(1, fan, 0.0)
    return {
        "drop": [[round(value, 4) for value in row] for row in drop.tolist()],
        "correlation_of_drop_and_use": round(_correlation(drop, share), 4),
        "mean_drop_of_the_heaviest_user": round(float(drop.gather(1, fan).mean()), 4),
        "mean_drop_of_the_others": round(float((drop * others).sum() / others.sum()), 4),
    }


def _correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's r over all cells; 0 if one side does not vary."""
    r = float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1])
    return r if math.isfinite(r) else 0.0


def prune(
    model: LetterModel,
    valid: Sequence[Sentence],
    test: Sequence[Sentence],
    keep: Iterable[int],
    random_draws: int = 5,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Accuracy on `test` when only some experts are kept and every token takes the best two of those.

    The experts to keep are chosen on `valid`: the most active over all languages; each language's own most active ones;
    or, as a control, the same number drawn at random.

    Returns:
        For each number in `keep`: "experts", "most_active", "most_active_of_each_language", and "random", a list.
    """
    layer = sparse_layer(model)
    E, G = layer.config.num_experts, len(model.alphabet.languages)
    seen = run_letters(model, valid).tokens
    load = load_matrix(seen.language.repeat_interleave(2), seen.expert_index.flatten(), G, E)
    generator = torch.Generator().manual_seed(seed)

    def accuracy(kept: Sequence[int], sentences: Sequence[Sentence]) -> LetterPass:
        with without_experts(layer, sorted(set(range(E)) - set(kept))):
            return run_letters(model, sentences)

    rows = []
    for n in keep:
        own = [
            accuracy(
                rank_by_activity(load[g])[:n], [s for s in test if s.language == model.alphabet.languages[g]]
            )
            for g in range(G)
        ]
        rows.append(
            {
                "experts": n,
                "most_active": round(accuracy(rank_by_activity(load)[:n], test).accuracy(), 4),
                "most_active_of_each_language": round(
                    sum(float(p.restored.sum()) for p in own) / sum(float(p.masked.sum()) for p in own), 4
                ),
                "random": [
                    round(accuracy(torch.randperm(E, generator=generator)[:n].tolist(), test).accuracy(), 4)
                    for _ in range(random_draws)
                ],
            }
        )
    return rows
