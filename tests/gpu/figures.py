"""The figures that these tests compare, in a table at the end of each file: `pytest -s`."""

from rich.console import Console
from rich.table import Table

from tests.gpu.device import EMULATED


class Figures:
    """Rows of one file."""

    def __init__(self, title: str, *columns: str) -> None:
        self.title, self.columns = title, columns
        self.rows: list[tuple[str, ...]] = []

    def add(self, name: str, **values: float | str) -> None:
        """A row: its name, then a value for each column."""
        shown = (value if isinstance(value, str) else f"{value:.2e}" for value in values.values())
        self.rows.append((name, *shown))

    def print(self) -> None:
        """To the terminal, also where pytest keeps the output."""
        table = Table("", *self.columns, title=f"{self.title} ({'emulated device' if EMULATED else 'GPU'})")
        for row in self.rows:
            table.add_row(*row)
        Console(width=120).print(table)
