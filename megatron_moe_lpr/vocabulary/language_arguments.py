"""Parse `--learn el=FILES hu=FILES`, `--guard` and `--language-weights el=2`."""

import sys
from collections.abc import Sequence

from megatron_moe_lpr.data.language_names import canonical_language, covers, is_known
from megatron_moe_lpr.data.manifest import LANGUAGE_PATTERN
from megatron_moe_lpr.data.original_languages import parse_languages
from megatron_moe_lpr.data.preparation.sources import STANDARD_INPUT, expand_inputs
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.vocabulary.corpus import LanguageFiles

CODE_LENGTH = 3
"""Letters of the longest language code; a tag of the user's own is longer."""


def parse_sources(learn: Sequence[str], guard: Sequence[str]) -> list[LanguageFiles]:
    """Return the files of each language, the learned ones first, in the order given.

    Raises:
        UserError: a language is unknown, both learned and guarded, or has no files; or a file is missing, of an unknown
            kind, given twice, or standard input, which could not be read a second time.
    """
    found = []
    for flag, words, guarded in (("--learn", learn, False), ("--guard", guard, True)):
        for language, patterns in _patterns(words, flag).items():
            files = expand_inputs(patterns, f"{flag} {language}")
            if STANDARD_INPUT in files:
                raise UserError(f"{flag} {language}=-: standard input cannot be read twice; give a file")
            found.append(LanguageFiles(language, files, guarded))
    if all(one.guarded for one in found):
        raise UserError("--learn: give the languages to learn with their text, for example el='corpus/el/*.jsonl.zst'")
    _check_apart(found)
    return found


def parse_weights(words: Sequence[str], sources: Sequence[LanguageFiles]) -> dict[str, float]:
    """Return the weight of each language that `--language-weights` names. Raises UserError."""
    learned = [one.language for one in sources if not one.guarded]
    weights = {}
    for word in words:
        name, _, text = word.partition("=")
        language = canonical_language(name)
        if language not in learned:
            raise UserError(f"--language-weights {word}: write LANGUAGE=NUMBER with one of {', '.join(learned)}")
        try:
            weight = float(text)
        except ValueError:
            weight = 0.0
        if not 1e-6 <= weight <= 1e6:
            raise UserError(f"--language-weights {word}: the weight must be a number above 0, and at most 1e6")
        if language in weights:
            raise UserError(f"--language-weights {word}: {language} is given twice")
        weights[language] = weight
    return weights


def _patterns(words: Sequence[str], flag: str) -> dict[str, list[str]]:
    """Return file patterns by language; words without `LANGUAGE=` belong to the language before them."""
    patterns: dict[str, list[str]] = {}
    language = ""
    for word in words:
        name, equals, rest = word.partition("=")
        if equals and LANGUAGE_PATTERN.fullmatch(canonical_language(name)):
            language, word = _read_language(name, flag), rest
            patterns.setdefault(language, [])
        if not language:
            raise UserError(f"{flag} {word}: write LANGUAGE=FILES, for example el='corpus/el/*.jsonl.zst'")
        if not word:
            raise UserError(f"{flag} {name}=: give files of this language behind the equals sign")
        patterns[language].append(word)
    return patterns


def _read_language(name: str, flag: str) -> str:
    language = canonical_language(name)
    if not is_known(language) and len(name) <= CODE_LENGTH:
        raise UserError(f"{flag} {name}: no known language code; a tag of your own has more than {CODE_LENGTH} letters")
    for note in parse_languages([name], flag)[1]:
        print(f"note: {note}", file=sys.stderr)
    return language


def _check_apart(sources: Sequence[LanguageFiles]) -> None:
    for place, first in enumerate(sources):
        for second in sources[place + 1 :]:
            same = covers(first.language, second.language) or covers(second.language, first.language)
            if first.guarded != second.guarded and same:
                raise UserError(f"--guard {second.language}: is learned too (--learn {first.language}); choose one")
            if shared := sorted(set(first.files) & set(second.files)):
                raise UserError(f"{shared[0]}: given for {first.language} and for {second.language}")
