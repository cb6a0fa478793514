"""Programs that train: ours, and an ordinary PyTorch loop over transformers' stock class; and the products alone.

    python -m benchmarks.training.candidates JSON       one candidate; a line of standard input steps it

Each runs in a process of its own. Reads a number of steps a line, answers each step with a JSON line; to the word
`profile` with where a step's time goes.
"""

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.training.processes import PROFILE
from benchmarks.training.profile import shares
from megatron_moe_lpr.processes import end_with_parent

ROUTER = r"\.mlp\.gate\.weight$"
BALANCE, LPR = 0.01, 0.1


def ours(stage: str, precision: str, inputs: dict[str, str], sizes: dict[str, int]) -> Callable[[], float]:
    """A step of this package, as `megatron_moe_lpr.pretrain` makes it."""
    from megatron_moe_lpr.data.reading.config import DataConfig
    from megatron_moe_lpr.training.configuration.config import (
        BatchOptions,
        CheckpointOptions,
        LoggingOptions,
        PrecisionOptions,
        TrainingConfig,
    )
    from megatron_moe_lpr.training.configuration.stages import StageOptions
    from megatron_moe_lpr.training.logs.metrics import MetricsWriter
    from megatron_moe_lpr.training.loop import Trainer
    from megatron_moe_lpr.training.run_directory.run_lock import acquire
    from megatron_moe_lpr.training.setup import prepare
    from megatron_moe_lpr.training.watchdog.heartbeat import Heartbeat

    data = [inputs["expanded"]] if stage == "1" else ["0.5", inputs["original"], "0.5", inputs["expanded"]]
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    config = TrainingConfig(
        stage=StageOptions(stage=stage),
        checkpoint=CheckpointOptions(
            load=Path(inputs["checkpoint"]), save=Path(tempfile.mkdtemp(dir=Path(inputs["checkpoint"]).parent))
        ),
        batch=BatchOptions(
            train_iters=1000,
            micro_batch_size=sizes["batch_size"] // ranks,
            global_batch_size=sizes["batch_size"],
            seq_length=sizes["seq_length"],
        ),
        data=DataConfig(data_path=data, original_languages=["en"], num_workers=0),
        precision=PrecisionOptions(bf16=precision == "bf16", fp32=precision == "fp32"),
        platform="cpu",
    )
    run = prepare(config)
    writer = MetricsWriter(LoggingOptions(), config.checkpoint.save, "benchmark")
    trainer = Trainer(run, writer, acquire(config.checkpoint.save), Heartbeat(600.0))
    batches = trainer._batches()

    def step() -> float:
        trainer.step(batches)
        return trainer.agreed.sums.mean

    return step


def stock(
    stage: str, precision: str, inputs: dict[str, str], sizes: dict[str, int], experts: str = "eager"
) -> Callable[[], float]:
    """A step of transformers' Qwen2-MoE with SDPA attention, torch's AdamW and, for bf16, autocast."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        inputs["moe_hf"], dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
    )
    model.train()
    freeze(model, stage)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=5e-5)
    tokens = random_batches(sizes)

    def step() -> float:
        batch = next(tokens)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = model(batch, labels=batch, output_router_logits=True)
            loss = output.loss
            if stage == "2":
                loss = loss - output.aux_loss.to(loss) * model.router_aux_loss_coef
                loss = loss + LPR * lpr_loss(output.router_logits)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def floor(stage: str, precision: str, inputs: dict[str, str], sizes: dict[str, int]) -> Callable[[], float]:
    """The matrix products of a step, and nothing else."""
    from benchmarks.training.floor import Floor, products
    from benchmarks.training.inputs import Sizes

    return Floor(products(Sizes(**sizes), stage), precision).step


def freeze(model: Any, stage: str) -> None:
    """Train what our stage trains. Stock experts are one tensor: the original one's gradient is thrown away."""
    if stage == "full":
        return
    for name, weight in model.named_parameters():
        is_router = re.search(ROUTER, name) is not None
        is_expert = stage == "1" and ".experts." in name
        weight.requires_grad_(is_router or is_expert)
        if is_expert:
            weight.register_hook(_without_original)


def _without_original(gradient: Any) -> Any:
    gradient[0] = 0
    return gradient


def lpr_loss(router_logits: tuple) -> Any:
    """-log of the probability of expert 0, over half of the tokens."""
    import torch

    losses = [-torch.log_softmax(logits.float(), -1)[: len(logits) // 2, 0].mean() for logits in router_logits]
    return sum(losses) / len(losses)


def random_batches(sizes: dict[str, int]) -> Iterator[Any]:
    """Batches of random tokens, [batch, sequence]."""
    import torch

    generator = torch.Generator().manual_seed(7)
    while True:
        yield torch.randint(0, sizes["vocab_size"], (sizes["batch_size"], sizes["seq_length"]), generator=generator)


def peak_megabytes() -> float:
    """Largest resident set of this process so far."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


CANDIDATES = {"ours": ours, "stock": stock, "floor": floor}


def main() -> None:
    """Serve one candidate."""
    end_with_parent()
    task = json.loads(sys.argv[1])
    # What libraries print goes to standard error: standard output is for the answers alone.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    step = CANDIDATES[task.pop("candidate")](**task)
    for line in sys.stdin:
        if line.strip() == PROFILE:
            print(json.dumps(shares(step)), file=answer, flush=True)
            continue
        for _ in range(int(line)):
            wall, cpu = time.perf_counter(), time.process_time()
            loss = step()
            result = {
                "seconds": time.perf_counter() - wall,
                "cpu_seconds": time.process_time() - cpu,
                "loss": loss,
                "peak_megabytes": peak_megabytes(),
            }
            print(json.dumps(result), file=answer, flush=True)


if __name__ == "__main__":
    main()
