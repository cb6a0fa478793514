"""Print a table of lm_eval's results for several models: accuracy by language."""

import dataclasses
import json
from pathlib import Path

from make_choices import PREFIX
from rich.console import Console
from rich.table import Table

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import UserError, run_command


@dataclasses.dataclass
class Flags:
    """Print the accuracy by language of several models."""

    results: list[str]
    """NAME=DIRECTORY for each model, with the directory of lm_eval's --output_path."""
    languages: list[str]
    """Languages, the columns of the table."""


def main() -> None:
    """Command line."""
    flags = parse_flags(Flags, description=__doc__)
    table = Table("model", *flags.languages, title="right ending among four (chance: 25%)")
    for entry in flags.results:
        name, _, directory = entry.partition("=")
        scores = read_scores(Path(directory))
        table.add_row(name, *(scores[f"{PREFIX}_{language}"] for language in flags.languages))
    Console().print(table)


def read_scores(directory: Path) -> dict[str, str]:
    """Return accuracy and its standard error by task, from the newest results below a directory. Raises UserError."""
    files = sorted(directory.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"--results {directory}: no results_*.json of lm_eval there")
    results = json.loads(files[-1].read_text(encoding="utf-8"))["results"]
    return {task: f"{scores['acc,none']:.1%} ± {scores['acc_stderr,none']:.1%}" for task, scores in results.items()}


if __name__ == "__main__":
    run_command(main)
