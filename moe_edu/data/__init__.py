"""Languages, the shipped corpus and dictionary, your own text, the tokenizer, and batches for training."""

from moe_edu.data.batches import Batch, PairBatches, eval_batches
from moe_edu.data.corpus import Corpus, SentencePair, Table, load_corpus
from moe_edu.data.dictionary import Dictionary, Entry, load_dictionary
from moe_edu.data.languages import (
    Language,
    UnknownLanguageError,
    all_languages,
    get_language,
    require_languages,
)
from moe_edu.data.shipped import CorpusError
from moe_edu.data.text import normalize_text
from moe_edu.data.tokenizer import UNDETERMINED, Tokenizer, TokenizerError
from moe_edu.data.user_data import read_corpus, read_flores, read_tsv

__all__ = [
    "UNDETERMINED",
    "Batch",
    "Corpus",
    "CorpusError",
    "Dictionary",
    "Entry",
    "Language",
    "PairBatches",
    "SentencePair",
    "Table",
    "Tokenizer",
    "TokenizerError",
    "UnknownLanguageError",
    "all_languages",
    "eval_batches",
    "get_language",
    "load_corpus",
    "load_dictionary",
    "normalize_text",
    "read_corpus",
    "read_flores",
    "read_tsv",
    "require_languages",
]
