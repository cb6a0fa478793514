"""Check which of the demo's targets a run of the demo has reached, by its evaluations."""

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import run_command
from megatron_moe_lpr.evaluation.report.inputs import NamedEvaluation, read_inputs

NAMES = ("base", "stage1", "stage2", "dense_full")


@dataclasses.dataclass
class Flags:
    """Check which of the demo's targets a run of the demo has reached."""

    evaluations: Path
    """Directory with base.json, stage1.json, stage2.json and dense_full.json."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    inputs = read_inputs([f"{name}={flags.evaluations / name}.json" for name in NAMES], [])
    table = Table("target", "reached", "", title="Targets", title_justify="left")
    for target, figure, is_reached in targets(*inputs.evaluations):
        table.add_row(target, figure, "yes" if is_reached else "no")
    Console().print(table)


def targets(
    base: NamedEvaluation, stage1: NamedEvaluation, stage2: NamedEvaluation, dense_full: NamedEvaluation
) -> list[tuple[str, str, bool]]:
    """Return each target, its figure, and whether it is reached."""
    expanded, original = (stage2.change(group, base).mean for group in ("expanded", "original"))
    forgotten = dense_full.change("original", base).mean
    cost = stage2.change("expanded", stage1).mean
    chosen = stage2.average("original", "expert0_top_k_share").mean
    return [
        ("expanded at least 25% lower", f"{expanded:+.1%}", expanded <= -0.25),
        ("original within 1% of the base model", f"{original:+.2%}", original <= 0.01),
        (
            "full fine-tuning loses at least five times as much of the original",
            f"{forgotten:+.1%}",
            forgotten >= 5 * max(original, 0.0),
        ),
        ("expert 0 in the top 2 for 95% of original-language tokens", f"{chosen:.1%}", chosen >= 0.95),
        ("the review costs the expanded languages at most 1%", f"{cost:+.2%}", cost <= 0.01),
    ]


if __name__ == "__main__":
    run_command(main)
