"""Rebuild the shipped dictionary, bit for bit, from CLDR's emoji names.

npm pack cldr-annotations-full@48.2.0 && tar xzf cldr-annotations-full-48.2.0.tgz
python -m moe_edu.data.dictionary_build package [folder]
"""

from __future__ import annotations

import hashlib
import json
import lzma
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from moe_edu.data.dictionary import DICTIONARY_CHECKSUM_FILE, DICTIONARY_FILE
from moe_edu.data.text import normalize_text

PACKAGE = ("cldr-annotations-full", "48.2.0")
CONCEPTS = 400
LONGEST_NAME = 12  # characters

# FLORES-200 code -> CLDR locale. 63 of those in which CLDR names nearly every emoji, chosen by hand for breadth: 21
# scripts, few close relatives. Chinese, Japanese and Korean are left out, since their names are one to three characters
# out of thousands, each of which is a concept of its own.
LOCALES = {
    "afr_Latn": "af", "als_Latn": "sq", "amh_Ethi": "am", "arb_Arab": "ar", "azj_Latn": "az", "ben_Beng": "bn",
    "bul_Cyrl": "bg", "cat_Latn": "ca", "ces_Latn": "cs", "cym_Latn": "cy", "dan_Latn": "da", "deu_Latn": "de",
    "ell_Grek": "el", "eng_Latn": "en", "est_Latn": "et", "eus_Latn": "eu", "fin_Latn": "fi", "fra_Latn": "fr",
    "gle_Latn": "ga", "guj_Gujr": "gu", "heb_Hebr": "he", "hin_Deva": "hi", "hrv_Latn": "hr", "hun_Latn": "hu",
    "hye_Armn": "hy", "ind_Latn": "id", "isl_Latn": "is", "ita_Latn": "it", "kan_Knda": "kn", "kat_Geor": "ka",
    "kaz_Cyrl": "kk", "khk_Cyrl": "mn", "lao_Laoo": "lo", "lit_Latn": "lt", "lvs_Latn": "lv", "mal_Mlym": "ml",
    "mar_Deva": "mr", "mya_Mymr": "my", "nld_Latn": "nl", "nob_Latn": "no", "ory_Orya": "or", "pan_Guru": "pa",
    "pes_Arab": "fa", "pol_Latn": "pl", "por_Latn": "pt", "ron_Latn": "ro", "rus_Cyrl": "ru", "sin_Sinh": "si",
    "slk_Latn": "sk", "spa_Latn": "es", "srp_Cyrl": "sr", "swe_Latn": "sv", "swh_Latn": "sw", "tam_Taml": "ta",
    "tel_Telu": "te", "tgl_Latn": "fil", "tha_Thai": "th", "tur_Latn": "tr", "ukr_Cyrl": "uk", "urd_Arab": "ur",
    "vie_Latn": "vi", "yor_Latn": "yo", "zul_Latn": "zu",
}  # fmt: skip

Names = dict[str, str]  # emoji -> name


def read_package(package: Path) -> dict[str, Names]:
    """The names in every language, from the unpacked npm package.

    Raises:
        RuntimeError: the wrong package or version.
        OSError: no package in this folder.
    """
    about = json.loads((package / "package.json").read_text(encoding="utf-8"))
    if (about["name"], about["version"]) != PACKAGE:
        raise RuntimeError(
            f"the dictionary is built from {'@'.join(PACKAGE)}, not {about['name']}@{about['version']}; "
            f"run: npm pack {'@'.join(PACKAGE)}"
        )
    names = {}
    for language, locale in LOCALES.items():
        path = package / "annotations" / locale / "annotations.json"
        annotations = json.loads(path.read_text(encoding="utf-8"))["annotations"]["annotations"]
        names[language] = {
            emoji: normalize_text(texts["tts"][0]) for emoji, texts in annotations.items() if "tts" in texts
        }
    return names


def choose_concepts(english: Names) -> list[str]:
    """The emoji from U+1F000 on whose English name is one plain word."""
    return [
        emoji
        for emoji, name in english.items()
        if len(emoji) == 1 and emoji >= "\U0001f000" and name.isascii() and name.isalpha() and name.islower()
    ]


def usable_names(names: Names, concepts: list[str]) -> dict[str, str]:
    """The short names of one language that, ignoring case, stand for one concept only."""
    known = {concept: names[concept] for concept in concepts if concept in names}
    times_used = Counter(name.casefold() for name in known.values())
    return {
        concept: name
        for concept, name in known.items()
        if len(name) <= LONGEST_NAME and times_used[name.casefold()] == 1
    }


def build_table(names: Mapping[str, Names], num_concepts: int = CONCEPTS) -> str:
    """The concepts named in the most languages, sorted by English name, as tab-separated text."""
    concepts = choose_concepts(names["eng_Latn"])
    usable = {language: usable_names(of_language, concepts) for language, of_language in names.items()}
    english = usable["eng_Latn"]
    ranked = sorted(
        (concept for concept in concepts if concept in english),
        key=lambda concept: (-sum(concept in cells for cells in usable.values()), english[concept]),
    )
    chosen = sorted(ranked[:num_concepts], key=lambda concept: english[concept])
    lines = ["\t".join(("emoji", *usable))]
    for concept in chosen:
        lines.append("\t".join((concept, *(cells.get(concept, "") for cells in usable.values()))))
    return "".join(line + "\n" for line in lines)


def main(arguments: list[str]) -> None:
    if not arguments:
        sys.exit(__doc__)
    folder = Path(arguments[1]) if len(arguments) > 1 else Path(__file__).parent / "files"
    compressed = lzma.compress(build_table(read_package(Path(arguments[0]))).encode("utf-8"), preset=9)
    digest = hashlib.sha256(compressed).hexdigest()
    (folder / DICTIONARY_FILE).write_bytes(compressed)
    (folder / DICTIONARY_CHECKSUM_FILE).write_text(f"{digest}  {DICTIONARY_FILE}\n", encoding="ascii")
    print(f"{folder / DICTIONARY_FILE}: {len(compressed):,} bytes, SHA-256 {digest}")


if __name__ == "__main__":
    main(sys.argv[1:])
