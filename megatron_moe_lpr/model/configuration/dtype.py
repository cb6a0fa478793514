"""The dtype that a model computes in: chosen by a flag, else by the checkpoint and the processor."""

import sys
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.parallel.every_rank import decide_on_rank_0
from megatron_moe_lpr.platform import Platform

PRODUCT_ROWS, PRODUCT_COLUMNS = 256, 1024
TRIES = 3
RANKS_SHOWN = 8


def requested_dtype(bf16: bool, fp32: bool, fp16: bool = False) -> torch.dtype | None:
    """The dtype of `--bf16`, `--fp32` or `--fp16`; None: none of these flags is given.

    Raises:
        UserError: more than one of these flags, or float16, which is not supported.
    """
    if bf16 + fp32 + fp16 > 1:
        given = [flag for flag, is_given in {"--bf16": bf16, "--fp32": fp32, "--fp16": fp16}.items() if is_given]
        raise UserError(f"{' and '.join(given)}: give one of them")
    if fp16:
        raise UserError(
            "--fp16: float16 arithmetic is not offered, its range is too small for gradients without loss scaling; "
            "give --bf16 or --fp32: the frozen weights of a float16 model keep their float16 bits with both"
        )
    return torch.bfloat16 if bf16 else torch.float32 if fp32 else None


def choose_dtype(requested: torch.dtype | None, default: str, platform: Platform) -> torch.dtype:
    """The dtype to compute in: the flag's, else the checkpoint's where the processor has instructions for it.

    Args:
        requested: dtype of a flag; None: no flag is given.
        default: dtype of the checkpoint (`CheckpointCard.compute_dtype`).
    """
    if requested is not None:
        return requested
    dtype: torch.dtype = getattr(torch, default)
    return dtype if platform.multiplies_bf16 or dtype != torch.bfloat16 else torch.float32


def check_dtype_device(dtype: torch.dtype, platform: Platform) -> None:
    """Check that a GPU can compute in a dtype. A processor can in any, if slowly.

    Raises:
        UserError: bfloat16 on a GPU without instructions for it.
    """
    if dtype == torch.bfloat16 and platform.gpu and not platform.gpu.multiplies_bf16:
        found = ".".join(map(str, platform.gpu.capability))
        raise UserError(f"--bf16 needs compute capability 8.0, and this device has {found}; give --fp32")


def report_dtype(requested: torch.dtype | None, default: str, stored: str, platform: Platform) -> None:
    """Check that all ranks chose the same dtype; on rank 0 print one line where it, or what the layers are made of, may
    surprise the user or is slow. With process groups every rank must call it.

    Args:
        stored: the dtype of the dense model's weights (`CheckpointCard.dtype`).

    Raises:
        UserError: on every rank: only some devices have instructions for bfloat16, or some Transformer Engine.
    """
    if dist.is_initialized():
        chosen = choose_dtype(requested, default, platform)
        if difference := decide_on_rank_0((chosen, platform.transformer_engine), _difference):
            raise UserError(difference)
        if dist.get_rank() != 0:
            return
    for words in (
        platform.note,
        _note_on_default(requested, default, stored, platform),
        _warning_of_slow_bf16(requested, platform),
    ):
        if words:
            print(words, file=sys.stderr, flush=True)


def _difference(choices: Sequence[tuple[torch.dtype, bool]]) -> str | None:
    """Describe in what the ranks differ: dtype, or whether they have Transformer Engine. None: in nothing."""
    dtypes, engines = zip(*choices, strict=True)
    if len(set(engines)) > 1:
        without = _listed([rank for rank, has_it in enumerate(engines) if not has_it])
        return (
            f"ranks {without} have no Transformer Engine, and the others have: install it for all, or give "
            "--transformer-impl local"
        )
    if len(set(dtypes)) > 1:
        without = _listed([rank for rank, dtype in enumerate(dtypes) if dtype == torch.float32])
        return (
            f"the devices of ranks {without} have no instructions for bfloat16, and the others' have: "
            "say what all shall compute in, --fp32 or --bf16"
        )
    return None


def _listed(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - RANKS_SHOWN} more" if len(ranks) > RANKS_SHOWN else ""
    return f"{', '.join(map(str, ranks[:RANKS_SHOWN]))}{more}"


def _note_on_default(requested: torch.dtype | None, default: str, stored: str, platform: Platform) -> str | None:
    chosen = choose_dtype(requested, default, platform)
    name = str(chosen).removeprefix("torch.")
    if requested is None and name != default and platform.on_gpus:
        return f"note: computing in {name}: this GPU has no instructions for bfloat16, the checkpoint's default"
    if requested is None and name != default:
        return (
            f"note: computing in {name}: this processor has no instructions for bfloat16, the checkpoint's default; "
            "--bf16 computes in bfloat16 all the same, many times slower"
        )
    if requested is None and stored == "float16":
        return f"note: a float16 model, computed in {name}; weights that do not train keep their float16 bits"
    return None


def _warning_of_slow_bf16(requested: torch.dtype | None, platform: Platform) -> str | None:
    if requested != torch.bfloat16 or platform.multiplies_bf16 or platform.on_gpus:
        return None
    ratio = product_seconds(torch.bfloat16) / product_seconds(torch.float32)
    return (
        f"warning: this processor has no instructions for bfloat16: a matrix product takes {ratio:.1f} times as long "
        "as in fp32, measured now; leave --bf16 out to compute in fp32"
    )


def product_seconds(dtype: torch.dtype) -> float:
    """Time of a product of small matrices on the CPU, the shortest of a few."""
    left = torch.ones(PRODUCT_ROWS, PRODUCT_COLUMNS, dtype=dtype)
    right = torch.ones(PRODUCT_COLUMNS, PRODUCT_COLUMNS, dtype=dtype)
    seconds = []
    for _ in range(TRIES):
        begin = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
