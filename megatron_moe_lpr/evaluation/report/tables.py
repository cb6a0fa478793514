"""The report's tables: bits per byte for each language, and their change against the first model."""

from collections.abc import Iterator
from html import escape

from rich.console import Console
from rich.table import Table

from megatron_moe_lpr.evaluation.report.inputs import NamedEvaluation, ReportInputs
from megatron_moe_lpr.model.routing_groups import GROUPS


def change(value: float | None, reference: float | None) -> float | None:
    """Relative change, for example -0.25."""
    return None if value is None or not reference else value / reference - 1


def percent(value: float | None) -> str:
    """`-25.0%`, or a dash where there is nothing to say."""
    return "–" if value is None else f"{value:+.1%}"


def number(value: float | None) -> str:
    """Bits per byte."""
    return "–" if value is None else f"{value:.3f}"


def share(value: float | None) -> str:
    """`97.1%`, or a dash for a dense model."""
    return "–" if value is None else f"{value:.1%}"


def rows(inputs: ReportInputs) -> Iterator[tuple[NamedEvaluation, list[str]]]:
    """Each model's cells: for each group its languages, their mean and its change; last expert 0's share."""
    first = inputs.evaluations[0]
    for one in inputs.evaluations:
        cells = []
        for group in GROUPS:
            mean = one.averages(group)["bits_per_byte"]
            cells += [number(one.bits(language)) for language in inputs.languages(group)]
            cells += [
                number(mean),
                "" if one is first else percent(change(mean, first.averages(group)["bits_per_byte"])),
            ]
        yield one, [*cells, share(one.averages("original").get("expert0_top_k_share"))]


def print_table(inputs: ReportInputs, console: Console | None = None) -> None:
    """The table for a terminal."""
    console = console or Console(width=160)
    table = Table("model", title="Bits per byte, lower is better", title_justify="left")
    for group in GROUPS:
        for language in inputs.languages(group):
            table.add_column(language, justify="right")
        table.add_column(f"{group} mean", justify="right", style="bold")
        table.add_column("change", justify="right")
    table.add_column("expert 0 chosen, original", justify="right")
    for one, cells in rows(inputs):
        table.add_row(one.title, *cells)
    console.print(table)


def html_table(inputs: ReportInputs) -> str:
    """The table for the page."""
    groups = "".join(
        f'<th colspan="{len(inputs.languages(group)) + 2}" class="group {group}">{group} languages</th>'
        for group in GROUPS
    )
    names = "".join(
        "".join(f"<th>{escape(language)}</th>" for language in inputs.languages(group))
        + '<th class="mean">mean</th><th>change</th>'
        for group in GROUPS
    )
    body = "".join(
        f"<tr><th>{escape(one.title)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for one, cells in rows(inputs)
    )
    return (
        f'<div class="wide"><table><thead><tr><th rowspan="2">model</th>{groups}'
        f'<th rowspan="2">expert 0 chosen<br>(original)</th></tr><tr>{names}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
