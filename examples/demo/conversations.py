"""Make conversations from the help corpus: a document's heading asks, the sentence after it answers."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from corpus import texts

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import UserError, run_command
from megatron_moe_lpr.files.atomic_directory import atomic_directory

HEADING = 80
"""Most characters of a question."""
ANSWER = range(20, 241)
"""Characters of an answer."""


@dataclasses.dataclass
class Flags:
    """Make conversations from the help corpus."""

    corpus: Path
    """Directory with LANGUAGE.jsonl.zst."""
    languages: list[str]
    """Languages; each becomes a file."""
    output: Path
    """Directory to write: LANGUAGE.jsonl with a conversation a line."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    with atomic_directory(flags.output, overwrite=True) as directory:
        for language in flags.languages:
            found = list(conversations(texts([str(flags.corpus / f"{language}.jsonl.zst")])))
            if not found:
                raise UserError(f"--corpus {flags.corpus}: no document of {language} begins with heading and sentence")
            lines = [json.dumps({"messages": one}, ensure_ascii=False) + "\n" for one in found]
            (directory / f"{language}.jsonl").write_text("".join(lines), encoding="utf-8")
            print(f"{language}: {len(found):,} conversations")


def conversations(documents: Iterator[str]) -> Iterator[list[dict[str, str]]]:
    """Yield the messages of each document whose first two lines are a heading and a text of a sentence or two."""
    for document in documents:
        heading, _, rest = document.partition("\n")
        answer = rest.partition("\n")[0].strip()
        if 0 < len(heading.strip()) <= HEADING and len(answer) in ANSWER:
            yield [{"role": "user", "content": heading.strip()}, {"role": "assistant", "content": answer}]


if __name__ == "__main__":
    run_command(main)
