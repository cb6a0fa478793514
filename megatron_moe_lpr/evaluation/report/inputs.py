"""What the report is made of: files of tools/evaluate.py, logs of training, sample texts."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.report.record import is_evaluation, is_list_of_texts
from megatron_moe_lpr.json_files import is_number

Averages = dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class NamedEvaluation:
    """One model's results under the title they have in the report."""

    title: str
    record: dict[str, Any]

    def bits(self, language: str) -> float | None:
        """Bits per byte of a language; None where it was not evaluated."""
        return next((one["bits_per_byte"] for one in self.record["datasets"] if one["language"] == language), None)

    def averages(self, group: str) -> Averages:
        """loss, bits_per_byte, expert0_probability and expert0_top_k_share of `original` or `expanded` languages."""
        return self.record["averages"][group]

    @property
    def is_moe(self) -> bool:
        """There is routing to show."""
        return any(one["routing"] for one in self.record["datasets"])


@dataclasses.dataclass(frozen=True)
class TrainingLog:
    """The loss of one run over its steps."""

    title: str
    losses: dict[str, list[tuple[float, float]]]
    """Language to (tokens seen, loss per token) of each log interval."""


@dataclasses.dataclass(frozen=True)
class ReportInputs:
    """All of it."""

    evaluations: list[NamedEvaluation]
    """The first is what the others are compared with."""
    logs: list[TrainingLog]
    samples: list[dict[str, str]]
    """`language`, `prompt` and `text` of generated continuations."""

    def languages(self, group: str) -> list[str]:
        """Languages of a group in the order of the first evaluation."""
        return [one["language"] for one in self.evaluations[0].record["datasets"] if one["group"] == group]


def read_inputs(evaluations: list[str], metrics: list[str], samples: Path | None) -> ReportInputs:
    """Read the files of `TITLE=FILE` arguments.

    Raises:
        UserError: a malformed argument, a missing or foreign file, evaluations of different texts.
    """
    if not evaluations:
        raise UserError("--evaluation: give at least one TITLE=FILE")
    named = [_evaluation(*_split(argument, "--evaluation")) for argument in evaluations]
    for one in named[1:]:
        _check_comparable(named[0], one)
    logs = [_log(*_split(argument, "--metrics")) for argument in metrics]
    return ReportInputs(named, logs, _samples(samples) if samples else [])


def _samples(path: Path) -> list[dict[str, str]]:
    content = _json(path)
    if not is_list_of_texts(content, ("language", "prompt", "text")):
        raise UserError(f"--samples {path}: a list of objects with language, prompt and text is expected")
    return content


def _split(argument: str, flag: str) -> tuple[str, Path]:
    title, separator, path = argument.rpartition("=")
    if not separator or not title:
        raise UserError(f"{flag} {argument}: write TITLE=FILE")
    return title, Path(path)


def _evaluation(title: str, path: Path) -> NamedEvaluation:
    record = _json(path)
    if not is_evaluation(record):
        raise UserError(f"--evaluation {path}: not a file of tools/evaluate.py --output")
    return NamedEvaluation(title, record)


def _check_comparable(first: NamedEvaluation, other: NamedEvaluation) -> None:
    def text(one: NamedEvaluation) -> list[tuple]:
        return [(data["language"], data["group"], data["tokens"]) for data in one.record["datasets"]]

    if text(first) != text(other) or first.record["sequence_length"] != other.record["sequence_length"]:
        raise UserError(
            f"--evaluation: {first.title!r} and {other.title!r} were evaluated on different texts or sequence lengths"
        )


def _log(title: str, path: Path) -> TrainingLog:
    losses: dict[str, dict[float, float]] = {}
    lines = _read(path).split("\n")
    if not lines[-1].endswith("}"):
        # Nothing, or what a kill or a full disk has cut short.
        lines.pop()
    for number, line in enumerate(lines, 1):
        for name, value in _training_losses(line, f"--metrics {path}:{number}"):
            # A resumed run of an older version logs a step again: the later line counts.
            losses.setdefault(name, {})[value[0]] = value[1]
    return TrainingLog(title, {language: sorted(points.items()) for language, points in losses.items()})


def _training_losses(line: str, place: str) -> Iterator[tuple[str, tuple[float, float]]]:
    """Language and (tokens seen, loss) of a line; none of a line of another kind."""
    try:
        entry = json.loads(line)
        is_training, tokens = entry["kind"] == "train", entry.get("consumed_tokens", 0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{place}: not a line of a training log ({error})") from None
    for name, value in entry.items() if is_training else ():
        if name.startswith("lm_loss/"):
            if not is_number(value) or not is_number(tokens):
                raise UserError(f"{place}: not a line of a training log ({name} is no number)")
            yield name.removeprefix("lm_loss/"), (tokens, value)


def _json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a text file: {error}") from None
