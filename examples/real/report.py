"""Write what `make real` measured as a page, DIRECTORY/report.html, and as Markdown, DIRECTORY/table.md.

python -m examples.real.report --directory runs/real
"""

import dataclasses
from pathlib import Path
from typing import Any

from markupsafe import Markup

import megatron_moe_lpr.evaluation.report
from examples.real.figures import Figures, read_figures
from examples.real.goals import goals
from examples.real.tables import Grid, all_tables, percent
from examples.real.writing import QUESTIONS
from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import name_file_in_oserror, run_command
from megatron_moe_lpr.files.atomic_file import atomic_file
from megatron_moe_lpr.templates import render

STYLE = Path(megatron_moe_lpr.evaluation.report.__file__).with_name("style.css")
PAGE = Path(__file__).with_name("page.html")


def run(directory: Path, settings: Any) -> None:
    """Write the page and the Markdown of a measured directory, and print the tables.

    Args:
        directory: as `measure.run` left it.
        settings: as for `measure.run`.

    Raises:
        UserError: a model is not measured.
    """
    figures = read_figures(directory, settings)
    first, *others = all_tables(figures)
    tables = [first, goals(figures, list(figures.models)[-1]), *others]
    write(directory / "report.html", page(figures, tables))
    write(directory / "table.md", markdown(tables))
    print(tables[0].markdown(), end="")
    print(f"{directory / 'report.html'} and {directory / 'table.md'} written")


def write(file: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    with name_file_in_oserror(file), atomic_file(file) as partial:
        partial.write_text(text, encoding="utf-8")


def markdown(tables: list[Grid]) -> str:
    """Return all tables with their titles and notes."""
    return "\n".join(f"## {one.title}\n\n{one.note}\n\n{one.markdown()}" for one in tables)


def page(figures: Figures, tables: list[Grid]) -> str:
    """Return the HTML of the page; it refers to no other file or address."""
    subject = list(figures.models)[-1]
    return render(
        PAGE,
        style=Markup(STYLE.read_text(encoding="utf-8")),
        figures=figures,
        subject=subject,
        tiles=tiles(figures, subject),
        tables=tables,
        answers=answer_rows(figures, subject),
        continuations=continuation_rows(figures),
    )


def tiles(figures: Figures, subject: str) -> list[tuple[str, str, str]]:
    """Return the figures at the top, each with its meaning and a note."""
    new, old = (f"{figures.change(subject, 'text', group):+.1%}" for group in ("expanded", "original"))
    known = ", ".join(figures.inputs.original)
    found = [
        (new, "bits per byte, new languages", "lower is better"),
        (old, f"bits per byte, {known}", "near 0: nothing was forgotten"),
    ]
    if figures.accuracy(subject) is not None:
        before = percent(figures.accuracy(figures.base))
        found.append((percent(figures.accuracy(subject)), "of grammatical sentences preferred", f"before: {before}"))
    return found


def answer_rows(figures: Figures, subject: str) -> list[tuple[str, str, str, bool]]:
    """Return question, the base model's answer, the extended model's, and whether they are the same."""
    before, after = (figures.models[name]["answers"] for name in (figures.base, subject))
    return [(question, one, two, one == two) for question, one, two in zip(QUESTIONS, before, after, strict=True)]


def continuation_rows(figures: Figures) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Return language, prompt, and each model's continuation."""
    first = figures.models[figures.base]["continuations"]
    return [
        (one["language"], one["prompt"], [(name, m["continuations"][at]["text"]) for name, m in figures.models.items()])
        for at, one in enumerate(first)
    ]


@dataclasses.dataclass
class Flags:
    """Write the report of `make real`."""

    directory: Path = Path("runs/real")
    """Directory that was measured."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    run(flags.directory, flags)


if __name__ == "__main__":
    run_command(main)
