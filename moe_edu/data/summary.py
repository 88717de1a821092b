"""The size of the corpus: `python -m moe_edu.data.summary [folder or TSV]`."""

from __future__ import annotations

import sys

from moe_edu.data.corpus import Corpus, load_corpus
from moe_edu.data.languages import get_language
from moe_edu.data.shipped import CorpusError
from moe_edu.data.splits import SPLITS
from moe_edu.data.tokenizer import Tokenizer
from moe_edu.data.user_data import read_corpus


def corpus_summary(corpus: Corpus | None = None) -> str:
    """Count meanings, sentences and tokens of a corpus, by split and kind. Default: the shipped one.

    Tokens come from a tokenizer of the default size, trained on the training split. They include the language tag and
    `</s>`, as the model reads them.
    """
    corpus = corpus or load_corpus()
    languages = [get_language(code) for code in corpus.languages]
    tokenizer = Tokenizer.train(corpus.train.texts(), corpus.languages)
    lines = [
        f"corpus {corpus.name}: {len(languages)} languages, {len({x.script for x in languages})} scripts, "
        f"{len({x.family for x in languages})} families",
        f"{'split':<6} {'meanings':>9} {'sentences':>10} {'missing':>8} {'words':>6} {'chars':>6} {'tokens':>7}"
        "   (the last three: means per sentence)",
    ]
    for split in SPLITS:
        table = corpus.split(split)
        texts = list(table.texts())
        cells = len(table) * len(languages)
        words, chars = (sum(map(len, items)) / len(texts) for items in (map(str.split, texts), texts))
        tokens = 2 + sum(map(len, tokenizer.encode_pieces(texts))) / len(texts)
        lines.append(
            f"{split:<6} {len(table):>9,} {len(texts):>10,} {1 - len(texts) / cells:>8.1%}"
            f" {words:>6.1f} {chars:>6.1f} {tokens:>7.1f}"
        )
    lines.append("meanings by kind: " + ", ".join(f"{kind} {n:,}" for kind, n in count_kinds(corpus).items()))
    lines.append("languages: " + ", ".join(f"{x.code} ({x.name})" for x in languages))
    return "\n".join(lines)


def count_kinds(corpus: Corpus) -> dict[str, int]:
    """How many meanings of each kind there are in all splits."""
    kinds = [kind for split in SPLITS for kind in corpus.split(split).kinds]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


if __name__ == "__main__":
    try:
        print(corpus_summary(read_corpus(sys.argv[1]) if len(sys.argv) > 1 else None))
    except CorpusError as error:
        sys.exit(f"Error: {error}")
