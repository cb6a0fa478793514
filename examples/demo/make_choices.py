"""A multiple-choice task for lm_eval out of a corpus: which of four endings continues the passage?

The right ending is the passage's own; the three wrong ones continue passages of other documents of the same language.
"""

import dataclasses
import json
import random
from pathlib import Path

from corpus import texts

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import UserError, run_command
from megatron_moe_lpr.files.output_directory import atomic_directory

CHOICES = 4
PREFIX = "continuation"


@dataclasses.dataclass
class Flags:
    """Which of four endings continues the passage: a task for lm_eval."""

    corpus: Path
    """Directory with LANGUAGE.jsonl.zst."""
    languages: list[str]
    """One task for each."""
    output: Path
    """Directory to write: LANGUAGE.jsonl and continuation_LANGUAGE.yaml, for lm_eval's --include_path."""
    questions: int = 200
    """For each language."""
    context_characters: int = 200
    """Length of the passage."""
    choice_characters: int = 40
    """Length of an ending."""
    seed: int = 1234
    """Decides the passages and the order of the endings."""


def main() -> None:
    """Command line."""
    flags = parse_flags(Flags, description=__doc__)
    with atomic_directory(flags.output, overwrite=True) as directory:
        for language in flags.languages:
            documents = list(texts([str(flags.corpus / f"{language}.jsonl.zst")]))
            questions = make_questions(documents, flags)
            lines = [json.dumps(question, ensure_ascii=False) + "\n" for question in questions]
            (directory / f"{language}.jsonl").write_text("".join(lines), encoding="utf-8")
            task = directory / f"{PREFIX}_{language}.yaml"
            task.write_text(task_text(language, flags.output.resolve() / f"{language}.jsonl"), encoding="utf-8")


def make_questions(documents: list[str], flags: Flags) -> list[dict[str, str | list[str] | int]]:
    """Passages spread over the documents, each with its own ending and those of three other documents.

    Raises:
        UserError: fewer than four documents are long enough.
    """
    generator = random.Random(flags.seed)
    length = flags.context_characters + flags.choice_characters
    documents = [document for document in documents if len(document) > 2 * length]
    if len(documents) < CHOICES:
        raise UserError(f"--corpus {flags.corpus}: {len(documents)} documents are long enough, {CHOICES} are needed")
    questions = []
    for number in range(flags.questions):
        own = number % len(documents)
        others = generator.sample([index for index in range(len(documents)) if index != own], CHOICES - 1)
        context, ending = passage(documents[own], flags, generator)
        choices = [ending] + [passage(documents[index], flags, generator)[1] for index in others]
        generator.shuffle(choices)
        questions.append({"context": context, "choices": choices, "answer": choices.index(ending)})
    return questions


def passage(document: str, flags: Flags, generator: random.Random) -> tuple[str, str]:
    """A passage from anywhere in a document and what follows; between words where the language has spaces."""
    length = flags.context_characters + flags.choice_characters
    start = generator.randrange(len(document) - length)
    text = document[start : start + length]
    cut = text.rfind(" ", flags.context_characters // 2, flags.context_characters)
    cut = flags.context_characters if cut < 0 else cut
    return text[:cut], text[cut : cut + flags.choice_characters]


def task_text(language: str, data: Path) -> str:
    """The task as lm_eval reads it; the ending begins with the space that separates it."""
    return f"""\
task: {PREFIX}_{language}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {json.dumps(str(data))}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


if __name__ == "__main__":
    run_command(main)
