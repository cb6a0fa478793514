"""One measurement in a process of its own: `python -m benchmarks.gpu.measure device` or `... measure TASK`, as JSON.

The last line of the output is the result, a JSON object.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.profiling import profile
from benchmarks.gpu.task import StepTask
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.platform import select_platform

WARM_UP, STEPS, SECONDS = 3, 20, 8.0
PRODUCT = 8192
EMULATED = "emulated"


def device() -> dict[str, Any]:
    """The device, its memory in bytes, and its fastest product of large matrices in TFLOP/s.

    Raises:
        UserError: PyTorch sees no GPU.
    """
    if not torch.cuda.is_available():
        raise UserError(f"PyTorch {torch.__version__} sees no GPU; check nvidia-smi or rocm-smi, and PyTorch's build")
    platform = select_platform("cuda", 1, "local")
    gpu, name = platform.gpu, torch.cuda.get_device_name()
    assert gpu is not None
    return {
        "name": name,
        "emulated": EMULATED in name,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "capability": list(gpu.capability),
        "torch": torch.__version__,
        "built_for": f"{'ROCm' if gpu.rocm else 'CUDA'} {gpu.cuda[0]}.{gpu.cuda[1]}",
        "bf16": gpu.multiplies_bf16,
        "grouped_products": gpu.grouped_products,
        "product_tflops": None if EMULATED in name else _product_tflops(gpu.multiplies_bf16),
    }


def _product_tflops(bf16: bool) -> float:
    left = torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=torch.bfloat16 if bf16 else torch.float32)
    seconds = _seconds(lambda: torch.mm(left, left), 10, 3.0)
    return 2.0 * PRODUCT**3 / seconds / 1e12


def step(task: StepTask) -> dict[str, Any]:
    """Tokens per second, operations, memory, launches and busy time of a training step. Figures of speed and memory are
    None on an emulated device; where it does not fit into memory the result is only that."""
    try:
        return _measure(task)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0]}


def _measure(task: StepTask) -> dict[str, Any]:
    from benchmarks.gpu.step import build_step  # imports Megatron

    emulated = EMULATED in torch.cuda.get_device_name()
    built = build_step(task)
    for _ in range(1 if emulated else WARM_UP):
        loss = built.run()
    if emulated:
        figures = dict.fromkeys(("tokens_per_second", "tflops", "memory_gb", "launches", "host_bound"))
        return {"loss": loss, **figures}
    seconds = _seconds(built.run, STEPS, SECONDS)
    found = profile(built.run)
    return {
        "loss": loss,
        "tokens_per_second": built.tokens / seconds,
        "tflops": built.flops / seconds / 1e12,
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9,
        "launches": found.launches,
        "host_bound": max(0.0, 1.0 - found.busy_seconds / seconds),
    }


def _seconds(work: Callable[[], Any], times: int, limit: float) -> float:
    """Median seconds of some work on the device, of at most `times` in about `limit` seconds."""
    measured: list[float] = []
    work()
    torch.cuda.synchronize()
    while len(measured) < times and sum(measured) < limit:
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        measured.append(time.perf_counter() - begin)
    return statistics.median(measured)


def main() -> None:
    """Command line."""
    (what,) = sys.argv[1:]
    try:
        result = device() if what == "device" else step(StepTask(**json.loads(what)))
    except UserError as error:
        result = {"error": str(error)}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
