"""Launches of a step, and the time in which the device computes or copies, by torch.profiler."""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity

LAUNCH = re.compile(r"^(cuda|cu|hip)\w*(Launch\w*Kernel|ModuleLaunch|LaunchKernel|GraphLaunch)")
"""Names of the driver's and the runtime's calls that start a kernel, of CUDA and of ROCm."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """One step."""

    launches: int
    busy_seconds: float


def profile(work: Callable[[], Any]) -> Profile:
    """Profile some work on the device."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    events = profiler.events()
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = covered((event.time_range.start, event.time_range.end) for event in on_device)
    return Profile(launches(event.name for event in events), busy / 1e6)


def launches(names: Iterable[str]) -> int:
    """How many of these calls start a kernel."""
    return sum(LAUNCH.match(name) is not None for name in names)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals: kernels on several streams at the same time count once."""
    total, end = 0.0, float("-inf")
    for begin, stop in sorted(intervals):
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return total
