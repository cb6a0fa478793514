"""Bring public sets of text and sentence pairs into the form that the measuring reads; they are not in this repository.

    git clone https://github.com/google-deepmind/xquad sets/xquad     # paragraphs of Wikipedia, CC BY-SA 4.0
    git clone https://github.com/nytud/HuCoPA sets/hucopa             # Hungarian sentences, BSD 2-Clause
    git clone https://github.com/alexwarstadt/blimp sets/blimp        # pairs of English sentences, CC BY
    python -m examples.real.public_sets --xquad sets/xquad/xquad.{en,es,zh,el,tr}.json \
        --hucopa sets/hucopa/data/train.json --blimp sets/blimp/data/*.jsonl --output sets/text
    TEXT=sets/text PAIRS=sets/text/blimp.en.jsonl make real
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from examples.real.inputs import json_lines
from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import UserError, run_command
from megatron_moe_lpr.files.atomic_file import atomic_file


@dataclasses.dataclass
class Flags:
    """Bring public sets into the form that the measuring of `make real` reads."""

    output: Path
    """Directory to write xquad.LANGUAGE.jsonl, hucopa.hu.jsonl and blimp.en.jsonl to."""
    xquad: list[Path] = dataclasses.field(default_factory=list)
    """Files xquad.LANGUAGE.json."""
    hucopa: Path | None = None
    """File of HuCoPA with labels: train.json or val.json."""
    blimp: list[Path] = dataclasses.field(default_factory=list)
    """Files of BLiMP, one for each paradigm."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    flags.output.mkdir(parents=True, exist_ok=True)
    for file in flags.xquad:
        language = file.name.removesuffix(".json").rpartition(".")[2]
        write(flags.output / f"xquad.{language}.jsonl", converted(file, paragraphs))
    if flags.hucopa:
        write(flags.output / "hucopa.hu.jsonl", converted(flags.hucopa, situations))
    if flags.blimp:
        names = ("sentence_good", "sentence_bad")
        pairs = (line for file in sorted(flags.blimp) for line in json_lines(file))
        write(flags.output / "blimp.en.jsonl", ({name: line[name] for name in names} for line in pairs))


def converted(file: Path, convert: Any) -> list[dict[str, str]]:
    """Return the lines of a set. Raises UserError: the file cannot be read, or is not of that set."""
    try:
        return [{"text": text} for text in convert(json.loads(file.read_text(encoding="utf-8")))]
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{file}: of another form than expected ({error!r})") from None


def paragraphs(content: dict[str, Any]) -> list[str]:
    """Return the paragraphs of a file of XQuAD, without the byte order marks before some of them."""
    return [one["context"].lstrip("\ufeff") for article in content["data"] for one in article["paragraphs"]]


def situations(content: list[dict[str, Any]]) -> list[str]:
    """Return each premise of HuCoPA with its right alternative. Labels count from 0 in some files, from 1 in others."""
    lowest = min(int(one["label"]) for one in content)
    return [f"{one['premise']} {(one['choice1'], one['choice2'])[int(one['label']) - lowest]}" for one in content]


def write(file: Path, lines: Iterable[dict[str, str]]) -> None:
    """Write JSON lines and say so."""
    texts = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
    with atomic_file(file) as partial:
        partial.write_text("".join(texts), encoding="utf-8")
    print(f"{file}: {len(texts):,} lines")


if __name__ == "__main__":
    run_command(main)
