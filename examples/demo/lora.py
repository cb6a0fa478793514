"""LoRA on a dense Hugging Face model, by peft, on the windows that megatron_moe_lpr.pretrain would draw.

A row of `make paper-table`: every linear layer of the transformer layers gets an adapter, and nothing else trains. The
output is a stock dense model, with the adapters added to its weights, and the run's metrics.jsonl.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import AutoModelForCausalLM, PreTrainedModel, get_cosine_schedule_with_warmup

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.conversion.hugging_face.quiet import quiet_transformers
from megatron_moe_lpr.data.reading.batches import Batch, build_data_iterator
from megatron_moe_lpr.data.reading.config import DataConfig, read_data_sources
from megatron_moe_lpr.data.reading.training_dataset import build_training_dataset
from megatron_moe_lpr.errors import UserError, run_command
from megatron_moe_lpr.files.atomic_directory import atomic_directory
from megatron_moe_lpr.files.atomic_file import atomic_file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclasses.dataclass
class Flags:
    """Train LoRA on a dense Hugging Face model."""

    hf: Path
    """Dense Hugging Face directory to start from."""
    save: Path
    """Directory to write, with the adapters added to the weights."""
    data_path: list[str]
    """Training datasets: prefixes, or `weight prefix` pairs."""
    train_iters: int
    """Steps."""
    global_batch_size: int
    """Windows of a step."""
    seq_length: int
    """Tokens of a window."""
    lr: float
    """Highest learning rate; it ends at 0 along a cosine."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up from 0."""
    rank: int = 8
    """Rank of each adapter."""
    seed: int = 1234
    """Seed of the order of the windows and of the adapters' initial values."""
    bf16: bool = False
    """Compute matrix products in bfloat16 (autocast)."""
    fp32: bool = False
    """Compute matrix products in fp32, the default."""
    log_interval: int = 20
    """Steps between lines of output."""
    state: Path | None = None
    """File for the state of a run that is not complete: the same command then goes on from it. Default: none."""
    save_interval: int = 100
    """Steps between two writes of --state."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    if flags.bf16 and flags.fp32:
        raise UserError("--bf16 and --fp32: give one of them")
    torch.manual_seed(flags.seed)
    with atomic_directory(flags.save, overwrite=True) as partial:
        with quiet_transformers():
            dense = AutoModelForCausalLM.from_pretrained(flags.hf, local_files_only=True)
        dtype = dense.dtype
        kind = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        model = get_peft_model(dense.float(), LoraConfig(r=flags.rank, lora_alpha=2 * flags.rank, **kind))
        model.print_trainable_parameters()
        lines = train(model, flags)
        (partial / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        model.merge_and_unload().to(dtype).save_pretrained(partial)
        for name in TOKENIZER_FILES:
            if (flags.hf / name).is_file():
                shutil.copy(flags.hf / name, partial)
    if flags.state:
        flags.state.unlink(missing_ok=True)


def windows(flags: Flags, first_step: int = 0) -> Iterator[Batch]:
    """Yield global batches in the order of a training run with the same flags, after the first so many."""
    config = DataConfig(data_path=flags.data_path, seed=flags.seed, num_workers=0)
    samples = flags.train_iters * flags.global_batch_size
    dataset = build_training_dataset(read_data_sources(config), config, flags.seq_length, samples)
    return build_data_iterator(dataset, first_step * flags.global_batch_size, flags.global_batch_size, 0, 1)


def train(model: PreTrainedModel, flags: Flags) -> list[dict]:
    """Train with AdamW, cosine schedule and clipping as `moe-lpr train` has them by default. Returns the metrics."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=flags.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, flags.lr_warmup_iters, flags.train_iters)
    lines = load_state(flags, trained, optimizer, schedule)
    done = lines[-1]["iteration"] if lines else 0
    model.train()
    start, total, before = time.monotonic(), 0.0, done
    for step, batch in enumerate(windows(flags, done), done + 1):
        loss = lm_loss(model, batch, flags.bf16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.item()
        saves = flags.state is not None and step % flags.save_interval == 0
        if step % flags.log_interval == 0 or saves or step == flags.train_iters:
            tokens = flags.global_batch_size * flags.seq_length
            rate = (step - before) * tokens / (time.monotonic() - start)
            line = {"kind": "train", "iteration": step, "consumed_tokens": step * tokens}
            lines.append(line | {"lm_loss": total / (step - before), "tokens_per_second": rate})
            print(
                f"LoRA | step {step:,}/{flags.train_iters:,} | loss {lines[-1]['lm_loss']:.4f} | {rate:,.0f} tokens/s"
            )
            if saves:
                save_state(flags.state, trained, optimizer, schedule, lines)
            start, total, before = time.monotonic(), 0.0, step
    return lines


def save_state(
    file: Path, trained: list[torch.Tensor], optimizer: Optimizer, schedule: LRScheduler, lines: list
) -> None:
    """Write the state after a step; a start that is interrupted here leaves the state before it."""
    weights = [parameter.detach() for parameter in trained]
    states = {"weights": weights, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    with atomic_file(file) as partial:
        torch.save(states | {"lines": lines}, partial)


def load_state(flags: Flags, trained: list[torch.Tensor], optimizer: Optimizer, schedule: LRScheduler) -> list[dict]:
    """Take over the state of an incomplete run, if there is one. Returns its metrics, else an empty list.

    Raises:
        UserError: it is the state of a run with other adapters.
    """
    if flags.state is None or not flags.state.is_file():
        return []
    found = torch.load(flags.state, weights_only=True)
    if [one.shape for one in found["weights"]] != [one.shape for one in trained]:
        raise UserError(f"{flags.state}: the state of another run; remove it to begin again")
    with torch.no_grad():
        for parameter, saved in zip(trained, found["weights"], strict=True):
            parameter.copy_(saved)
    optimizer.load_state_dict(found["optimizer"])
    schedule.load_state_dict(found["schedule"])
    print(f"LoRA | goes on after step {found['lines'][-1]['iteration']:,}")
    return found["lines"]


def lm_loss(model: PreTrainedModel, batch: Batch, bf16: bool) -> torch.Tensor:
    """Return the mean cross-entropy over the tokens of `loss_mask`; entries of `batch` are [batch, sequence]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=batch["tokens"], position_ids=batch["position_ids"], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="none"
    )
    mask = batch["loss_mask"].flatten()
    return (losses * mask).sum() / mask.sum()


if __name__ == "__main__":
    run_command(main)
