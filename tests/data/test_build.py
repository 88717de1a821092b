import lzma
from importlib.resources import files
from random import Random

import pytest
from babel import Locale

from moe_edu.data import build
from moe_edu.data.cldr import KINDS, LOCALES, Meaning, sample_meanings, say
from moe_edu.data.corpus import CHECKSUM_FILE, CORPUS_FILE, parse_shipped
from moe_edu.data.splits import SPLITS

FILES = files("moe_edu.data").joinpath("files")


def test_the_corpus_is_rebuilt_bit_for_bit():
    # Compare the contents: another liblzma may compress the same table to other bytes.
    shipped = lzma.decompress(FILES.joinpath(CORPUS_FILE).read_bytes())
    assert build.build_table().encode("utf-8") == shipped


def test_a_built_corpus_can_be_loaded(monkeypatch, tmp_path, capsys):
    rows = "".join(f"{split}\tdate\tone {split}\tun {split}\n" for split in SPLITS)
    monkeypatch.setattr(build, "build_table", lambda: "split\tkind\teng_Latn\tfra_Latn\n" + rows)
    build.main([str(tmp_path)])
    corpus = parse_shipped((tmp_path / CORPUS_FILE).read_bytes(), (tmp_path / CHECKSUM_FILE).read_text())
    assert corpus.pairs("test", "fra_Latn", "eng_Latn") == [("un test", "one test")]
    assert "SHA-256" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "meaning", "text"),
    [
        ("por_Latn", ("date", (1996, 8, 1, "full")), "quinta-feira, 1 de agosto de 1996"),
        ("eng_Latn", ("date", (1996, 8, 1, "long")), "August 1, 1996"),
        ("zho_Hans", ("date_time", (1968, 2, 25, "full", 17, 18)), "1968年2月25日星期日 17:18"),
        ("eng_Latn", ("date_time", (1968, 2, 25, "long", 17, 8)), "February 25, 1968, 5:08 PM"),
        ("deu_Latn", ("unit", ("1234.5", "length-kilometer")), "1.234,5 Kilometer"),
        ("swe_Latn", ("unit", ("2", "mass-pound")), "2 pund"),  # CLDR has only the short form
        ("pol_Latn", ("two_units", ("5", "mass-kilogram", "2", "mass-gram")), "5 kilogramów i 2 gramy"),
        ("fra_Latn", ("relative_time", ("day", -45)), "il y a 45 jours"),
        ("eng_Latn", ("relative_time", ("day", 1)), "in 1 day"),
        ("spa_Latn", ("money", ("1234", "JPY")), "1.234 yenes japoneses"),
        ("eng_Latn", ("money", ("1", "USD")), "1 US dollar"),
        ("fra_Latn", ("countries", ("standard", "FR", "EG", "CI")), "France, Égypte et Côte d’Ivoire"),
        ("deu_Latn", ("languages", ("or", "fr", "ru")), "Französisch oder Russisch"),
    ],
)
def test_known_sentences(code, meaning, text):
    assert say(Meaning(*meaning), Locale.parse(LOCALES[code])) == text


@pytest.mark.parametrize(
    "meaning",
    [
        ("unit", ("2", "no-such-unit")),
        ("two_units", ("2", "length-meter", "3", "no-such-unit")),
        ("money", ("2", "no-such-currency")),
        ("countries", ("standard", "FR", "no-such-country")),
        ("languages", ("standard", "no-such-language", "fr")),
    ],
)
def test_a_meaning_without_translation_is_missing(meaning):
    assert say(Meaning(*meaning), Locale.parse("fr")) is None


def test_meanings_are_distinct_and_depend_on_the_seed():
    meanings = sample_meanings(Random(3))
    assert len(set(meanings)) == len(meanings) == sum(kind.meanings for kind in KINDS.values())
    assert meanings == sample_meanings(Random(3))
    assert meanings != sample_meanings(Random(4))


@pytest.mark.parametrize("installed", ["2.17.0", None])
def test_another_babel_is_refused(monkeypatch, installed):
    def version(name):
        if installed is None:
            raise build.importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(build.importlib.metadata, "version", version)
    with pytest.raises(RuntimeError, match=r"pip install babel==2\.18\.0"):
        build.build_table()
