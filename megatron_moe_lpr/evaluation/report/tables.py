"""The report's table: bits per byte for each language, and their change from the first model."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from megatron_moe_lpr.evaluation.report.inputs import NamedEvaluation, ReportInputs
from megatron_moe_lpr.evaluation.report.summary import Summary
from megatron_moe_lpr.model.moe.language_groups import LANGUAGE_GROUPS

COSTS = ("parameters", "of them active", "tokens/s")


def percent(value: Summary | None) -> str:
    """Format a relative change as `-25.0%`; a dash for None."""
    return _with_spread(value, "{:+.1%}", "{:.1f}", 100)


def fraction(value: Summary | None) -> str:
    """Format a fraction as `97.1%`; a dash for None."""
    return _with_spread(value, "{:.1%}", "{:.1f}", 100)


def number(value: Summary | None) -> str:
    """Format bits per byte as `2.010`; a dash for None."""
    return _with_spread(value, "{:.3f}", "{:.3f}")


def _with_spread(value: Summary | None, mean: str, spread: str, scale: float = 1) -> str:
    if value is None:
        return "–"
    return mean.format(value.mean) + ("" if value.spread is None else f" ±{spread.format(value.spread * scale)}")


def rows(inputs: ReportInputs) -> Iterator[tuple[NamedEvaluation, list[str]]]:
    """Yield each model's cells: for each group its datasets, their mean and its change; expert 0's fraction;
    where some model has new tokens, their probability; costs."""
    first = inputs.evaluations[0]
    for one in inputs.evaluations:
        cells = []
        for group in LANGUAGE_GROUPS:
            bits = (one.bits(position) for position in inputs.columns(group).values())
            # The spread only for the mean: there are many columns.
            cells += [number(value and Summary(value.mean)) for value in bits]
            cells += [number(one.average(group)), "" if one is first else percent(one.change(group, first))]
        cells.append(fraction(one.average("original", "expert0_top_k_share")))
        if inputs.has_new_tokens:
            cells.append(fraction(one.average("original", "new_token_mass")))
        yield one, [*cells, *(_costs(one.title, inputs) if inputs.costs else [])]


def _costs(title: str, inputs: ReportInputs) -> list[str]:
    costs, first = inputs.costs.get(title), inputs.costs.get(inputs.evaluations[0].title)
    if not costs:
        return ["–"] * len(COSTS)
    speed = costs.generated_tokens_per_second
    relative = f" ({speed / first.generated_tokens_per_second:.2f}x)" if first and first is not costs else ""
    sizes = (costs.parameters, costs.active_parameters)
    return [*(f"{size / 1e6:,.2f}M" for size in sizes), f"{speed:,.0f}{relative}"]


def print_table(inputs: ReportInputs, console: Console | None = None) -> None:
    """Print the table in a terminal."""
    console = console or Console(width=200)
    table = Table("model", title="Bits per byte, lower is better", title_justify="left")
    for group in LANGUAGE_GROUPS:
        for label in inputs.columns(group):
            table.add_column(label, justify="right")
        table.add_column(f"{group} mean", justify="right", style="bold")
        table.add_column("change", justify="right")
    original = "base experts" if inputs.subject.record.has_mixture_base else "expert 0"
    table.add_column(f"{original} chosen, original", justify="right")
    if inputs.has_new_tokens:
        table.add_column("mass on new tokens, original", justify="right")
    for name in COSTS if inputs.costs else ():
        table.add_column(name, justify="right")
    for one, cells in rows(inputs):
        table.add_row(one.title, *cells)
    console.print(table)
