"""The benchmarks' record as one table: means of the original and of the expanded languages, base against final."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from megatron_moe_lpr.evaluation.lm_eval.scores import GROUPS

SCALES = {"acc": 100.0, "acc_norm": 100.0, "bleu": 1.0}
"""From lm_eval's numbers to percent; BLEU goes to 100 as it is."""


def benchmarks_table(record: Mapping[str, Any]) -> Table:
    """A row for each benchmark and group of languages; a dash where lm_eval has none of the group."""
    table = Table("benchmark", "shots", "metric", "languages", title="mean of original, of expanded languages")
    for name in ("base", "final", "difference"):
        table.add_column(name, justify="right")
    for benchmark in record["benchmarks"]:
        scale = SCALES[benchmark["metric"]]
        for group in GROUPS:
            means = benchmark["means"][group]
            head = (benchmark["title"], str(benchmark["shots"]), benchmark["metric"])
            if means is None:
                table.add_row(*head, f"{group}: none", "-", "-", "-")
                continue
            table.add_row(
                *head,
                f"{group}: {' '.join(means['languages'])}",
                f"{means['base'] * scale:.2f}",
                f"{means['final'] * scale:.2f}",
                f"{means['difference'] * scale:+.2f}",
            )
        table.add_section()
    return table
