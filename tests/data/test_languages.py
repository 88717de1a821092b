import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moe_edu.data import UnknownLanguageError, all_languages, get_language, require_languages


def test_the_table_is_complete_and_consistent():
    languages = all_languages()
    assert len(languages) >= 204
    assert list(languages) == sorted(languages)
    for code, language in languages.items():
        assert re.fullmatch(r"[a-z]{3}_[A-Z][a-z]{3}", code)
        assert code == language.code
        assert language.script == code.split("_")[1]
        assert all((language.name, language.script_name, language.family, language.branch))
    # A script has one name, and a language has one family in every script.
    assert len({x.script for x in languages.values()}) == len(
        {(x.script, x.script_name) for x in languages.values()}
    )
    stems = {code.split("_")[0] for code in languages}
    assert len(stems) == len({(x.code.split("_")[0], x.family, x.branch) for x in languages.values()})


def test_known_languages():
    french = get_language("fra_Latn")
    assert (french.name, french.script_name) == ("French", "Latin")
    assert (french.family, french.branch) == ("Indo-European", "Romance")
    assert get_language("zho_Hans").family == "Sino-Tibetan"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("engl", "eng_Latn (English)"),
        ("French", "fra_Latn (French)"),
        ("fr_Latn", "fra_Latn (French)"),
        ("ZHO_HANS", "zho_Hans (Chinese (Simplified))"),
        ("por", "por_Latn (Portuguese)"),
    ],
)
def test_unknown_codes_get_similar_ones(typed, meant):
    with pytest.raises(UnknownLanguageError, match=re.escape(meant)) as caught:
        get_language(typed)
    assert repr(typed) in str(caught.value)


@given(st.text(max_size=30))
def test_any_other_text_is_a_clear_error(code):
    assume(code not in all_languages())
    with pytest.raises(UnknownLanguageError, match=r"^unknown language "):
        get_language(code)


def test_a_known_language_outside_the_set_names_its_relatives():
    with pytest.raises(
        UnknownLanguageError, match=r"cat_Latn \(Catalan\) is not a language of this model.*spa_Latn"
    ):
        require_languages(["eng_Latn", "cat_Latn"], ("eng_Latn", "spa_Latn", "deu_Latn"), "this model")
    require_languages(["eng_Latn"], ("eng_Latn",), "this model")
    with pytest.raises(UnknownLanguageError, match=r"it has: eng_Latn \(English\)$"):
        require_languages(["jpn_Jpan"], ("eng_Latn",), "this model")
    with pytest.raises(UnknownLanguageError, match=r"did you mean spa_Latn \(Spanish\)\?$"):
        require_languages(["Spanisch"], ("eng_Latn", "spa_Latn"), "this model")
