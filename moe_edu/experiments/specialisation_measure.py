"""What every specialisation experiment measures: the routing of single tokens, and tables of them for a report.

Shapes: N tokens, E experts, G languages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_edu.analysis.specialisation import Information, coactivation, load_matrix, measure_information
from moe_edu.data import get_language

PERMUTATIONS = 20


@dataclass(frozen=True)
class RoutedTokens:
    """N tokens of many sentences, and the experts that one sparse layer chose for each.

    Padding, language tags and `</s>` are left out: a tag reveals its language.

    Attributes:
        num_experts: E.
        expert_index: `[N, 2]` int64, as in `RouterOutput`.
        sentence: `[N]` int64.
        language: `[N]` int64, an index into `languages`.
        token: `[N]` int64, the id that the model read.
        position: `[N]` int64, the position in the sentence.
        word: `[N]` int64, an index into `words`: what a reader sees of the token; -1 if nothing is visible.
        languages: G codes.
        words: texts.
    """

    num_experts: int
    expert_index: Tensor
    sentence: Tensor
    language: Tensor
    token: Tensor
    position: Tensor
    word: Tensor
    languages: tuple[str, ...]
    words: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.token)

    @property
    def first_choice(self) -> Tensor:
        return self.expert_index[:, 0]

    def select(self, where: Tensor) -> RoutedTokens:
        """Only the tokens where `where [N]` is True."""
        tensors = ("expert_index", "sentence", "language", "token", "position", "word")
        chosen = {name: getattr(self, name)[where] for name in tensors}
        return RoutedTokens(self.num_experts, **chosen, languages=self.languages, words=self.words)

    @classmethod
    def join(cls, parts: Sequence[RoutedTokens]) -> RoutedTokens:
        """The tokens of several batches, whose sentences have consecutive numbers."""
        tensors = ("expert_index", "sentence", "language", "token", "position", "word")
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in tensors}
        return cls(parts[0].num_experts, **joined, languages=parts[0].languages, words=parts[0].words)

    def load(self) -> Tensor:
        """First choices by language and expert: `[G, E]`."""
        return load_matrix(self.language, self.first_choice, len(self.languages), self.num_experts)


def measure_specialisation(tokens: RoutedTokens, permutations: int = PERMUTATIONS) -> dict[str, Information]:
    """What the first choice reveals about language, script, family, token and position.

    "language given token" is what it reveals about the language beyond what the token reveals.
    """
    expert = tokens.first_choice
    languages = [get_language(code) for code in tokens.languages]
    of_sentence = {
        "language": tokens.language,
        "script": _numbered(language.script for language in languages)[tokens.language],
        "family": _numbered(language.family for language in languages)[tokens.language],
    }
    measured = {
        name: measure_information(labels, expert, sentence=tokens.sentence, permutations=permutations)
        for name, labels in of_sentence.items()
    }
    for name, labels in (("token", tokens.token), ("position", tokens.position)):
        measured[name] = measure_information(labels, expert, permutations=permutations)
    measured["language given token"] = measure_information(
        tokens.language, expert, given=tokens.token, permutations=permutations
    )
    return measured


def _numbered(names: Iterable[str]) -> Tensor:
    """Each name's number in order of first appearance."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names])


def words_behind_cells(tokens: RoutedTokens, most: int = 4) -> list[list[list[str]]]:
    """The most frequent words of each language that chose each expert first: `[G][E]` lists, most frequent first."""
    cell = tokens.language * tokens.num_experts + tokens.first_choice
    seen = tokens.word >= 0
    pairs, counts = torch.stack([cell[seen], tokens.word[seen]]).unique(dim=1, return_counts=True)
    by_cell: dict[int, Counter[str]] = {}
    for (place, word), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
        by_cell.setdefault(place, Counter())[tokens.words[word]] += count
    E = tokens.num_experts
    return [
        [_most_common(by_cell.get(g * E + e, Counter()), most) for e in range(E)]
        for g in range(len(tokens.languages))
    ]


def _most_common(counts: Counter[str], most: int) -> list[str]:
    """Like `Counter.most_common`, with ties in alphabetical order."""
    return [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]]


def report(tokens: RoutedTokens, permutations: int = PERMUTATIONS, words: bool = False) -> dict[str, Any]:
    """One layer of one model as JSON: information, load by language, co-activation and, on request, words."""
    measured = measure_specialisation(tokens, permutations)
    result: dict[str, Any] = {
        "tokens": len(tokens),
        "information": information_json(measured),
        "load": tokens.load().tolist(),
        "coactivation": coactivation(tokens.expert_index, tokens.num_experts).tolist(),
    }
    return result | ({"words": words_behind_cells(tokens)} if words else {})


def information_json(measured: dict[str, Information]) -> dict[str, dict[str, float]]:
    """The information, rounded to a ten-thousandth of a bit."""
    return {
        name: {field: round(value, 4) for field, value in information._asdict().items()}
        for name, information in measured.items()
    }


def summary_line(name: str, information: dict[str, dict[str, float]]) -> str:
    """One layer's information on one line: bits, and those that chance gives in brackets."""
    parts = (
        f"{label} {values['bits']:.3f} ({values['chance']:.3f})" for label, values in information.items()
    )
    return f"{name:28} {', '.join(parts)}"
