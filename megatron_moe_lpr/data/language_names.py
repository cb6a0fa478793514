"""Normalise language names (codes, English names, regional tags) to one spelling, and suggest corrections."""

import dataclasses
import difflib
import functools
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from importlib import resources

# Languages written in several scripts today: their tags keep the script.
_SEVERAL_SCRIPTS = frozenset(
    ("az", "bs", "ha", "hbs", "kk", "ks", "ku", "mn", "ms", "pa", "sd", "sr", "tg", "tk", "tt", "ug", "uz", "zh")
)
_CHINESE_SCRIPTS = {"CN": "Hans", "SG": "Hans", "MY": "Hans", "TW": "Hant", "HK": "Hant", "MO": "Hant"}
_SAME = {"nb": "no", "tl": "fil"}
"""Codes that data sets use for the same language."""
_ALIKE = 0.75
_NAME_ALIKE = 0.8


@dataclasses.dataclass(frozen=True)
class Language:
    """A row of language_codes.tsv, which is Unicode CLDR's."""

    code: str
    """ISO 639-1, or 639-3 where there is none."""
    other_codes: tuple[str, ...]
    script: str
    """Usual script, ISO 15924."""
    countries: tuple[str, ...]
    """Lower-case ISO 3166 codes of countries whose main language it is, its own country first."""
    names: tuple[str, ...]
    """Names in English and in the language itself."""


@functools.lru_cache(maxsize=4096)
def canonical_language(text: str) -> str:
    """Return one spelling per language: `el` for `EL`, `ell`, `ell_Grek`, `Greek` and `gr`; `zh-CN` for `zh_CN`.

    Region and script are kept, except the script of a language that has only one. A name that is neither a code nor a
    language name, such as `code` or `el-tech`, is the user's own tag and returned unchanged.
    """
    given = text.strip()
    if known := _by_word().get(_folded(given)):
        return known.code
    parts = _parts(given)
    return given if parts is None else "-".join(filter(None, parts))


def language_title(language: str) -> str:
    """Return `el (Greek)`; the user's own tags unchanged."""
    parts = _parts(language)
    known = _by_word()[parts[0]] if parts else None
    return f"{language} ({known.names[0]})" if known and known.names else language


def named_script(language: str) -> str:
    """Return the script named by a tag, `Hant` of `zh-Hant`; empty if it names none, or the language has only one."""
    parts = _parts(language)
    return parts[1] if parts else ""


def with_usual_script(language: str) -> str:
    """Return `ceb_Latn` for `ceb`; tags that are not in the table or have no known script unchanged."""
    row, script = _row(language), named_script(language)
    script = script or (row.script if row else "")
    return f"{row.code}_{script}" if row and script else language


def language_codes(language: str) -> tuple[str, ...]:
    """Return all codes of a tag's language, `("lv", "lav", "lvs")` for `lv-LV`; none for the user's own tags."""
    row = _row(language)
    return (row.code, *row.other_codes) if row else ()


def is_known(language: str) -> bool:
    """Return whether a canonical tag is a language of the table, not the user's own."""
    return _parts(language) is not None


def covers(name: str, language: str) -> bool:
    """Return whether a named language includes a dataset's language; both are canonical.

    `en` and `en-US` match, since they do not contradict each other; `pt-BR` and `pt-PT`, or `zh-Hans` and `zh-TW`, do
    not. The user's own tags match themselves only.
    """
    if name == language:
        return True
    first, second = _parts(name), _parts(language)
    if first is None or second is None or _SAME.get(first[0], first[0]) != _SAME.get(second[0], second[0]):
        return False
    return all(
        not ours or not theirs or ours == theirs for ours, theirs in zip(_full(first), _full(second), strict=True)
    )


def covered(languages: Iterable[str], names: Iterable[str]) -> set[str]:
    """Return those of `languages` that one of `names` covers."""
    names = list(names)
    return {language for language in languages if any(covers(name, language) for name in names)}


def split_names(arguments: Sequence[str]) -> list[str]:
    """Split `["en,es", "Swiss German"]` to `["en", "es", "Swiss German"]`, and `["en es"]` to both codes."""
    pieces = [piece.strip() for argument in arguments for piece in re.split("[,;]", argument)]
    names: list[str] = []
    for piece in filter(None, pieces):
        names += [piece] if _folded(piece) in _by_word() else piece.split()
    return names


def likely_meaning(given: str, languages: Collection[str]) -> str | None:
    """Return the likely correction of a name that matches none of `languages`: one of them, or a language of the table.

    A valid code is no misspelling, unless it is also the country code of one of the languages (`kr` beside `ko`); the
    three-letter code is then unambiguous.

    Args:
        given: the name as the user wrote it.
        languages: canonical names, for example those of the data.
    """
    country = [name for name in languages if (row := _row(name)) and row.countries[:1] == (given.casefold(),)]
    if country or is_known(canonical_language(given)):
        return country[0] if country else None
    candidates = {word: name for name in languages for word in (_folded(name), *_words(name))}
    found = difflib.get_close_matches(_folded(given), candidates, 1, _ALIKE) or _one_letter_apart(given, candidates)
    if found and not _contradict(given, candidates[found[0]]):
        return candidates[found[0]]
    if len(given) < 5:
        return None
    return next(
        (_by_word()[name].code for name in difflib.get_close_matches(_folded(given), _by_word(), 1, _NAME_ALIKE)), None
    )


def _one_letter_apart(given: str, words: Iterable[str]) -> list[str]:
    """Return two-letter words that differ from `given` in one letter: `el` for `ek`."""
    text = _folded(given)
    return [word for word in words if len(word) == len(text) == 2 and (word[0] == text[0]) != (word[1] == text[1])]


def _contradict(given: str, language: str) -> bool:
    """Return whether two of the user's own tags begin with different language codes: `en-legal` and `el-legal`."""
    first, second = (_by_word().get(_folded(re.split("[-_]", tag)[0])) for tag in (given, language))
    return first is not None and second is not None and first != second


def _row(language: str) -> Language | None:
    parts = _parts(language)
    return _by_word()[parts[0]] if parts else None


def _words(language: str) -> list[str]:
    row = _row(language)
    return [_folded(word) for word in (row.code, *row.other_codes, *row.names)] if row else []


def _full(parts: tuple[str, str, str]) -> tuple[str, str]:
    """Return (script, region) of a tag; for Chinese the region implies the script."""
    code, script, region = parts
    return (script or _CHINESE_SCRIPTS.get(region, "") if code == "zh" else script), region


@functools.lru_cache(maxsize=4096)
def _parts(tag: str) -> tuple[str, str, str] | None:
    """Return (code, script or "", region or "") of a tag; None if its language is unknown."""
    primary, *subtags = re.split("[-_]", re.sub("[.@].*", "", tag))
    row = _by_word().get(_folded(primary))
    if row and subtags and len(subtags[0]) == 3 and (extended := _by_word().get(subtags[0].casefold())):
        row, subtags = extended, subtags[1:]  # zh-yue is yue
    if row is None:
        return None
    script = subtags.pop(0).capitalize() if subtags and subtags[0].capitalize() in _scripts() else ""
    region = subtags.pop(0).upper() if subtags and (subtags[0].lower() in _regions() or _is_area(subtags[0])) else ""
    if subtags:
        return None
    if script == row.script and row.code not in _SEVERAL_SCRIPTS:
        script = ""
    return row.code, script, region


def _is_area(subtag: str) -> bool:
    """Return whether a subtag is a UN M.49 area number, such as 419 for Latin America."""
    return len(subtag) == 3 and subtag.isdigit()


def _folded(text: str) -> str:
    """Return the name in lower case without accents, white space normalised: `norwegian bokmal`."""
    plain = unicodedata.normalize("NFKD", re.sub(r"[\s_-]+", " ", text.strip()))
    return "".join(letter for letter in plain if not unicodedata.combining(letter)).casefold()


@functools.cache
def _rows() -> tuple[Language, ...]:
    content = resources.files(__package__).joinpath("language_codes.tsv").read_text(encoding="utf-8")
    rows = []
    for line in content.splitlines()[1:]:
        code, others, script, countries, names = line.split("\t")
        rows.append(Language(code, (*others.split(),), script, (*countries.split(),), (*names.split("; "),)))
    return tuple(rows)


@functools.cache
def _by_word() -> dict[str, Language]:
    """Map each word to its language; codes take precedence over names, names over countries."""
    words = {row.countries[0]: row for row in _rows() if row.countries and len(row.code) == 2}
    words |= {_folded(name): row for row in _rows() for name in row.names if name}
    words |= {code: row for row in _rows() for code in row.other_codes}
    return words | {row.code: row for row in _rows()}


@functools.cache
def _scripts() -> frozenset[str]:
    return frozenset(row.script for row in _rows() if row.script) | {"Hant"}


@functools.cache
def _regions() -> frozenset[str]:
    return frozenset(country for row in _rows() for country in row.countries)
