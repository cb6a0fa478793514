"""Stage tokenizer: new tokens for the new languages, and the text of all runs in old and new tokens."""

from collections.abc import Iterable
from pathlib import Path

from corpus import texts
from tokenizers import Tokenizer

from examples.real.base import BASE
from examples.real.flow import DONE, Flow
from examples.real.text import choose_text, make_datasets, source
from megatron_moe_lpr.files.json_files import write_json

OLD, NEW = "old", "new"
"""Names of the datasets in the base model's tokens and in the extended tokenizer's."""


def tokenizer(flow: Flow) -> None:
    """Extend the base model's tokenizer, choose the text, and write its datasets with both tokenizers."""
    hf, extended = flow.settings.hf(BASE), directory(flow)
    flow.step(extended / "extension.json", "tokenizer: new tokens", lambda: flow.moe_lpr(*extension(flow)))
    widths = flow.runs / "bytes_per_token.json"
    flow.step(widths, "tokenizer: bytes a token", lambda: measure(flow, {OLD: hf, NEW: extended}, widths))
    flow.step(flow.runs / "text" / DONE, "text that all methods read", lambda: choose_text(flow))
    make_datasets(flow, OLD, hf)
    make_datasets(flow, NEW, extended)


def directory(flow: Flow) -> Path:
    """Return the directory of the extended tokenizer."""
    return flow.runs / "tokenizer"


def extension(flow: Flow) -> tuple[object, ...]:
    """Return the command that extends the tokenizer on the whole training text."""
    settings = flow.settings

    def files(languages: Iterable[str]) -> list[str]:
        return [f"{language}={source(flow, 'train', language)}" for language in languages]

    words = ("--hf", settings.hf(BASE), "--new-tokens", settings.new_tokens, "--output", directory(flow))
    return (
        *("extend-tokenizer", *words, "--learn", *files(settings.expanded)),
        *("--guard", *files(settings.original)),
    )


def measure(flow: Flow, tokenizers: dict[str, Path], output: Path) -> None:
    """Write bytes a token on the validation text: by tokenizer, then by language."""
    found: dict[str, dict[str, float]] = {}
    for name, place in tokenizers.items():
        one = Tokenizer.from_file(str(place / "tokenizer.json"))
        found[name] = {}
        for language in flow.settings.languages:
            documents = list(texts([str(source(flow, "valid", language))]))
            tokens = sum(len(encoded.ids) for encoded in one.encode_batch(documents, add_special_tokens=False))
            found[name][language] = sum(len(text.encode()) for text in documents) / tokens
    write_json(found, output)
