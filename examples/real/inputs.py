"""What `make real` measures with: settings, and the texts and sentence pairs that they name."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from corpus import texts

from megatron_moe_lpr.errors import UserError

LINES = "*.jsonl"
PATHS = ("text", "pairs", "corpus")
GOOD, BAD = ("sentence_good", "good"), ("sentence_bad", "bad")
"""Names of the two fields of a pair: BLiMP's own, and short ones."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Settings of the measuring."""

    text: Path | None = None
    """Directory with text of another kind, NAME.LANGUAGE.jsonl; None: it is not measured."""
    pairs: Path | None = None
    """JSON lines with a grammatical and an ungrammatical sentence each; None: they are not measured."""
    corpus: Path = Path("data/help_corpus")
    original: tuple[str, ...] = ("en",)
    expanded: tuple[str, ...] = ("el", "hu", "tr")
    validation_bytes: int = 12_000
    """UTF-8 bytes of validation text of each language, at most; whole documents."""
    text_bytes: int = 8_000
    """The same of each file of text of another kind."""
    max_pairs: int = 1_000
    """Pairs that are read, evenly over the file; one of BLiMP is sorted by phenomenon."""

    @classmethod
    def read(cls, settings: Any) -> "Inputs":
        """Take the fields that `settings`, a mapping or an object, has under the same names."""
        given = settings if isinstance(settings, Mapping) else vars(settings)
        known = {one.name for one in dataclasses.fields(cls)}
        found = {name: value for name, value in given.items() if name in known and value is not None}
        return cls(**{name: Path(value) if name in PATHS else value for name, value in found.items()})


@dataclasses.dataclass(frozen=True)
class Text:
    """The same documents for every model."""

    name: str
    """Name of the file without its language, empty for the corpus."""
    language: str
    documents: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(len(text.encode()) for text in self.documents)


def validation_texts(inputs: Inputs) -> list[Text]:
    """Return the validation text of every language of the corpus. Raises UserError: there is none."""
    directory = inputs.corpus / "valid"
    files = {path.name.split(".")[0]: path for path in sorted(directory.glob("*.jsonl*"))}
    missing = [one for one in (*inputs.original, *inputs.expanded) if one not in files]
    if missing:
        raise UserError(f"{directory}: no file {missing[0]}.jsonl or {missing[0]}.jsonl.zst")
    ordered = dict.fromkeys([*inputs.original, *sorted(files.keys() - inputs.expanded), *inputs.expanded])
    return [
        Text("", language, whole_documents(texts([str(files[language])]), inputs.validation_bytes))
        for language in ordered
    ]


def other_texts(inputs: Inputs) -> list[Text]:
    """Return the text of every file NAME.LANGUAGE.jsonl in TEXT; in each line its field `text`.

    Files without that field in their first line, such as pairs of sentences, are left out.

    Raises:
        UserError: no such directory, or no such file in it.
    """
    if inputs.text is None:
        return []
    found = []
    for path in sorted(inputs.text.glob(LINES)):
        name, _, language = path.name.removesuffix(".jsonl").rpartition(".")
        if name and "text" in next(json_lines(path), {}):
            found.append(Text(name, language, whole_documents(texts([str(path)]), inputs.text_bytes)))
    if not found:
        raise UserError(f"TEXT={inputs.text}: no file NAME.LANGUAGE.jsonl there with a field `text` in its lines")
    order = [*inputs.original, *inputs.expanded]
    return sorted(found, key=lambda one: (one.language in inputs.expanded, _place(one.language, order), one.name))


def _place(language: str, order: Sequence[str]) -> int:
    return order.index(language) if language in order else len(order)


def whole_documents(documents: Iterable[str], num_bytes: int) -> tuple[str, ...]:
    """Return documents in their order, without those that would exceed so many bytes; the shortest one if all would."""
    found, every, used = [], list(documents), 0
    for text in every:
        size = len(text.encode())
        if used + size <= num_bytes:
            found.append(text)
            used += size
    return tuple(found or [min(every, key=lambda text: len(text.encode()))])


def sentence_pairs(inputs: Inputs) -> list[tuple[str, str]]:
    """Return pairs of a grammatical and an ungrammatical sentence, at most `max_pairs`, evenly over the file.

    Raises:
        UserError: the file cannot be read, is empty, or has a line without both sentences.
    """
    if inputs.pairs is None:
        return []
    found = []
    for number, line in enumerate(json_lines(inputs.pairs), 1):
        sentences = [next((line[name] for name in names if line.get(name)), None) for names in (GOOD, BAD)]
        if not all(isinstance(one, str) for one in sentences):
            raise UserError(f"PAIRS={inputs.pairs}, line {number}: {GOOD[0]} and {BAD[0]} expected")
        found.append((sentences[0], sentences[1]))
    if not found:
        raise UserError(f"PAIRS={inputs.pairs}: no line in it")
    kept = min(len(found), inputs.max_pairs)
    return [found[position * len(found) // kept] for position in range(kept)]


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines. Raises UserError: it cannot be read, or a line is no object."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    value = json.loads(line)
                    if not isinstance(value, dict):
                        raise UserError(f"{path}, line {number}: a JSON object expected")
                    yield value
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON lines: {error}") from None
