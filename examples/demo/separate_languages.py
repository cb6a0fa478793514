"""Measure how well a router could separate the original languages from the expanded ones, layer by layer.

The probe of megatron_moe_lpr/allocation/probe.py is fitted on training text and counted on validation text.
"""

import dataclasses
from pathlib import Path

import torch
from corpus import texts
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_moe_lpr.allocation.dense_source import open_dense_source
from megatron_moe_lpr.allocation.ffn_inputs import ffn_inputs
from megatron_moe_lpr.allocation.probe import right_side, separating_direction
from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import UserError, run_command

FIRST = 8
"""First tokens of a window, which have nearly no context and are not counted."""


@dataclasses.dataclass
class Flags:
    """Measure how well a router could separate the original languages from the expanded ones, layer by layer."""

    hf: Path
    """Dense Hugging Face directory."""
    corpus: Path
    """Directory with train/LANGUAGE.jsonl.zst and valid/LANGUAGE.jsonl.zst."""
    original: list[str]
    """Original languages."""
    expanded: list[str]
    """Expanded languages."""
    windows: int = 50
    """Windows of each language and split."""
    length: int = 256
    """Tokens of a window."""


def main() -> None:
    """Command line."""
    flags = parse_flags(Flags, description=__doc__)
    # Not AutoTokenizer: for a model_type of qwen2, transformers 5 splits text by Qwen2's rules, not by the file's.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(flags.hf, local_files_only=True)
    source, device = open_dense_source(flags.hf), torch.device("cpu")
    languages = [*flags.original, *flags.expanded]
    splits = (
        ffn_inputs(source, {name: windows(flags, tokenizer, split, name) for name in languages}, device)
        for split in ("train", "valid")
    )
    table = Table("layer", *languages, "mean", f"first {FIRST} tokens", title="tokens on the right side, valid text")
    for layer, (train, valid) in enumerate(zip(*splits, strict=True)):
        direction = separating_direction(
            [train[name] for name in flags.original], [train[name] for name in flags.expanded]
        )
        right = right_side(direction, valid, flags.original)  # each [windows, length]
        everything = torch.stack([right[name].float().mean(dim=0) for name in languages])
        shares = [*everything.mean(dim=1), everything.mean(), everything[:, :FIRST].mean()]
        table.add_row(str(layer), *(f"{share:.1%}" for share in shares))
    Console().print(table)


def windows(flags: Flags, tokenizer: PreTrainedTokenizerBase, split: str, language: str) -> torch.Tensor:
    """Return token ids [windows, length] of a language's first documents, joined. Raises UserError."""
    ids: list[int] = []
    for text in texts([str(flags.corpus / split / f"{language}.jsonl.zst")]):
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= flags.windows * flags.length:
            break
    count = min(flags.windows, len(ids) // flags.length)
    if count < 1:
        raise UserError(f"--length {flags.length}: {split}/{language}.jsonl.zst has fewer tokens; choose a smaller one")
    return torch.tensor(ids[: count * flags.length]).view(count, flags.length)


if __name__ == "__main__":
    run_command(main)
