import hashlib
import re
from importlib.resources import files

import pytest

from moe_edu.data import CorpusError, UnknownLanguageError, get_language, load_corpus, normalize_text
from moe_edu.data.cldr import vocabulary
from moe_edu.data.corpus import CHECKSUM_FILE, CORPUS_FILE, make_corpus, parse_shipped
from moe_edu.data.splits import SPLITS

FILES = files("moe_edu.data").joinpath("files")


@pytest.fixture(scope="module")
def corpus():
    return load_corpus()


@pytest.fixture
def small():
    rows = [
        ["train", "date", "one", "un", ""],
        ["train", "unit", "two", "deux", "zwei"],
        ["valid", "unit", "", "trois", "drei"],
        ["test", "date", "four", "quatre", "vier"],
    ]
    return make_corpus("small", ("eng_Latn", "fra_Latn", "deu_Latn"), rows)


def test_its_size_and_variety_are_as_promised(corpus):
    languages = [get_language(code) for code in corpus.languages]
    assert len(languages) >= 34
    assert len({language.script for language in languages}) >= 10
    assert {"eng_Latn", "fra_Latn", "deu_Latn", "spa_Latn", "por_Latn", "zho_Hans"} <= set(corpus.languages)
    assert sum(len(corpus.split(name)) for name in SPLITS) >= 6000
    kinds = set(corpus.train.kinds)
    assert kinds == {
        "date", "date_time", "unit", "two_units", "relative_time", "countries", "languages", "money",
    }  # fmt: skip
    assert set(corpus.valid.kinds) == set(corpus.test.kinds) == kinds
    assert 800_000 < len(FILES.joinpath(CORPUS_FILE).read_bytes()) < 1_100_000


def test_no_sentence_of_any_language_is_in_two_splits(corpus):
    train, valid, test = (set(corpus.split(name).texts()) for name in SPLITS)
    assert not train & test
    assert not train & valid
    assert not valid & test


def test_every_sentence_is_clean_text(corpus):
    raw_ids = re.compile("|".join(map(re.escape, vocabulary().units)))
    for name in SPLITS:
        for text in corpus.split(name).texts():
            assert text == normalize_text(text)
            assert not raw_ids.search(text)


def test_the_portuguese_example_has_the_style_of_the_corpus(corpus):
    dates = [
        text
        for text, kind in zip(corpus.train.column("por_Latn"), corpus.train.kinds, strict=True)
        if kind == "date"
    ]
    assert any(re.fullmatch(r"quinta-feira, \d+ de \w+ de \d{4}", text) for text in dates)


def test_licence_and_checksum_ship():
    licence = FILES.joinpath("LICENSE-UNICODE.txt").read_text(encoding="utf-8")
    assert "UNICODE LICENSE V3" in licence
    assert "Unicode, Inc." in licence
    digest = hashlib.sha256(FILES.joinpath(CORPUS_FILE).read_bytes()).hexdigest()
    assert FILES.joinpath(CHECKSUM_FILE).read_text() == f"{digest}  {CORPUS_FILE}\n"


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:1000] + b"?" + d[1001:], lambda d: b""])
def test_a_damaged_file_is_refused(damage):
    data, checksum = FILES.joinpath(CORPUS_FILE).read_bytes(), FILES.joinpath(CHECKSUM_FILE).read_text()
    assert damage(data) != data
    with pytest.raises(CorpusError, match=r"damaged.*moe_edu\.data\.build"):
        parse_shipped(damage(data), checksum)


def test_columns_and_pairs(small):
    assert small.train.column("deu_Latn") == (None, "zwei")
    assert small.pairs("train", "eng_Latn", "deu_Latn") == [("two", "zwei")]
    assert small.pairs("test", "deu_Latn", "fra_Latn") == [("vier", "quatre")]
    found = small.sentence_pairs("train", targets=["eng_Latn", "deu_Latn"])
    assert [(p.source, p.target, p.source_language, p.target_language, p.kind) for p in found] == [
        ("un", "one", "fra_Latn", "eng_Latn", "date"),
        ("two", "zwei", "eng_Latn", "deu_Latn", "unit"),
        ("deux", "two", "fra_Latn", "eng_Latn", "unit"),
        ("deux", "zwei", "fra_Latn", "deu_Latn", "unit"),
        ("zwei", "two", "deu_Latn", "eng_Latn", "unit"),
    ]
    assert list(small.valid.texts()) == ["trois", "drei"]


def test_the_shipped_table_is_aligned(corpus):
    pairs = corpus.pairs("train", "fra_Latn", "eng_Latn")
    year = re.compile(r"\b(?:19|20)\d\d\b")
    dated = [(fra, eng) for fra, eng in pairs if year.search(fra) and year.search(eng)]
    assert len(dated) > 1000
    assert all(year.findall(fra) == year.findall(eng) for fra, eng in dated)


def test_restriction(small):
    two = small.restrict(["deu_Latn", "eng_Latn"])
    assert two.languages == two.test.languages == ("deu_Latn", "eng_Latn")
    assert two.train.rows == ((None, "one"), ("zwei", "two"))
    assert two.train.kinds == small.train.kinds
    for wrong in (["eng_Latn"], ["eng_Latn", "eng_Latn"], []):
        with pytest.raises(ValueError, match="at least two languages"):
            small.restrict(wrong)
    with pytest.raises(UnknownLanguageError, match="spa_Latn"):
        small.restrict(["eng_Latn", "spa_Latn"])


def test_unknown_names_are_refused(small):
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        small.split("dev")
    with pytest.raises(UnknownLanguageError, match="did you mean fra_Latn"):
        small.pairs("test", "fr_Latn", "eng_Latn")
