"""Phrases in many languages: people translated their patterns and names for CLDR, Babel puts them together.

A `Meaning` is what a sentence says, without a language: ("date", (1996, 8, 1, "full")). `say` renders it in one
locale, or returns None if that locale has no translation of a part of it.

Needs Babel, which only the `test` extra installs: the corpus built from it ships with the package.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import cache
from importlib.resources import files
from random import Random
from typing import Any, NamedTuple

from babel import Locale, dates, lists, localedata, numbers, units

from moe_edu.data.text import normalize_text

# FLORES-200 code -> CLDR locale. FLORES's Portuguese is Brazilian, its Spanish European: CLDR's defaults.
LOCALES = {
    "amh_Ethi": "am",
    "arb_Arab": "ar",
    "ben_Beng": "bn",
    "bul_Cyrl": "bg",
    "deu_Latn": "de",
    "ell_Grek": "el",
    "eng_Latn": "en",
    "fin_Latn": "fi",
    "fra_Latn": "fr",
    "heb_Hebr": "he",
    "hin_Deva": "hi",
    "hun_Latn": "hu",
    "hye_Armn": "hy",
    "ind_Latn": "id",
    "ita_Latn": "it",
    "jpn_Jpan": "ja",
    "kat_Geor": "ka",
    "kor_Hang": "ko",
    "nld_Latn": "nl",
    "pes_Arab": "fa",
    "pol_Latn": "pl",
    "por_Latn": "pt",
    "ron_Latn": "ro",
    "rus_Cyrl": "ru",
    "spa_Latn": "es",
    "swe_Latn": "sv",
    "swh_Latn": "sw",
    "tam_Taml": "ta",
    "tha_Thai": "th",
    "tur_Latn": "tr",
    "ukr_Cyrl": "uk",
    "urd_Arab": "ur",
    "vie_Latn": "vi",
    "zho_Hans": "zh_Hans",
}


# Units that people combine, as in "6 feet and 2 inches": the larger, the smaller, and how many smaller make one larger.
UNIT_PAIRS = (
    ("duration-year", "duration-month", 12),
    ("duration-week", "duration-day", 7),
    ("duration-day", "duration-hour", 24),
    ("duration-hour", "duration-minute", 60),
    ("duration-minute", "duration-second", 60),
    ("length-kilometer", "length-meter", 1000),
    ("length-meter", "length-centimeter", 100),
    ("length-mile", "length-yard", 1760),
    ("length-foot", "length-inch", 12),
    ("mass-kilogram", "mass-gram", 1000),
    ("mass-pound", "mass-ounce", 16),
    ("volume-liter", "volume-milliliter", 1000),
)

# How long each unit of a relative time lasts, in seconds, and the largest count used with it.
RELATIVE_UNITS = {
    "second": (1, 90),
    "minute": (60, 90),
    "hour": (3600, 90),
    "day": (86400, 90),
    "week": (604800, 50),
    "month": (2592000, 30),
    "year": (31536000, 200),
}


class Vocabulary(NamedTuple):
    """What the sentences are about, in CLDR's codes, from `files/vocabulary.json`.

    units: of daily life and school, `length-meter`.   countries: mostly of ten million people or more (ISO 3166).
    languages: widely spoken or much studied ones (ISO 639).   currencies: widely used ones (ISO 4217).
    """

    units: list[str]
    countries: list[str]
    languages: list[str]
    currencies: list[str]


@cache
def vocabulary() -> Vocabulary:
    text = files("moe_edu.data").joinpath("files/vocabulary.json").read_text(encoding="utf-8")
    return Vocabulary(**json.loads(text))


class Meaning(NamedTuple):
    """What a sentence says: its kind, a key of `KINDS`, and the arguments of that kind's renderer."""

    kind: str
    arguments: tuple[Any, ...]


def say(meaning: Meaning, locale: Locale) -> str | None:
    """Render `meaning` in the language of `locale`; None if CLDR has no translation of a part of it."""
    text = KINDS[meaning.kind].render(locale, *meaning.arguments)
    return text and normalize_text(text)


def sample_meanings(rng: Random) -> list[Meaning]:
    """Draw the corpus, kind by kind: each kind's number of distinct meanings."""
    meanings: dict[Meaning, None] = {}  # an ordered set
    for name, kind in KINDS.items():
        wanted = len(meanings) + kind.meanings
        while len(meanings) < wanted:
            meanings[Meaning(name, kind.draw(rng))] = None
    return list(meanings)


def _below(rng: Random, n: int) -> int:
    """A number in `range(n)`. Python keeps the sequence of `random()` between versions, but not that of `randrange`."""
    return int(rng.random() * n)


def _choose(rng: Random, items: list[str], count: int) -> tuple[str, ...]:
    """`count` different items, in random order."""
    rest = list(items)
    return tuple(rest.pop(_below(rng, len(rest))) for _ in range(count))


# --- dates and times -------------------------------------------------------------------------------------------------


def _draw_date(rng: Random) -> tuple[Any, ...]:
    first = datetime.date(1900, 1, 1)
    day = first + datetime.timedelta(days=_below(rng, 365 * 140))
    # "full" names the weekday, "long" does not.
    return day.year, day.month, day.day, "full" if rng.random() < 0.5 else "long"


def _say_date(locale: Locale, year: int, month: int, day: int, style: Any) -> str:
    return dates.format_date(datetime.date(year, month, day), style, locale)


def _draw_date_time(rng: Random) -> tuple[Any, ...]:
    return *_draw_date(rng), _below(rng, 24), _below(rng, 60)


def _say_date_time(
    locale: Locale, year: int, month: int, day: int, style: Any, hour: int, minute: int
) -> str:
    time = dates.format_time(datetime.time(hour, minute), "short", locale=locale)
    joined = str(dates.get_datetime_format(style, locale))
    return joined.replace("{1}", _say_date(locale, year, month, day, style)).replace("{0}", time)


def _draw_relative_time(rng: Random) -> tuple[Any, ...]:
    unit = _choose(rng, list(RELATIVE_UNITS), 1)[0]
    _, largest = RELATIVE_UNITS[unit]
    return unit, (1 + _below(rng, largest)) * (1 if rng.random() < 0.5 else -1)


def _say_relative_time(locale: Locale, unit: Any, count: int) -> str | None:
    # If the plural form is missing, Babel leaves out "ago" and "in", so look first.
    patterns = _locale_data(str(locale))["date_fields"][unit].get("future" if count > 0 else "past", {})
    if locale.plural_form(abs(count)) not in patterns:
        return None
    delta = datetime.timedelta(seconds=count * RELATIVE_UNITS[unit][0])
    # An infinite threshold keeps "in 45 days" from being rounded to "in 1 month".
    return dates.format_timedelta(
        delta, granularity=unit, threshold=float("inf"), add_direction=True, locale=locale
    )


# --- units and money -------------------------------------------------------------------------------------------------


def _draw_number(rng: Random, largest: int) -> str:
    """A whole number up to `largest`, or one time in three a smaller one with a decimal."""
    if rng.random() < 2 / 3:
        return str(1 + _below(rng, largest))
    return f"{_below(rng, largest // 10)}.{1 + _below(rng, 9)}"


def _draw_unit(rng: Random) -> tuple[Any, ...]:
    return _draw_number(rng, 2000), *_choose(rng, vocabulary().units, 1)


def _say_unit(locale: Locale, number: str, unit: str) -> str | None:
    value = Decimal(number)
    patterns = _locale_data(str(locale))["unit_patterns"].get(unit, {})
    # Babel writes the raw unit id for a missing form. CLDR omits a long form that equals the short one.
    for length in ("long", "short"):
        if locale.plural_form(value) in patterns.get(length, {}):
            return units.format_unit(value, unit, length, locale=locale)
    return None


def _draw_two_units(rng: Random) -> tuple[Any, ...]:
    larger, smaller, per_larger = UNIT_PAIRS[_below(rng, len(UNIT_PAIRS))]
    return str(1 + _below(rng, 99)), larger, str(1 + _below(rng, per_larger - 1)), smaller


def _say_two_units(locale: Locale, number: str, unit: str, number2: str, unit2: str) -> str | None:
    parts = _say_unit(locale, number, unit), _say_unit(locale, number2, unit2)
    return _join(locale, parts, "standard")


def _draw_money(rng: Random) -> tuple[Any, ...]:
    currency = _choose(rng, vocabulary().currencies, 1)[0]
    if rng.random() < 2 / 3:
        return str(1 + _below(rng, 5000)), currency
    return f"{1 + _below(rng, 500)}.{_below(rng, 10)}{1 + _below(rng, 9)}", currency


def _say_money(locale: Locale, amount: str, currency: str) -> str | None:
    if locale.currencies.get(currency, currency) == currency:
        return None
    return numbers.format_currency(
        Decimal(amount), currency, locale=locale, format_type="name", currency_digits=False
    )


# --- lists -----------------------------------------------------------------------------------------------------------


def _draw_list(rng: Random, items: list[str]) -> tuple[Any, ...]:
    style = "standard" if rng.random() < 0.75 else "or"
    return style, *_choose(rng, items, 2 + _below(rng, 2))


def _draw_countries(rng: Random) -> tuple[Any, ...]:
    return _draw_list(rng, vocabulary().countries)


def _draw_languages(rng: Random) -> tuple[Any, ...]:
    return _draw_list(rng, vocabulary().languages)


def _say_countries(locale: Locale, style: str, *codes: str) -> str | None:
    return _join(locale, tuple(locale.territories.get(code) for code in codes), style)


def _say_languages(locale: Locale, style: str, *codes: str) -> str | None:
    return _join(locale, tuple(locale.languages.get(code) for code in codes), style)


def _join(locale: Locale, parts: tuple[str | None, ...], style: Any) -> str | None:
    present = [part for part in parts if part is not None]
    return lists.format_list(present, style, locale) if len(present) == len(parts) else None


# --- the kinds -------------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A type of sentence: how many meanings the corpus has, how one is drawn, and how it is rendered."""

    meanings: int
    draw: Callable[[Random], tuple[Any, ...]]
    render: Callable[..., str | None]


KINDS: Mapping[str, Kind] = {
    "date": Kind(900, _draw_date, _say_date),
    "date_time": Kind(800, _draw_date_time, _say_date_time),
    "unit": Kind(1100, _draw_unit, _say_unit),
    "two_units": Kind(800, _draw_two_units, _say_two_units),
    "relative_time": Kind(700, _draw_relative_time, _say_relative_time),
    "countries": Kind(800, _draw_countries, _say_countries),
    "languages": Kind(700, _draw_languages, _say_languages),
    "money": Kind(900, _draw_money, _say_money),
}


@cache
def _locale_data(name: str) -> localedata.LocaleDataDict:
    data: Any = localedata.load(name)
    return localedata.LocaleDataDict(data)
