"""How well could a router tell the original languages from the expanded ones, layer by layer?

A router is a linear function of what enters the FFN. This fits the best one (logistic regression) to a dense model's
FFN inputs on training text and counts how often its sign is right on validation text: about what Language Priors
Routing can reach in that layer.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro
from corpus import texts
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_moe_lpr.errors import UserError, run_command

FIRST = 8
"""Tokens of a window that have nearly no context."""


@dataclasses.dataclass
class Flags:
    """How well could a router tell the original languages from the expanded ones, layer by layer?"""

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
    flags = tyro.cli(Flags, description=__doc__)
    # Not AutoTokenizer: for a model_type of qwen2, transformers 5 splits text by Qwen2's rules, not by the file's.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(flags.hf, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(flags.hf, dtype=torch.float32, local_files_only=True).eval()
    languages = [*flags.original, *flags.expanded]
    train, valid = (
        {name: ffn_inputs(model, windows(flags, tokenizer, split, name)) for name in languages}
        for split in ("train", "valid")
    )
    table = Table("layer", *languages, "mean", f"first {FIRST} tokens", title="tokens on the right side, valid text")
    for layer in range(model.config.num_hidden_layers):
        direction = separate(*([train[name][layer] for name in part] for part in (flags.original, flags.expanded)))
        right = [
            (valid[name][layer] @ direction > 0) == (name in flags.original) for name in languages
        ]  # each [windows, length]
        everything = torch.stack([part.float().mean(dim=0) for part in right])
        shares = [*everything.mean(dim=1), everything.mean(), everything[:, :FIRST].mean()]
        table.add_row(str(layer), *(f"{share:.1%}" for share in shares))
    Console().print(table)


def windows(flags: Flags, tokenizer: PreTrainedTokenizerBase, split: str, language: str) -> torch.Tensor:
    """Token ids [windows, length] of a language's first documents, one after the other. Raises UserError."""
    ids: list[int] = []
    for text in texts([str(flags.corpus / split / f"{language}.jsonl.zst")]):
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= flags.windows * flags.length:
            break
    count = min(flags.windows, len(ids) // flags.length)
    if count < 1:
        raise UserError(f"--length {flags.length}: {split}/{language}.jsonl.zst has fewer tokens; choose a smaller one")
    return torch.tensor(ids[: count * flags.length]).view(count, flags.length)


@torch.no_grad()
def ffn_inputs(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """What enters each layer's FFN, [windows, length, hidden] each."""
    kept: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, inputs, place=place: place.append(inputs[0]))
        for layer, place in zip(model.model.layers, kept, strict=True)
    ]
    for batch in ids.split(8):
        model(batch)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in kept]


def separate(positive: Sequence[torch.Tensor], negative: Sequence[torch.Tensor]) -> torch.Tensor:
    """The direction [hidden] of logistic regression without a constant, as routers have none."""
    inputs = torch.cat([part.flatten(0, 1) for part in (*positive, *negative)])
    labels = torch.cat([torch.ones(part[..., 0].numel()) for part in positive])
    labels = torch.cat([labels, torch.zeros(len(inputs) - len(labels))])
    direction = torch.zeros(inputs.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([direction], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(inputs @ direction, labels)
        value = value + 1e-5 * direction.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return direction.detach()


if __name__ == "__main__":
    run_command(main)
