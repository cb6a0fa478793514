#!/usr/bin/env python3
"""Memory, bytes and stall of saving a checkpoint, by rank: data-parallel ranks of this machine over gloo.

An upcycled model of random weights in bf16, set up as stage 1 trains it (new experts and routers, distributed
optimizer), is saved asynchronously, synchronously, and as Megatron-Core's own `fully_reshardable` form does it, which
gathers the optimizer's state. `stall` is what training waits: from the end of a step on for the state to be gathered,
planned and copied, then for what each step does while the writers write. `rise` is how far a rank's largest resident
memory during the save lies above what it held before, `writer` what its writer process holds beside the memory they
share, which training takes after its first step.
"""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_moe_lpr.command_line import parse_flags

MB = 1e6
POLL_SECONDS = 0.1
"""A step."""
REPEATS = 7
"""Saves of a kind; the median counts, because other programs on the machine disturb one or the other."""
STEPS_SECONDS = 2.0
RANK = "rank"
"""First argument of the processes that this program starts."""
VARIANTS = ("asynchronous", "asynchronous, later", "synchronous", "gathered")


@dataclasses.dataclass(frozen=True)
class Flags:
    """Memory, bytes and stall of saving a checkpoint, by rank."""

    ranks: int = 4
    """Data-parallel ranks."""
    hidden_size: int = 512
    ffn_hidden_size: int = 1408
    layers: int = 4
    num_experts: int = 5
    """Experts per layer, the original one included."""
    directory: Path = Path(tempfile.gettempdir())
    """Where the files go; removed afterwards."""


def main(flags: Flags) -> None:
    """Make the model, start the ranks, print the table."""
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=flags.directory) as work:
        make_checkpoint(flags, Path(work))
        print_table(run_ranks(flags, Path(work) / "checkpoint"))


def make_checkpoint(flags: Flags, work: Path) -> None:
    """A dense model of random weights, upcycled."""
    import torch

    from megatron_moe_lpr.conversion.hugging_face.safetensors_writer import TensorSpec, write_safetensors
    from megatron_moe_lpr.conversion.importer import import_hf
    from megatron_moe_lpr.conversion.plan import ImportOptions
    from megatron_moe_lpr.model.configuration.architecture import read_architecture
    from megatron_moe_lpr.model.tensors import DENSE_LAYOUT, model_rows

    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": flags.hidden_size,
        "intermediate_size": flags.ffn_hidden_size,
        "num_hidden_layers": flags.layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 4096,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    dense = work / "dense"
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps(config))
    rows = model_rows(read_architecture(config, "config"), [1] * flags.layers, DENSE_LAYOUT)
    pairs = [pair for row in rows for pair in zip(row.names, row.shapes, strict=True)]
    specs = [TensorSpec(name, shape, torch.bfloat16) for name, shape in pairs]
    write_safetensors(dense, specs, lambda spec: torch.randn(spec.shape).bfloat16(), 1_000_000_000)
    import_hf(ImportOptions(hf=dense, num_experts=flags.num_experts), work / "checkpoint")


def run_ranks(flags: Flags, checkpoint: Path) -> list[dict[str, Any]]:
    """What each rank measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, RANK, str(checkpoint)]
    world = {"WORLD_SIZE": str(flags.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
        )
        for rank in range(flags.ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("error: a rank failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def print_table(ranks: list[dict[str, Any]]) -> None:
    """One line for each save and rank."""
    table = Table("save", "rank", title="Saving a checkpoint", title_justify="left")
    for name in (
        "optimizer share MB",
        "of the group MB",
        "written MB",
        "rise MB",
        "writer MB",
        "stall s",
        "complete s",
    ):
        table.add_column(name, justify="right")
    for variant in VARIANTS:
        for rank, found in enumerate(ranks):
            one = found[variant]
            sizes = (one[name] / MB for name in ("share", "group", "written", "rise", "writer"))
            numbers = (*(f"{size:,.0f}" for size in sizes), f"{one['stalled']:.2f}", f"{one['seconds']:.2f}")
            table.add_row(variant if rank == 0 else "", str(rank), *numbers, end_section=rank == len(ranks) - 1)
    Console(width=140).print(table)


def rank_main(load: Path) -> None:
    """One rank: measure every way of saving and print it as one line."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    state = build(load)
    share = optimizer_bytes(state)
    group = torch.tensor(share)
    dist.all_reduce(group)
    result = {}
    for variant, measured in measure(state, load.parent / "saved").items():
        result[variant] = measured | {"share": share, "group": group.item()}
    sys.stdout.flush()
    print(json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def build(load: Path) -> Any:
    """The state of a run of stage 1 after a step."""
    import torch

    from megatron_moe_lpr.checkpoint.loading.model import load_model
    from megatron_moe_lpr.model.configuration.config import ComputeOptions
    from megatron_moe_lpr.parallel.groups import initialize_parallel
    from megatron_moe_lpr.parallel.layout import ParallelLayout
    from megatron_moe_lpr.platform import select_platform
    from megatron_moe_lpr.training.checkpointing import RunState
    from megatron_moe_lpr.training.configuration.config import BatchOptions, OptimizerOptions
    from megatron_moe_lpr.training.configuration.stages import STAGES, freeze
    from megatron_moe_lpr.training.optimizer import build_optimizer, build_schedule, wrap_data_parallel

    platform, layout = select_platform("cpu"), ParallelLayout()
    initialize_parallel(platform, layout)
    model = load_model(load, layout, platform, ComputeOptions(dtype=torch.bfloat16), calculate_per_token_loss=True)
    freeze(model.chunks, STAGES["1"])
    options = OptimizerOptions(use_distributed_optimizer=True)
    chunks = wrap_data_parallel(model.chunks, model.config, options)
    optimizer = build_optimizer(chunks, model.config, options, platform)
    state = RunState(chunks, optimizer, build_schedule(optimizer, options, BatchOptions(train_iters=100)), 1)
    optimizer.step()
    return state


def optimizer_bytes(state: Any) -> int:
    """What this rank holds of the optimizer's state: moments and its copy of the weights."""
    import torch

    total = 0
    for part in (part.optimizer for part in state.optimizer.chained_optimizers if part.optimizer is not None):
        for weight in (weight for group in part.param_groups for weight in group["params"]):
            total += weight.nbytes
            total += sum(value.nbytes for value in part.state[weight].values() if torch.is_tensor(value))
    return total


def measure(state: Any, root: Path) -> dict[str, dict[str, float]]:
    """All variants."""
    from megatron_moe_lpr.checkpoint.saving.saver import CheckpointSaver
    from megatron_moe_lpr.training.checkpointing import expect_saves

    results = {"gathered": gathered(state, root / "gathered")}
    saver = CheckpointSaver(root / "synchronous", asynchronous=False)
    results["synchronous"] = median_save(saver, state)
    saver.close()
    saver = CheckpointSaver(root / "asynchronous", asynchronous=True)
    # As training does after its first step; the steps until the first save leave time enough.
    _, taken = with_peak(lambda: (expect_saves(saver, state), time.sleep(STEPS_SECONDS)))
    first = measured_save(saver, state)
    results[VARIANTS[0]] = first | {"rise": first["rise"] + taken}
    results[VARIANTS[1]] = median_save(saver, state)
    saver.close()
    return results


def median_save(saver: Any, state: Any) -> dict[str, float]:
    """Of several saves the median in time, and the most memory."""
    found = []
    for _ in range(REPEATS):
        state.iteration += 1
        found.append(measured_save(saver, state))
    middle = sorted(found, key=lambda one: one["stalled"])[len(found) // 2]
    return middle | {"rise": max(one["rise"] for one in found)}


def measured_save(saver: Any, state: Any) -> dict[str, float]:
    """Save once, looking now and then, as after each step, whether the checkpoint is complete."""
    import torch.distributed as dist

    from megatron_moe_lpr.training.checkpointing import STATE_METADATA, sharded_state

    writer = saver.background.process.pid if saver.background else None

    def save() -> Any:
        add_nothing = lambda directory: (directory / "moe_lpr").mkdir()  # noqa: E731
        began = time.monotonic()
        saved = saver.start(state.iteration, sharded_state(state), dict(STATE_METADATA), add_nothing, began)
        while saved is None:
            time.sleep(POLL_SECONDS)
            saved = saver.poll()
        return saved

    saved, rise = with_peak(save)
    written = sum(path.stat().st_size for path in saved.path.glob(f"__{dist.get_rank()}_*.distcp"))
    private = memory("RssAnon", writer) if writer else 0
    return {"seconds": saved.seconds, "stalled": saved.stalled, "rise": rise, "written": written, "writer": private}


def gathered(state: Any, root: Path) -> dict[str, float]:
    """Megatron-Core's own save of the same state."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from megatron_moe_lpr.training import checkpointing

    if dist.get_rank() == 0:
        root.mkdir(parents=True)
    dist.barrier()
    keep_shares_apart, checkpointing.keep_shares_apart = checkpointing.keep_shares_apart, lambda optimizer: None

    def save() -> float:
        start = time.monotonic()
        content = checkpointing.sharded_state(state)
        dist_checkpointing.save(content, str(root), content_metadata=dict(checkpointing.STATE_METADATA))
        return time.monotonic() - start

    seconds, rise = with_peak(save)
    checkpointing.keep_shares_apart = keep_shares_apart
    written = sum(file.stat().st_size for file in root.glob(f"__{dist.get_rank()}_*.distcp"))
    return {"seconds": seconds, "stalled": seconds, "rise": rise, "written": written, "writer": 0}


def with_peak(action: Callable[[], Any]) -> tuple[Any, int]:
    """What `action` returns, and how far resident memory rose above what it was, at most."""
    import gc

    import torch.distributed as dist

    gc.collect()
    # 5: forget the peak so far (proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    # All begin together, as after a step: who collected longer would be waited for.
    dist.barrier()
    result = action()
    return result, max(0, memory("VmHWM") - before)


def memory(name: str, process: int | str = "self") -> int:
    """Bytes that a line of /proc/PID/status says."""
    return int(re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == [RANK]:
        rank_main(Path(sys.argv[2]))
    else:
        main(parse_flags(Flags, description=__doc__))
