"""The target `vocabulary-reviews`: reviews of the demo with new tokens, all from the same stage 1.

They differ in what keeps probability from new tokens in text of the original languages (docs/vocabulary.md).
"""

import json

from rich.console import Console
from rich.table import Table
from vocabulary import prepare, quality, train_stage1
from workflow import Training, Workflow

REVIEWS = {
    "rows frozen": ("--no-train-new-rows",),
    "rows train": ("--new-token-loss-coeff", "0"),
    "coefficient 1": ("--new-token-loss-coeff", "1"),
    "coefficient 3": ("--new-token-loss-coeff", "3"),
    "coefficient 10": ("--new-token-loss-coeff", "10"),
    "replay as often as new languages": ("--new-token-loss-coeff", "0"),
}
TWICE = "replay as often as new languages"


def vocabulary_reviews() -> None:
    """Train each review, evaluate it, and print the comparison."""
    flow, arms = prepare()
    arm = train_stage1(arms["with"], arms["without"])
    arm.evaluate("stage1")
    rows = {"stage 1": quality(arm.evaluation("stage1"))}
    for title, flags in REVIEWS.items():
        name = f"review-{title.replace(' ', '-')}"
        data = equal_weights(arm) if title == TWICE else ()
        arm.train(Training(name, f"review, {title}", "2", "stage1", (*flags, *data)))
        arm.evaluate(name)
        rows[title] = quality(arm.evaluation(name))
        print_rows(rows)
    (flow.settings.runs / "reviews.json").write_text(json.dumps(rows, indent=2) + "\n")


def equal_weights(arm: Workflow) -> tuple[str, ...]:
    """Return the flags of a review's data with as much replay as text of the new languages, instead of half of it."""
    settings = arm.settings
    prefixes = (*arm.prefixes(settings.replay, settings.original), *arm.prefixes("train", settings.expanded))
    return "--data-path", *(word for prefix in prefixes for word in ("1", str(prefix)))


def print_rows(rows: dict[str, dict[str, float]]) -> None:
    """Print the figures of the reviews so far."""
    columns = list(next(iter(rows.values())))
    table = Table("review", *(name.replace("_", " ") for name in columns), title="new tokens, after the review")
    for title, values in rows.items():
        table.add_row(title, *(f"{values[name]:.4f}" for name in columns))
    Console().print(table)
