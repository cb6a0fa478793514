"""The text that all methods read, and its datasets in the tokens of both tokenizers."""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from corpus import texts

from examples.real.flow import Flow
from megatron_moe_lpr.files.atomic_file import atomic_file
from megatron_moe_lpr.files.json_files import read_json

SAMPLE_DOCUMENTS = 60
"""English documents in the sample that the allocation measures; nothing is trained on them."""


def source(flow: Flow, split: str, language: str) -> Path:
    """Return the corpus' file of a language."""
    return flow.settings.corpus / split / f"{language}.jsonl.zst"


def choose_text(flow: Flow) -> None:
    """Write the text of stage 1, whole documents of each new language, and passages of the original ones to replay."""
    settings = flow.settings
    for language in settings.expanded:
        documents = shuffled(texts([str(source(flow, "train", language))]), settings.seed)
        write_text(document_file(flow, language), first(documents, settings.characters))
    learned = sum(text_bytes(document_file(flow, language)) for language in settings.expanded)
    budget = int(settings.replay_share * learned / len(settings.original))
    for language in settings.original:
        documents = shuffled(texts([str(source(flow, "train", language))]), settings.seed)
        passages = (passage(text, settings.passage_characters) for text in documents)
        write_text(document_file(flow, language), within(passages, budget))


def document_file(flow: Flow, language: str) -> Path:
    """Return the file of the chosen documents of a language."""
    return flow.runs / "text" / f"{language}.jsonl"


def shuffled(documents: Iterable[str], seed: int) -> list[str]:
    """Return documents in an order that the seed decides."""
    found = list(documents)
    random.Random(seed).shuffle(found)
    return found


def first(documents: Iterable[str], characters: int) -> list[str]:
    """Return the first documents that have so many characters together."""
    found: list[str] = []
    for text in documents:
        if characters <= 0:
            break
        found.append(text)
        characters -= len(text)
    return found


def passage(text: str, characters: int) -> str:
    """Return the beginning of a document, up to the last blank before so many characters."""
    return text if len(text) <= characters else text[: characters + 1].rsplit(maxsplit=1)[0]


def within(passages: Iterable[str], num_bytes: int) -> list[str]:
    """Return the first passages that stay within so many bytes together; at least one."""
    found: list[str] = []
    for text in passages:
        num_bytes -= len(text.encode())
        if found and num_bytes < 0:
            break
        found.append(text)
    return found


def write_text(file: Path, documents: Sequence[str]) -> None:
    """Write documents as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as partial:
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
        partial.write_text("".join(lines), encoding="utf-8")


def text_bytes(file: Path) -> int:
    """Return the bytes of the text in a file of `write_text`."""
    with file.open(encoding="utf-8") as lines:
        return sum(len(json.loads(line)["text"].encode()) for line in lines)


def make_datasets(flow: Flow, tokens: str, tokenizer: Path) -> None:
    """Make the datasets TOKENS-LANGUAGE of the chosen text."""
    for language in flow.settings.languages:
        dataset(flow, f"{tokens}-{language}", document_file(flow, language), language, tokenizer)


def make_sample(flow: Flow, tokenizer: Path) -> list[Path]:
    """Make datasets of the original languages to measure with. Returns their prefixes."""
    for language in flow.settings.original:
        file = source(flow, "train", language)
        dataset(flow, f"sample-{language}", file, language, tokenizer, "--max-documents", SAMPLE_DOCUMENTS)
    return [prefix(flow, "sample", language) for language in flow.settings.original]


def dataset(flow: Flow, name: str, text: Path, language: str, tokenizer: Path, *words: object) -> None:
    """Make a dataset."""
    output = flow.runs / "data" / name
    flags = ("--input", text, "--language", language, "--tokenizer", tokenizer, "--output-prefix", output, *words)
    flow.step(Path(f"{output}.json"), f"tokens: {name}", lambda: flow.moe_lpr("preprocess", *flags))


def prefix(flow: Flow, tokens: str, language: str) -> Path:
    """Return the prefix of a dataset."""
    return flow.runs / "data" / f"{tokens}-{language}"


def steps_of_one_pass(flow: Flow, tokens: str, languages: Iterable[str]) -> int:
    """Return the number of steps that read the datasets once, in whole windows and batches; at least one."""
    training = flow.settings.training
    counts = [read_json(Path(f"{prefix(flow, tokens, language)}.json"))["tokens"] for language in languages]
    windows = sum((count - 1) // training["seq_length"] for count in counts)
    return max(1, windows // training["global_batch_size"])
