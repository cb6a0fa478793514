"""Parse --original-languages, the languages that the dense model knows, and compare them with the data."""

import dataclasses
import unicodedata
from collections.abc import Collection, Iterable, Sequence

from megatron_moe_lpr.data.language_names import (
    canonical_language,
    covered,
    is_known,
    language_title,
    likely_meaning,
    split_names,
)
from megatron_moe_lpr.errors import UserError

FLAG = "--original-languages"


@dataclasses.dataclass(frozen=True)
class OriginalLanguages:
    """The original languages of a run, whether or not it has data of them."""

    names: tuple[str, ...]
    """Canonical names, sorted: those of the flag and those of the checkpoint's history."""
    notes: tuple[str, ...]
    """Messages for the user about how names were interpreted."""


def read_original_languages(
    given: Sequence[str], data: Collection[str], recorded: Collection[str] = (), flag: str = FLAG
) -> OriginalLanguages:
    """Parse the flag and compare it with the languages of the data.

    Args:
        given: arguments of the flag: codes or names; one argument may hold several, separated by commas.
        data: languages of the datasets. Original languages without data are allowed.
        recorded: original languages in the checkpoint's history.
        flag: name of the flag, for error messages.

    Raises:
        UserError: a name matches no language of the data and looks misspelled.
    """
    words = split_names(given)
    names = {word: word if word in data else canonical_language(word) for word in words}
    wrong = [_mistake(word, data, flag) for word, name in names.items() if not covered(data, [name])]
    if any(wrong):
        raise UserError(next(filter(None, wrong)))
    known = sorted({*names.values(), *map(canonical_language, recorded)})
    return OriginalLanguages(tuple(known), tuple(_notes(names, known, data, flag)))


def parse_languages(given: Sequence[str], flag: str) -> tuple[list[str], list[str]]:
    """Return the canonical languages of a flag, in the order given, and notes: other spellings, unknown languages.

    Raises:
        UserError: a name looks misspelled.
    """
    words = split_names(given)
    for word in words:
        if mistake := _mistake(word, (), flag):
            raise UserError(mistake)
    names = {word: canonical_language(word) for word in words}
    return list(dict.fromkeys(names.values())), _spellings(names, flag) + _tags(names.values(), flag)


def _mistake(word: str, data: Collection[str], flag: str) -> str | None:
    meaning = likely_meaning(word, data)
    if meaning is None:
        return _unusable(word, flag)
    row = f"{flag} {word}: "
    if is_known(canonical_language(word)):
        row += f"the code of {language_title(canonical_language(word))}, of which there is no data, and of a country; "
        return f"{row}if you mean {language_title(meaning)}, write {meaning}, else write its three-letter code"
    known = f"the data has {', '.join(sorted(data))}; " if data else ""
    return (
        f"{row}no language of this name is known; {known}write {meaning} if you mean {language_title(meaning)}, "
        "else leave it out or give it another name"
    )


def _unusable(word: str, flag: str) -> str | None:
    """Return what is wrong with a name that no dataset can have, such as `en|es`; as a tag it would match nothing."""
    if is_known(canonical_language(word)) or all(letter in "_-" or _is_of_words(letter) for letter in word):
        return None
    return (
        f"{flag} {word}: not the code or name of a language, nor a tag; separate several by white space or commas, "
        "without brackets or quotes"
    )


def _is_of_words(letter: str) -> bool:
    """Return whether a character is a letter, a combining mark or a digit, of any script."""
    return unicodedata.category(letter)[0] in "LMN"


def _spellings(names: dict[str, str], flag: str) -> list[str]:
    changed = [f"{word} is read as {language_title(name)}" for word, name in names.items() if word != name]
    return [f"{flag}: {', '.join(changed)}"] if changed else []


def _tags(names: Iterable[str], flag: str) -> list[str]:
    strange = [name for name in names if not is_known(name)]
    if not strange:
        return []
    return [f"{flag}: {', '.join(strange)}: neither the code nor the name of a language; taken as a tag of your own"]


def _notes(names: dict[str, str], known: list[str], data: Collection[str], flag: str) -> list[str]:
    if not known:
        return [f"{flag}: none given and none in the checkpoint's history; every language counts as expanded"]
    notes = _spellings(names, flag)
    if added := [name for name in known if names and name not in names.values()]:
        notes.append(f"{flag}: the checkpoint's history also has {_listed(added)}")
    if variants := sorted(covered(data, known) - set(known)):
        notes.append(f"{flag}: {_listed(variants)} of the data counts as original")
    absent = sorted(name for name in set(names.values()) if not covered(data, [name]))
    if absent:
        notes.append(f"{flag}: the data has nothing of {_listed(absent)}")
    notes += _tags(absent, flag)
    for one in sorted(set(data) - covered(data, known)):
        if not is_known(one) and likely_meaning(one, known) in known:
            unknown = "of the data is no known language and counts as expanded; if it is original, name it too"
            notes.append(f"{one} {unknown}")
    codes = {name.split("-")[0] for name in known}
    if similar := sorted(one for one in set(data) - covered(data, known) if one.split("-")[0] in codes):
        notes.append(f"{flag}: {', '.join(similar)} of the data is not among them and counts as expanded")
    return notes


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(language_title, names))
