"""Where the time of a step goes, by kind of operation."""

from collections import Counter
from collections.abc import Callable

KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm"),
    "attention": ("scaled_dot_product",),
    "optimizer": ("_fused_adam", "_foreach", "linalg_vector_norm"),
    "copies": ("aten::copy_", "aten::cat", "aten::index", "aten::scatter", "aten::gather", "aten::fill_"),
    "elementwise": ("aten::",),
}
"""Beginnings or parts of names, the first that fits; all else is Python and dispatch."""


def shares(step: Callable[[], float]) -> dict[str, float]:
    """Parts of one step's time by kind, adding up to one."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        times[kind_of(event.key)] += event.self_cpu_time_total
    return {kind: times[kind] / times.total() for kind in (*KINDS, "other")}


def kind_of(name: str) -> str:
    """The kind of an operation by its name."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
