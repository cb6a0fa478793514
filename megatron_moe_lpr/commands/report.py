"""Compare evaluations in one self-contained HTML file: the table, expert 0's share by layer and language, loss curves.

tools/report.py --evaluation "Base model=base.json" "Stage 1=stage1.json" "Stage 2=stage2.json" --output report.html
"""

import dataclasses
from pathlib import Path

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import naming
from megatron_moe_lpr.evaluation.report.inputs import read_inputs
from megatron_moe_lpr.evaluation.report.page import build_page
from megatron_moe_lpr.evaluation.report.tables import print_table
from megatron_moe_lpr.files.filesystem import atomic_file, check_output_file


@dataclasses.dataclass(frozen=True)
class Flags:
    """Compare evaluations in one HTML file."""

    evaluation: list[str]
    """TITLE=FILE of tools/evaluate.py --output; the first is the base of comparison. Same TITLE again: another seed."""
    output: Path
    """HTML file to write."""
    metrics: list[str] = dataclasses.field(default_factory=list)
    """TITLE=FILE of a run's metrics.jsonl, for its loss curves."""
    samples: Path | None = None
    """JSON file with generated text: a list of objects with language, prompt and text."""
    subject: str | None = None
    """Title of the evaluation that the page is about. Default: the third (after base and stage 1), or the last."""
    costs: Path | None = None
    """JSON file of examples/demo/costs.py: adds columns for parameters and speed."""
    curves: Path | None = None
    """JSON file with curves, as examples/demo/curves.py writes it."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    named = [Path(argument.rpartition("=")[2]) for argument in (*flags.evaluation, *flags.metrics)]
    others = [path for path in (flags.samples, flags.costs, flags.curves) if path]
    check_output_file(flags.output, "--output", [*named, *others])
    inputs = read_inputs(flags.evaluation, flags.metrics, flags.samples, flags.subject, flags.costs, flags.curves)
    page = build_page(inputs)
    print_table(inputs)
    with naming(flags.output), atomic_file(flags.output) as partial:
        partial.write_text(page, encoding="utf-8")
