"""The scores of all benchmarks as a table: means over each language group of the base and the final model."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from megatron_moe_lpr.model.moe.language_groups import LANGUAGE_GROUPS

SCALES = {"acc": 100.0, "acc_norm": 100.0, "exact_match": 100.0, "bleu": 1.0}
"""Factors from the metrics of lm_eval to numbers up to 100."""


def benchmarks_table(record: Mapping[str, Any]) -> Table:
    """Return a table with a row for each benchmark and language group, with dashes for a group without tasks, and for
    the chance of a benchmark whose answers are written."""
    table = Table("benchmark", "shots", "metric", "languages", title="mean of original, of expanded languages")
    table.add_column("chance", justify="right")
    for name in ("base", "final", "difference"):
        table.add_column(name, justify="right")
    for benchmark in record["benchmarks"]:
        scale = SCALES[benchmark["metric"]]
        chance = "-" if benchmark["chance"] is None else f"{benchmark['chance'] * scale:.2f}"
        for group in LANGUAGE_GROUPS:
            means = benchmark["means"][group]
            head = (benchmark["title"], str(benchmark["shots"]), benchmark["metric"])
            if means is None:
                table.add_row(*head, f"{group}: none", chance, "-", "-", "-")
                continue
            table.add_row(
                *head,
                f"{group}: {' '.join(means['languages'])}",
                chance,
                f"{means['base'] * scale:.2f}",
                f"{means['final'] * scale:.2f}",
                f"{means['difference'] * scale:+.2f}",
            )
        table.add_section()
    return table
