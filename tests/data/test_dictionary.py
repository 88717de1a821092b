import hashlib
import json
import lzma
import os
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest

from moe_edu.data import CorpusError, dictionary_build, get_language, normalize_text
from moe_edu.data.dictionary import (
    DICTIONARY_CHECKSUM_FILE,
    DICTIONARY_FILE,
    load_dictionary,
    parse_dictionary,
    split_of,
)
from moe_edu.data.dictionary_build import LOCALES, PACKAGE, build_table
from moe_edu.data.splits import SPLITS

FILES = files("moe_edu.data").joinpath("files")


@pytest.fixture(scope="module")
def dictionary():
    return load_dictionary()


@pytest.fixture(scope="module")
def cells(dictionary):
    return [entry for name in SPLITS for entry in dictionary.split(name)]


def test_its_size_and_variety_are_as_promised(dictionary, cells):
    assert len(dictionary.concepts) == len(set(dictionary.concepts)) == len(set(dictionary.emoji)) == 400
    languages = [get_language(code) for code in dictionary.languages]
    assert len(set(languages)) == 63
    assert len({language.script for language in languages}) == 21
    assert tuple(LOCALES) == dictionary.languages
    assert min(Counter(entry.language for entry in cells).values()) > 300
    assert min(Counter(entry.concept for entry in cells).values()) >= 50
    assert len(FILES.joinpath(DICTIONARY_FILE).read_bytes()) < 130_000


def test_no_cell_is_in_two_splits_and_each_split_has_its_share(dictionary, cells):
    places = [(entry.concept, entry.language) for entry in cells]
    assert len(set(places)) == len(places)
    for name in ("valid", "test"):
        assert 0.04 < len(dictionary.split(name)) / len(cells) < 0.06
    for name in SPLITS:
        for concept, language, _ in dictionary.split(name):
            assert split_of(dictionary.concepts[concept], language) == name


def test_no_held_out_name_was_trained_on_in_its_language(dictionary):
    trained = {(entry.language, entry.name.casefold()) for entry in dictionary.train}
    for name in ("valid", "test"):
        assert not trained & {(entry.language, entry.name.casefold()) for entry in dictionary.split(name)}


def test_no_name_stands_for_two_concepts_of_a_language(cells):
    times = Counter((entry.language, entry.name.casefold()) for entry in cells)
    assert set(times.values()) == {1}


def test_every_name_is_clean_and_short(dictionary, cells):
    for entry in cells:
        assert entry.name == normalize_text(entry.name)
        assert 1 <= len(entry.name) <= 12
    english = {entry.concept: entry.name for entry in cells if entry.language == "eng_Latn"}
    assert english == dict(enumerate(dictionary.concepts))


def test_known_names(dictionary, cells):
    names = {(dictionary.concepts[e.concept], e.language): e.name for e in cells}
    assert dictionary.emoji[dictionary.concepts.index("tomato")] == "🍅"
    assert names["tomato", "deu_Latn"] == "Tomate"
    assert names["dog", "fra_Latn"] == "chien"
    assert names["lion", "ell_Grek"] == "λιοντάρι"


def test_the_split_never_changes():
    assert [split_of("dog", code) for code in ("deu_Latn", "fra_Latn")] == ["train", "train"]
    shares = Counter(split_of(str(i), "deu_Latn") for i in range(10_000))
    assert 400 < shares["valid"] < 600
    assert 400 < shares["test"] < 600
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        load_dictionary().split("dev")


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:1000] + b"?" + d[1001:], lambda d: b""])
def test_a_damaged_file_is_refused(damage):
    data = FILES.joinpath(DICTIONARY_FILE).read_bytes()
    checksum = FILES.joinpath(DICTIONARY_CHECKSUM_FILE).read_text()
    assert checksum == f"{hashlib.sha256(data).hexdigest()}  {DICTIONARY_FILE}\n"
    with pytest.raises(CorpusError, match=r"damaged.*dictionary_build"):
        parse_dictionary(damage(data), checksum)


def test_the_rules_of_the_table():
    names = {
        "eng_Latn": {"🐕": "dog", "🐈": "cat", "🍎": "red apple", "☀": "sun", "🎼": "musical"},
        "deu_Latn": {"🐕": "Hund", "🐈": "Katze", "🎼": "Partitur"},
        "spa_Latn": {"🐕": "animal", "🐈": "Animal", "🎼": "partitura musical"},
    }
    # Two words, a sign that is not an emoji, a name of two concepts and a long name are all left out.
    assert build_table(names, 2) == "emoji\teng_Latn\tdeu_Latn\tspa_Latn\n🐈\tcat\tKatze\t\n🐕\tdog\tHund\t\n"


def fake_package(folder, version=PACKAGE[1]):
    (folder / "package.json").write_text(json.dumps({"name": PACKAGE[0], "version": version}))
    for locale in LOCALES.values():
        path = folder / "annotations" / locale / "annotations.json"
        path.parent.mkdir(parents=True)
        annotations = {"🐕": {"default": ["pet"], "tts": ["dog\u200e"]}, "🐈": {"default": ["pet"]}}
        path.write_text(json.dumps({"annotations": {"annotations": annotations}}), encoding="utf-8")


def test_a_built_dictionary_can_be_loaded(tmp_path, capsys):
    fake_package(tmp_path)
    dictionary_build.main([str(tmp_path), str(tmp_path)])
    compressed = (tmp_path / DICTIONARY_FILE).read_bytes()
    built = parse_dictionary(compressed, (tmp_path / DICTIONARY_CHECKSUM_FILE).read_text())
    assert (built.concepts, built.emoji) == (("dog",), ("🐕",))
    assert len(built.languages) == 63
    assert "SHA-256" in capsys.readouterr().out


def test_another_package_is_refused(tmp_path):
    fake_package(tmp_path, version="47.0.0")
    with pytest.raises(RuntimeError, match=r"npm pack cldr-annotations-full@48\.2\.0"):
        dictionary_build.read_package(tmp_path)


@pytest.mark.skipif(
    "CLDR_ANNOTATIONS" not in os.environ,
    reason="set CLDR_ANNOTATIONS to the unpacked npm package cldr-annotations-full 48.2.0",
)
def test_the_dictionary_is_rebuilt_bit_for_bit():
    table = build_table(dictionary_build.read_package(Path(os.environ["CLDR_ANNOTATIONS"])))
    assert table.encode("utf-8") == lzma.decompress(FILES.joinpath(DICTIONARY_FILE).read_bytes())
