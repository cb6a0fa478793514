"""The report's tables: bits per byte for each language, and their change against the first model."""

from collections.abc import Callable, Iterator
from html import escape

from rich.console import Console
from rich.table import Table

from megatron_moe_lpr.evaluation.report.inputs import NamedEvaluation, ReportInputs
from megatron_moe_lpr.evaluation.report.summary import Summary
from megatron_moe_lpr.model.moe.language_groups import LANGUAGE_GROUPS

COSTS = ("parameters", "of them active", "tokens/s")


def percent(value: Summary | None) -> str:
    """`-25.0%`, or a dash where there is nothing to say."""
    return _with_spread(value, "{:+.1%}", lambda spread: f"{spread * 100:.1f}")


def number(value: Summary | None) -> str:
    """Bits per byte."""
    return _with_spread(value, "{:.3f}", lambda spread: f"{spread:.3f}")


def _mean(value: Summary | None) -> str:
    # Of a single language without the spread: the columns are many.
    return number(None if value is None else Summary(value.mean))


def share(value: Summary | None) -> str:
    """`97.1%`, or a dash for a dense model."""
    return _with_spread(value, "{:.1%}", lambda spread: f"{spread * 100:.1f}")


def _with_spread(value: Summary | None, pattern: str, spread: Callable[[float], str]) -> str:
    if value is None:
        return "–"
    return pattern.format(value.mean) + ("" if value.spread is None else f" ±{spread(value.spread)}")


def rows(inputs: ReportInputs) -> Iterator[tuple[NamedEvaluation, list[str]]]:
    """Each model's cells: for each group its datasets, their mean and its change; expert 0's share; what it costs."""
    first = inputs.evaluations[0]
    for one in inputs.evaluations:
        cells = []
        for group in LANGUAGE_GROUPS:
            cells += [_mean(one.bits(position)) for position in inputs.columns(group).values()]
            cells += [number(one.average(group)), "" if one is first else percent(one.change(group, first))]
        cells.append(share(one.average("original", "expert0_top_k_share")))
        yield one, [*cells, *(_costs(one.title, inputs) if inputs.costs else [])]


def _costs(title: str, inputs: ReportInputs) -> list[str]:
    costs, first = inputs.costs.get(title), inputs.costs.get(inputs.evaluations[0].title)
    if not costs:
        return ["–"] * len(COSTS)
    speed = costs["generated_tokens_per_second"]
    relative = f" ({speed / first['generated_tokens_per_second']:.2f}x)" if first and first is not costs else ""
    return [*(f"{costs[name] / 1e6:,.2f}M" for name in ("parameters", "active_parameters")), f"{speed:,.0f}{relative}"]


def print_table(inputs: ReportInputs, console: Console | None = None) -> None:
    """The table for a terminal."""
    console = console or Console(width=200)
    table = Table("model", title="Bits per byte, lower is better", title_justify="left")
    for group in LANGUAGE_GROUPS:
        for label in inputs.columns(group):
            table.add_column(label, justify="right")
        table.add_column(f"{group} mean", justify="right", style="bold")
        table.add_column("change", justify="right")
    table.add_column("expert 0 chosen, original", justify="right")
    for name in COSTS if inputs.costs else ():
        table.add_column(name, justify="right")
    for one, cells in rows(inputs):
        table.add_row(one.title, *cells)
    console.print(table)


def html_table(inputs: ReportInputs) -> str:
    """The table for the page."""
    groups = "".join(
        f'<th colspan="{len(inputs.columns(group)) + 2}" class="group {group}">{group} languages</th>'
        for group in LANGUAGE_GROUPS
    )
    names = "".join(
        "".join(f"<th>{escape(label)}</th>" for label in inputs.columns(group))
        + '<th class="mean">mean</th><th>change</th>'
        for group in LANGUAGE_GROUPS
    )
    more = "".join(f'<th rowspan="2">{name}</th>' for name in COSTS) if inputs.costs else ""
    body = "".join(
        f"<tr{' class=subject' if one is inputs.subject else ''}><th>{escape(one.title)}</th>"
        f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for one, cells in rows(inputs)
    )
    return (
        f'<div class="wide"><table><thead><tr><th rowspan="2">model</th>{groups}'
        f'<th rowspan="2">expert 0 chosen<br>(original)</th>{more}</tr><tr>{names}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
