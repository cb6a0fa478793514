"""What lm_eval found for two models, as a record for programs: by language, and the means of each group."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.lm_eval.tasks import PAIR, ChosenTasks

MODELS = ("base", "final")
GROUPS = ("original", "expanded")

Scores = dict[str, dict[str, float | None]]
"""Language to `value` and `stderr`; shares of right answers from 0 to 1, BLEU from 0 to 100."""


def read_scores(directory: Path, chosen: ChosenTasks) -> Scores:
    """The benchmark's metric of each language from the newest results of lm_eval below a directory.

    Raises:
        UserError: there are none, or they lack a task, or the score is not a number.
    """
    files = sorted(directory.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"{directory}: no results_*.json of lm_eval there")
    try:
        results = json.loads(files[-1].read_text(encoding="utf-8"))["results"]
        return {language: _score(results[task], chosen) for language, task in chosen.tasks.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{files[-1]}: not the results of {', '.join(chosen.tasks.values())} ({error!r})") from None


def _score(result: Mapping[str, Any], chosen: ChosenTasks) -> dict[str, float | None]:
    metric = chosen.benchmark.metric
    value, error = float(result[f"{metric},none"]), result.get(f"{metric}_stderr,none")
    if not math.isfinite(value):
        raise ValueError(f"{metric} is {value}")
    return {"value": value, "stderr": error if isinstance(error, float) else None}


def benchmark_record(
    chosen: ChosenTasks, original: Sequence[str], shots: int, scores: Mapping[str, Scores]
) -> dict[str, Any]:
    """One benchmark of both models.

    Args:
        original: original languages; a translation between two of them counts as original.
        scores: `base` and `final` to what `read_scores` gave.
    """
    languages = {}
    for language, task in chosen.tasks.items():
        parts = language.split(PAIR) if chosen.benchmark.translation else [language]
        languages[language] = {
            "task": task,
            "group": "original" if all(part in original for part in parts) else "expanded",
            **{model: scores[model][language] for model in MODELS},
        }
    return {
        "name": chosen.name,
        "title": chosen.benchmark.title,
        "metric": chosen.benchmark.metric,
        "shots": shots,
        "languages": languages,
        "absent": chosen.absent,
        "means": {group: _means(languages, group) for group in GROUPS},
    }


def _means(languages: Mapping[str, Mapping[str, Any]], group: str) -> dict[str, Any] | None:
    """Of the languages of a group that the benchmark has; None: it has none of them."""
    members = {language: one for language, one in languages.items() if one["group"] == group}
    if not members:
        return None
    means = {model: math.fsum(one[model]["value"] for one in members.values()) / len(members) for model in MODELS}
    return {"languages": list(members), **means, "difference": means["final"] - means["base"]}
