"""What the report is made of: files of tools/evaluate.py, logs of training, sample texts."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_moe_lpr.data.labels import dataset_labels
from megatron_moe_lpr.data.language_names import canonical_language
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.report.record import are_costs, are_curves, is_evaluation, is_list_of_texts
from megatron_moe_lpr.evaluation.report.summary import Summary, summarize
from megatron_moe_lpr.files.json_files import is_number
from megatron_moe_lpr.program import command


@dataclasses.dataclass(frozen=True)
class NamedEvaluation:
    """One model's results under the title they have in the report.

    Attributes:
        title: its name.
        records: what tools/evaluate.py wrote; several for runs that differ in their seed.
    """

    title: str
    records: tuple[dict[str, Any], ...]

    @property
    def record(self) -> dict[str, Any]:
        """The first run, where one must stand for all."""
        return self.records[0]

    def labels(self) -> list[str]:
        """What each dataset is called, see `dataset_labels`."""
        return dataset_labels([(one.get("name", ""), one["language"]) for one in self.record["datasets"]])

    def bits(self, position: int) -> Summary | None:
        """Bits per byte of the dataset at this place in the records; None where it has none."""
        return summarize(record["datasets"][position]["bits_per_byte"] for record in self.records)

    def average(self, group: str, name: str = "bits_per_byte") -> Summary | None:
        """Mean over the `original` or `expanded` languages of bits_per_byte or expert0_top_k_share."""
        return summarize(record["averages"][group].get(name) for record in self.records)

    def change(self, group: str, reference: "NamedEvaluation") -> Summary | None:
        """Relative change of a group's bits per byte, for example -0.25, against the mean of `reference`."""
        before = reference.average(group)
        if before is None or not before.mean or self.average(group) is None:
            return None
        return summarize(record["averages"][group]["bits_per_byte"] / before.mean - 1 for record in self.records)

    @property
    def is_moe(self) -> bool:
        """There is routing to show."""
        return any(one["routing"] for one in self.record["datasets"])


@dataclasses.dataclass(frozen=True)
class Curve:
    """How results depend on one setting."""

    title: str
    caption: str
    setting: str
    """Name of the setting, for the axis."""
    points: list[tuple[str, NamedEvaluation]]
    """Value of the setting, as it is written, and the results with it."""


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
    subject: NamedEvaluation
    """The model that the page is about."""
    costs: dict[str, dict[str, float]]
    """By title of an evaluation: parameters, active_parameters and generated_tokens_per_second."""
    curves: list[Curve]

    def languages(self, group: str) -> list[str]:
        """Languages of a group in the order of the first evaluation."""
        datasets = self.evaluations[0].record["datasets"]
        return list(dict.fromkeys(one["language"] for one in datasets if one["group"] == group))

    def columns(self, group: str) -> dict[str, int]:
        """Datasets of a group: what each is called, see `dataset_labels`, and its place in the records."""
        first = self.evaluations[0]
        pairs = zip(first.labels(), first.record["datasets"], strict=True)
        return {label: position for position, (label, one) in enumerate(pairs) if one["group"] == group}


def read_inputs(
    evaluations: list[str],
    metrics: list[str],
    samples: Path | None = None,
    subject: str | None = None,
    costs: Path | None = None,
    curves: Path | None = None,
) -> ReportInputs:
    """Read the files of `TITLE=FILE` arguments; the same title again is another run of the same model.

    Raises:
        UserError: a malformed argument, a missing or foreign file, evaluations of different texts.
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
        logs=[_log(*_split(argument, "--metrics")) for argument in metrics],
        samples=_samples(samples) if samples else [],
        subject=_subject(named, subject),
        costs=_costs(costs, list(files)) if costs else {},
        curves=drawn,
    )


def _subject(evaluations: list[NamedEvaluation], title: str | None) -> NamedEvaluation:
    if title is None:
        return evaluations[:3][-1]
    for one in evaluations:
        if one.title == title:
            return one
    raise UserError(f"--subject {title}: no evaluation has this title")


def _costs(path: Path, titles: list[str]) -> dict[str, dict[str, float]]:
    content = _json(path)
    if not are_costs(content):
        raise UserError(f"--costs {path}: an object of titles is expected, each with a model's parameters and speeds")
    unknown = sorted(set(content) - set(titles))
    if unknown:
        raise UserError(f"--costs {path}: no evaluation is called {unknown[0]!r}")
    return content


def _curves(path: Path) -> list[Curve]:
    content = _json(path)
    if not are_curves(content):
        raise UserError(
            f"--curves {path}: a list of objects with title, caption, setting and points (value, evaluations) is "
            "expected"
        )
    return [
        Curve(
            one["title"],
            one["caption"],
            one["setting"],
            [(point["value"], _evaluation(point["value"], map(Path, point["evaluations"]))) for point in one["points"]],
        )
        for one in content
    ]


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


def _evaluation(title: str, paths: Iterable[Path]) -> NamedEvaluation:
    records = []
    for path in paths:
        records.append(_json(path))
        if not is_evaluation(records[-1]):
            raise UserError(f"--evaluation {path}: not a file of {command('evaluate')} --output")
        for one in records[-1]["datasets"]:
            one["language"] = canonical_language(one["language"])
    return NamedEvaluation(title, tuple(records))


def _check_comparable(first: NamedEvaluation, other: NamedEvaluation) -> None:
    def text(record: dict[str, Any]) -> list[tuple]:
        tokens = [(data["language"], data["group"], data["tokens"]) for data in record["datasets"]]
        return [*tokens, record["sequence_length"]]

    if any(text(record) != text(first.record) for record in other.records):
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
            yield canonical_language(name.removeprefix("lm_loss/")), (tokens, value)


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
