"""Scores that lm_eval measured for two models, as JSON: by language, and the means of each language group."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.lm_eval.tasks import PAIR, ChosenTasks
from megatron_moe_lpr.model.moe.language_groups import LANGUAGE_GROUPS

MODELS = ("base", "final")

Scores = dict[str, dict[str, float | None]]
"""By language: `value` and `stderr`; fractions of right answers from 0 to 1, BLEU from 0 to 100."""


def read_scores(directory: Path, chosen: ChosenTasks) -> Scores:
    """Read the benchmark's metric of each language from the newest results of lm_eval below a directory.

    Raises:
        UserError: there are no results, they lack a task, or a score is not a finite number.
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
    metric, filters = chosen.benchmark.metric, chosen.benchmark.filters
    found_by = next((name for name in filters if f"{metric},{name}" in result), filters[0])
    value, error = float(result[f"{metric},{found_by}"]), result.get(f"{metric}_stderr,{found_by}")
    if not math.isfinite(value):
        raise ValueError(f"{metric} is {value}")
    return {"value": value, "stderr": error if isinstance(error, float) else None}


def benchmark_record(
    chosen: ChosenTasks, original: Sequence[str], shots: int, scores: Mapping[str, Scores]
) -> dict[str, Any]:
    """Return the JSON object of one benchmark with the scores of both models.

    Args:
        original: original languages; a translation between two of them counts as original.
        shots: examples in the prompt.
        scores: results of `read_scores` for `base` and `final`.
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
        "chance": chosen.benchmark.chance,
        "shots": shots,
        "languages": languages,
        "absent": chosen.absent,
        "means": {group: _means(languages, group) for group in LANGUAGE_GROUPS},
    }


def _means(languages: Mapping[str, Mapping[str, Any]], group: str) -> dict[str, Any] | None:
    """Return the means over a language group; None if the benchmark has no language of it."""
    members = {language: one for language, one in languages.items() if one["group"] == group}
    if not members:
        return None
    means = {model: math.fsum(one[model]["value"] for one in members.values()) / len(members) for model in MODELS}
    return {"languages": list(members), **means, "difference": means["final"] - means["base"]}
