"""Shares of a step's time by kind of operation."""

from collections import Counter
from collections.abc import Callable

KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm"),
    "attention": ("scaled_dot_product",),
    "optimizer": ("_fused_adam", "_foreach", "linalg_vector_norm"),
    "copies": ("aten::copy_", "aten::cat", "aten::index", "aten::scatter", "aten::gather", "aten::fill_"),
    "elementwise": ("aten::",),
}
"""Kind of operation to parts of their names; the first match counts. All other time is Python and dispatch."""


def shares(step: Callable[[], float]) -> dict[str, float]:
    """Return the shares of one step's time by kind; they add up to 1."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        times[operation_kind(event.key)] += event.self_cpu_time_total
    return {kind: times[kind] / times.total() for kind in (*KINDS, "other")}


def operation_kind(name: str) -> str:
    """Return the kind of an operation with this name."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
