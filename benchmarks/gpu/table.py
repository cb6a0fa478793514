"""The table of the first hour on a GPU."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = ("layers x micro-batch", "tokens/s", "MFU", "memory, GB", "launches", "host-bound", "loss")
PEAK_TFLOPS = {
    "B200": 2250.0,
    "MI325X": 1307.0,
    "MI300X": 1307.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "GH200": 989.0,
    "A100": 312.0,
    "A10G": 70.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""Dense bf16 products with sums in fp32, by a part of the device's name, from the makers' data sheets."""


def peak_tflops(name: str) -> float | None:
    """Peak of a device in bf16; None: unknown. Names are parts of longer ones: the longest that fits counts."""
    fitting = [part for part in PEAK_TFLOPS if part in name]
    return PEAK_TFLOPS[max(fitting, key=len)] if fitting else None


def print_table(device: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print a row for each part; a part that failed has its reason instead of figures."""
    emulated = device["emulated"]
    words = "EMULATED: shows that the program runs, no speed" if emulated else _speed(device)
    title = f"{device['name']}, PyTorch {device['torch']}, {device['built_for']} ({words})"
    table = Table("part", *COLUMNS, title=title)
    for row in rows:
        table.add_row(row["part"], *_cells(row))
    console = console or Console(width=150)
    console.print(table)
    for row in rows:
        if row["status"] != "passed":
            console.print(f"{row['status']}: {row['part']}: {row.get('reason', '')}", markup=False, highlight=False)


def _speed(device: Mapping[str, Any]) -> str:
    peak = peak_tflops(device["name"])
    known = "peak unknown: MFU is the share of this product" if peak is None else f"peak {peak:.0f}"
    return f"a large product: {device['product_tflops']:.0f} TFLOP/s, {known}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "layers" not in row or row["status"] != "passed":
        return [row["status"]]
    figures = (
        _shown(row["tokens_per_second"], ",.0f"),
        _shown(row["mfu"], ".1%"),
        _shown(row["memory_gb"], ".1f"),
        _shown(row["launches"], ",.0f"),
        _shown(row["host_bound"], ".0%"),
        _shown(row["loss"], ".3f"),
    )
    return [f"{row['layers']} x {row['micro_batch_size']}", *figures]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
