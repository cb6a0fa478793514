"""Measure the models of `make real`: text, grammar, answers, size and speed.

    python -m examples.real.measure --directory runs/real --text DIRECTORY --pairs FILE

Reads DIRECTORY/models.json: a list of objects with `name`, `hf` (a Hugging Face directory), `megatron` and `kind`, the
base model first. Every model is read by transformers' stock class, without this project's model code. Writes
DIRECTORY/measured/NAME.json for each, and costs.json beside them. What is there already is measured again only if the
model, the texts or the settings have changed since.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from generate import load
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from examples.real.inputs import Inputs, Text, other_texts, sentence_pairs, validation_texts
from examples.real.likelihood import WINDOW, bits_per_byte, pair_accuracy
from examples.real.speed import measure_costs
from examples.real.writing import QUESTIONS, answers, continuations
from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import UserError, run_command
from megatron_moe_lpr.files.json_files import read_json, write_json

MODELS = "models.json"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to measure."""

    name: str
    hf: Path

    def file(self, directory: Path) -> Path:
        """Return the file of its figures."""
        return measured_directory(directory) / f"{re.sub('[^a-z0-9]+', '-', self.name.lower()).strip('-')}.json"

    def state(self) -> list[Any]:
        """Return what changes if the model is exported again."""
        files = sorted(path for path in self.hf.iterdir() if path.suffix in (".safetensors", ".json", ".jinja"))
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


@dataclasses.dataclass
class Opened:
    """A model in memory, once something is measured that needs it."""

    model: Model
    weights: PreTrainedModel | None = None

    @property
    def both(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Model and tokenizer."""
        self.weights = self.weights if self.weights is not None else load(self.model.hf)
        return self.weights, tokenizer(self.model.hf)


def measured_directory(directory: Path) -> Path:
    """Return the directory of all figures."""
    return directory / "measured"


def tokenizer(hf: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer as its file has it: AutoTokenizer splits by the rules of some families' names instead."""
    return PreTrainedTokenizerFast.from_pretrained(hf)


def read_models(directory: Path) -> list[Model]:
    """Read the list of models. Raises UserError: there is none, or one of them has no Hugging Face directory."""
    file = directory / MODELS
    try:
        models = [Model(one["name"], Path(one["hf"])) for one in json.loads(file.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; the stages before this one write it") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: a list of models with name and hf expected ({error!r})") from None
    for one in models:
        if not (one.hf / "config.json").is_file():
            raise UserError(f"{file}: {one.name!r}: no Hugging Face directory {one.hf}")
    if not models:
        raise UserError(f"{file}: no model in it")
    return models


def run(directory: Path, settings: Any) -> None:
    """Measure every model that is not measured yet.

    Args:
        directory: holds models.json; gets `measured`.
        settings: mapping or object with `text` and `pairs` (paths or None); other fields of `Inputs` count if there.

    Raises:
        UserError: an input that is missing or malformed.
    """
    inputs, models = Inputs.read(settings), read_models(directory)
    valid, other, pairs = validation_texts(inputs), other_texts(inputs), sentence_pairs(inputs)
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    measured_directory(directory).mkdir(parents=True, exist_ok=True)
    for one in models:
        measure_model(one, directory, inputs, valid, other, pairs)
    measure_costs({one.name: one.hf for one in models}, measured_directory(directory) / "costs.json", _states(models))


def measure_model(
    model: Model, directory: Path, inputs: Inputs, valid: list[Text], other: list[Text], pairs: list[tuple[str, str]]
) -> None:
    """Measure what is missing of a model, and write each part as soon as it is there."""
    opened, file = Opened(model), model.file(directory)
    record = Record(file, model)

    def write_continuations() -> list[dict[str, str]]:
        return continuations(*opened.both, inputs.corpus / "valid", inputs.expanded)

    record.take("text", _texts(valid), lambda: [_text_figures(opened, text) for text in valid])
    record.take("other_text", _texts(other), lambda: [_text_figures(opened, text) for text in other])
    record.take("pairs", pairs, lambda: pair_accuracy(*opened.both, pairs) if pairs else [])
    record.take("answers", QUESTIONS, lambda: answers(*opened.both, model.hf))
    record.take("continuations", [str(inputs.corpus), inputs.expanded], write_continuations)


class Record:
    """The file with the figures of a model, each beside a digest of what it was measured from."""

    def __init__(self, file: Path, model: Model) -> None:
        self.file, self.model = file, model
        self.content: dict[str, Any] = read_json(file) if file.exists() else {"name": model.name, "inputs": {}}

    def take(self, name: str, source: object, action: Callable[[], object]) -> None:
        """Keep the figure `name` if it was measured from the same source with the same model, else measure it."""
        key = digest([self.model.state(), source, WINDOW])
        if self.content["inputs"].get(name) == key:
            print(f"== {self.model.name}, {name}: measured before")
            return
        print(f"== {self.model.name}, {name}", flush=True)
        self.content[name] = action()
        self.content["inputs"][name] = key
        write_json(self.content, self.file)


def digest(source: object) -> str:
    """Return a digest of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(source, ensure_ascii=False).encode()).hexdigest()


def _texts(texts: list[Text]) -> list[Any]:
    return [dataclasses.astuple(one) for one in texts]


def _states(models: list[Model]) -> str:
    return digest([one.state() for one in models])


def _text_figures(opened: Opened, text: Text) -> Mapping[str, Any]:
    """Return bits per byte of a text, its bytes, and its tokens in the model's tokenizer."""
    model, words = opened.both
    return {
        "name": text.name,
        "language": text.language,
        "documents": len(text.documents),
        "bytes": text.num_bytes,
        "tokens": sum(map(len, words(list(text.documents), add_special_tokens=False).input_ids)),
        "bits_per_byte": bits_per_byte(model, words, text.documents),
    }


@dataclasses.dataclass
class Flags:
    """Measure the models of `make real`."""

    directory: Path = Path("runs/real")
    """Directory with models.json."""
    text: Path | None = None
    """Directory with text of another kind: JSON lines with a field `text` in files NAME.LANGUAGE.jsonl."""
    pairs: Path | None = None
    """JSON lines with sentence_good and sentence_bad, as BLiMP has them; good and bad are read too."""
    validation_bytes: int = Inputs.validation_bytes
    """UTF-8 bytes of validation text of each language, at most; whole documents."""
    text_bytes: int = Inputs.text_bytes
    """The same of each file of text of another kind."""
    max_pairs: int = Inputs.max_pairs
    """Pairs to read, evenly over the file."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    run(flags.directory, flags)


if __name__ == "__main__":
    run_command(main)
