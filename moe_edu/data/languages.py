"""The languages of FLORES-200: names, scripts and families, read from `files/languages.tsv`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from types import MappingProxyType


@dataclass(frozen=True)
class Language:
    """One language in one script.

    code: FLORES-200 code, `fra_Latn`.   name: English name, `French`.
    script: ISO 15924 code, `Latn`.      script_name: English name, `Latin`.
    family: top-level family, `Indo-European` (a creole is placed with the language its words come from).
    branch: a branch of the family, `Romance`.
    """

    code: str
    name: str
    script: str
    script_name: str
    family: str
    branch: str


class UnknownLanguageError(ValueError):
    """A code that is not in `files/languages.tsv`; the message suggests similar ones."""


@cache
def all_languages() -> Mapping[str, Language]:
    """Every FLORES-200 language by its code, in the order of the codes."""
    text = files("moe_edu.data").joinpath("files/languages.tsv").read_text(encoding="utf-8")
    _header, *rows = text.splitlines()
    return MappingProxyType({row.split("\t", 1)[0]: Language(*row.split("\t")) for row in rows})


def get_language(code: str) -> Language:
    """Return the language with this FLORES-200 code.

    Raises:
        UnknownLanguageError: no such code; the message suggests up to three, similar in code or English name.
    """
    language = all_languages().get(code)
    if language is None:
        raise UnknownLanguageError(unknown_language_message(code, all_languages()))
    return language


def unknown_language_message(code: str, known: Mapping[str, Language]) -> str:
    """Say that `code` is unknown, and which `known` languages have a similar code or name.

    >>> unknown_language_message("French", all_languages())
    "unknown language 'French'; did you mean fra_Latn (French)?"
    """
    by_spelling: dict[str, str] = {}
    for language in known.values():
        for spelling in (language.code, language.code.split("_")[0], language.name):
            by_spelling.setdefault(spelling.casefold(), language.code)
    near = get_close_matches(code.casefold(), by_spelling, n=6, cutoff=0.6)
    codes = list(dict.fromkeys(by_spelling[spelling] for spelling in near))[:3]
    if not codes:
        return f"unknown language {code!r}; codes are FLORES-200's, such as eng_Latn"
    return f"unknown language {code!r}; did you mean {' or '.join(f'{c} ({known[c].name})' for c in codes)}?"


def require_languages(codes: Iterable[str], known: Collection[str], where: str) -> None:
    """Check that every code is one of the `known` languages of `where` ("the corpus", "the model").

    Raises:
        UnknownLanguageError: the first code that is not; the message suggests some that are.
    """
    for code in codes:
        if code in known:
            continue
        present = {other: all_languages()[other] for other in known}
        if code not in all_languages():
            raise UnknownLanguageError(unknown_language_message(code, present))
        language = all_languages()[code]
        related = [other for other in present.values() if other.branch == language.branch]
        listed = ", ".join(f"{other.code} ({other.name})" for other in related or present.values())
        raise UnknownLanguageError(
            f"{code} ({language.name}) is not a language of {where}; "
            f"{'related ones that are' if related else 'it has'}: {listed}"
        )
