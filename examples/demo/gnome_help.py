"""Convert GNOME's desktop help to JSON lines: text of another source than the corpus, to test the demo on."""

import dataclasses
import hashlib
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import UserError, run_command

DIRECTORY = {"en": "C", "zh": "zh_CN"}
TEXT_ELEMENTS = ("title", "p")
NAMESPACE = "{http://projectmallard.org/1.0/}"


@dataclasses.dataclass
class Flags:
    """Convert GNOME's desktop help to JSON lines."""

    pages: Path
    """Directory share/help of the unpacked Debian package gnome-user-docs."""
    languages: list[str]
    """Languages to convert. Paragraphs that are not translated are left out."""
    output: Path
    """Directory to write LANGUAGE.jsonl to."""


def main() -> None:
    """Command line."""
    flags = parse_flags(Flags, description=__doc__)
    english = {path.name: paragraphs(path) for path in language_pages(flags.pages, "en")}
    documents = {language: translated(flags.pages, language, english) for language in flags.languages}
    flags.output.mkdir(parents=True, exist_ok=True)
    for language, texts in documents.items():
        lines = (json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n" for name, text in texts.items())
        (flags.output / f"{language}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{language}: {len(texts):,} pages, {sum(len(text.encode()) for text in texts.values()):,} bytes")


def translated(directory: Path, language: str, english: dict[str, list[str]]) -> dict[str, str]:
    """Return the text of each page by its name, without paragraphs that are still English. Raises UserError."""
    texts = {}
    for path in language_pages(directory, language):
        untranslated = set(english.get(path.name, ())) if language != "en" else ()
        text = "\n".join(text for text in paragraphs(path) if text not in untranslated)
        if text:
            texts[path.name] = text
    return texts


def language_pages(directory: Path, language: str) -> list[Path]:
    """Return the pages of a language in the order of their names' hash. Raises UserError: there are none."""
    place = directory / DIRECTORY.get(language, language) / "gnome-help"
    found = sorted(place.glob("*.page"), key=lambda path: hashlib.sha256(path.name.encode()).hexdigest())
    if not found:
        raise UserError(f"--pages {directory}: no *.page in {place}")
    return found


def paragraphs(page: Path) -> list[str]:
    """Return titles and paragraphs of a Mallard page in order, with single spaces. Raises UserError."""
    try:
        root = ElementTree.parse(page).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"{page}: not a Mallard page: {error}") from None
    elements = (element for element in root.iter() if element.tag in {NAMESPACE + name for name in TEXT_ELEMENTS})
    texts = (" ".join("".join(element.itertext()).split()) for element in elements)
    return [text for text in texts if text]


if __name__ == "__main__":
    run_command(main)
