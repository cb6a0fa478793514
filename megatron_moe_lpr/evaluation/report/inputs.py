"""The contents of a report: evaluations, training logs, samples, costs and curves, read from the files of its flags."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_moe_lpr.data.labels import dataset_labels
from megatron_moe_lpr.data.language_names import canonical_language
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.report.record import (
    Costs,
    CurveFile,
    Dataset,
    EvaluationRecord,
    Sample,
    read_bytes,
    read_record,
)
from megatron_moe_lpr.evaluation.report.summary import Summary, summarize
from megatron_moe_lpr.files.json_files import is_number
from megatron_moe_lpr.program import command

COSTS_FILE = "an object with parameters, active_parameters and generated_tokens_per_second for each title"
CURVES_FILE = "a list of objects with title, caption, setting and points (value, evaluations)"
SAMPLES_FILE = "a list of objects with language, prompt and text"


@dataclasses.dataclass(frozen=True)
class NamedEvaluation:
    """The results of one model.

    Attributes:
        title: the model's name in the report.
        records: one for each training run of the model; runs differ in their seed.
    """

    title: str
    records: tuple[EvaluationRecord, ...]

    @property
    def record(self) -> EvaluationRecord:
        """The first run, for what is the same in all runs."""
        return self.records[0]

    def labels(self) -> list[str]:
        """Return a label for each dataset, see `dataset_labels`."""
        return dataset_labels([(one.name, one.language) for one in self.record.datasets])

    def bits(self, position: int) -> Summary | None:
        """Return the bits per byte of the dataset at `position` in the records; None: not measured."""
        return summarize(record.datasets[position].bits_per_byte for record in self.records)

    def average(self, group: str, name: str = "bits_per_byte") -> Summary | None:
        """Return the mean over a language group of a field of `Averages`."""
        return summarize(getattr(record.averages[group], name) for record in self.records)

    def change(self, group: str, reference: "NamedEvaluation") -> Summary | None:
        """Return the relative change of a group's bits per byte, such as -0.25, from the mean of `reference`."""
        before = reference.average(group)
        after = [record.averages[group].bits_per_byte for record in self.records]
        if before is None or not before.mean:
            return None
        return summarize(None if value is None else value / before.mean - 1 for value in after)

    @property
    def is_moe(self) -> bool:
        """Whether the records hold routing."""
        return any(one.routing for one in self.record.datasets)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Results over the values of one setting."""

    title: str
    caption: str
    setting: str
    """Name of the setting, for the axis."""
    points: list[tuple[str, NamedEvaluation]]
    """A value of the setting as text, and the results with it."""


@dataclasses.dataclass(frozen=True)
class TrainingLog:
    """The losses of one training run."""

    title: str
    losses: dict[str, list[tuple[float, float]]]
    """By language: (tokens seen, loss per token) of each log interval."""


@dataclasses.dataclass(frozen=True)
class ReportInputs:
    """The contents of a report."""

    evaluations: list[NamedEvaluation]
    """The others are compared with the first."""
    logs: list[TrainingLog]
    samples: list[Sample]
    subject: NamedEvaluation
    """The model that the page is about."""
    costs: dict[str, Costs]
    """By title of an evaluation."""
    curves: list[Curve]

    @property
    def has_new_tokens(self) -> bool:
        """Whether any of the models has an extended vocabulary."""
        return any(one.average("original", "new_token_mass") for one in self.evaluations)

    def languages(self, group: str) -> list[str]:
        """Return the languages of a group in the order of the first evaluation."""
        return list(dict.fromkeys(one.language for one in self.evaluations[0].record.datasets if one.group == group))

    def columns(self, group: str) -> dict[str, int]:
        """Return the datasets of a group: label, see `dataset_labels`, to position in the records."""
        first = self.evaluations[0]
        pairs = zip(first.labels(), first.record.datasets, strict=True)
        return {label: position for position, (label, one) in enumerate(pairs) if one.group == group}


def read_inputs(
    evaluations: list[str],
    metrics: list[str],
    samples: Path | None = None,
    subject: str | None = None,
    costs: Path | None = None,
    curves: Path | None = None,
) -> ReportInputs:
    """Read the files of a report.

    Args:
        evaluations: `TITLE=FILE` of results of `moe-lpr evaluate`; the same title again is another run of that model.
        metrics: `TITLE=FILE` of runs' metrics.jsonl.
        subject: title of the model that the page is about. Default: the third, or the last of fewer.

    Raises:
        UserError: a malformed argument, a file that is missing or of another kind, evaluations of different texts.
    """
    if not evaluations:
        raise UserError("--evaluation: give at least one TITLE=FILE")
    files: dict[str, list[Path]] = {}
    for argument in evaluations:
        title, path = _split(argument, "--evaluation")
        files.setdefault(title, []).append(path)
    named = [_evaluation(title, paths) for title, paths in files.items()]
    drawn = _curves(curves) if curves else []
    for one in [*named, *(point for curve in drawn for _, point in curve.points)]:
        _check_comparable(named[0], one)
    return ReportInputs(
        evaluations=named,
        logs=[read_training_log(*_split(argument, "--metrics")) for argument in metrics],
        samples=read_record(samples, list[Sample], f"--samples {samples}", SAMPLES_FILE) if samples else [],
        subject=_subject(named, subject),
        costs=_costs(costs, list(files)) if costs else {},
        curves=drawn,
    )


def _subject(evaluations: list[NamedEvaluation], title: str | None) -> NamedEvaluation:
    if title is None:
        return evaluations[min(2, len(evaluations) - 1)]  # after the base model and stage 1
    for one in evaluations:
        if one.title == title:
            return one
    raise UserError(f"--subject {title}: no evaluation has this title")


def _costs(path: Path, titles: list[str]) -> dict[str, Costs]:
    costs = read_record(path, dict[str, Costs], f"--costs {path}", COSTS_FILE)
    unknown = sorted(set(costs) - set(titles))
    if unknown:
        raise UserError(f"--costs {path}: no evaluation is called {unknown[0]!r}")
    return costs


def _curves(path: Path) -> list[Curve]:
    curves = read_record(path, list[CurveFile], f"--curves {path}", CURVES_FILE)
    return [
        Curve(
            one.title,
            one.caption,
            one.setting,
            [(point.value, _evaluation(point.value, point.evaluations)) for point in one.points],
        )
        for one in curves
    ]


def _split(argument: str, flag: str) -> tuple[str, Path]:
    title, separator, path = argument.rpartition("=")
    if not separator or not title:
        raise UserError(f"{flag} {argument}: write TITLE=FILE")
    return title, Path(path)


def _evaluation(title: str, paths: Iterable[Path]) -> NamedEvaluation:
    expected = f"a file of {command('evaluate')} --output"
    records = (read_record(path, EvaluationRecord, f"--evaluation {path}", expected) for path in paths)
    return NamedEvaluation(title, tuple(records))


def _check_comparable(first: NamedEvaluation, other: NamedEvaluation) -> None:
    expected = first.record
    for record in other.records:
        is_same = (
            record.sequence_length == expected.sequence_length
            and record.reset_attention_mask == expected.reset_attention_mask
            and len(record.datasets) == len(expected.datasets)
        )
        if not is_same or not all(map(Dataset.is_text_of, record.datasets, expected.datasets)):
            raise UserError(
                f"--evaluation: {first.title!r} and {other.title!r} were evaluated on different texts or sequence "
                "lengths, or with other flags of --pack, --pack-apart and --reset-attention-mask"
            )


def read_training_log(title: str, path: Path) -> TrainingLog:
    """Read the losses of a run from its metrics.jsonl.

    Raises:
        UserError: the file cannot be read, or a line is not a record of a run.
    """
    losses: dict[str, dict[float, tuple[int, float]]] = {}
    """By language and tokens seen: iteration and loss."""
    try:
        lines = read_bytes(path, f"--metrics {path}").decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--metrics {path}: not a text file: {error}") from None
    if not lines[-1].endswith("}"):
        # Empty, or cut short by a kill or a full disk.
        lines.pop()
    for number, line in enumerate(lines, 1):
        record = _log_record(line, f"--metrics {path}:{number}")
        iteration = record.get("iteration", 0)
        if record["kind"] == "resume":
            # The run went back to an earlier checkpoint: later steps that it had logged do not count any more.
            for points in losses.values():
                for tokens in [tokens for tokens, (step, _) in points.items() if step > iteration]:
                    del points[tokens]
        elif record["kind"] == "train":
            for name in (name for name in record if name.startswith("lm_loss/")):
                language = canonical_language(name.removeprefix("lm_loss/"))
                # Of a step that is logged twice the later line counts.
                losses.setdefault(language, {})[record.get("consumed_tokens", 0)] = iteration, record[name]
    curves = {
        language: sorted((tokens, loss) for tokens, (_, loss) in points.items()) for language, points in losses.items()
    }
    return TrainingLog(title, {language: points for language, points in curves.items() if points})


def _log_record(line: str, place: str) -> dict[str, Any]:
    """Parse a line of metrics.jsonl. Raises UserError if it has no kind, or something else in place of a number."""
    try:
        record = json.loads(line)
        known = ("iteration", "consumed_tokens", *(name for name in record if name.startswith("lm_loss/")))
        wrong = [name for name in known if not is_number(record.get(name, 0))]
        record["kind"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{place}: not a line of a training log ({error})") from None
    if wrong:
        raise UserError(f"{place}: not a line of a training log ({wrong[0]} is no number)")
    return record
