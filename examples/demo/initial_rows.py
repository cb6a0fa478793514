"""Compare first rows of new tokens in an output layer: the probability that they take, and the loss with them.

The model's own output layer is taken as untied from the embedding. Text without new tokens is validation text split by
the old tokenizer; text with them is the same text of the expanded languages split by the extended one.
"""

import dataclasses
from pathlib import Path

import torch
from corpus import texts
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.conversion.hugging_face.quiet import quiet_transformers
from megatron_moe_lpr.conversion.tensors import new_rows
from megatron_moe_lpr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_moe_lpr.data.tokenizer_extension import read_extension
from megatron_moe_lpr.errors import UserError, run_command

MEANS, CENTROIDS = (1.0, 0.5, 0.25, 0.0), (0.0, 1.0, 2.0, 3.0)


@dataclasses.dataclass
class Flags:
    """Compare first rows of new tokens in an output layer."""

    hf: Path
    """Dense Hugging Face directory."""
    tokenizer: Path
    """Directory of an extended tokenizer."""
    corpus: Path
    """Directory with valid/LANGUAGE.jsonl.zst."""
    original: list[str]
    """Original languages."""
    expanded: list[str]
    """Expanded languages."""
    windows: int = 8
    """Windows of each language."""
    length: int = 256
    """Tokens of a window."""


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(flags.hf, dtype=torch.float32, local_files_only=True).eval()
    extension = read_extension(flags.tokenizer)
    if extension is None:
        raise UserError(f"--tokenizer {flags.tokenizer}: holds no extension.json")
    old = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    embedding = torch.cat([embedding, new_rows.initial_rows(embedding, extension.pieces)])
    hidden = {}
    for name in (*flags.original, *flags.expanded):
        hidden[name] = states(model, embedding, windows(flags, load_tokenizer(flags.hf), name))[0]
    extended = load_tokenizer(flags.tokenizer)
    with_new = [states(model, embedding, windows(flags, extended, name)) for name in flags.expanded]
    columns = [f"mass {name}" for name in hidden] + [f"loss {name}" for name in flags.expanded]
    table = Table("row of a new token", *columns)
    for mean in MEANS:
        for centroid in CENTROIDS:
            rows = new_rows.mixed_rows(old, extension.pieces, mean, centroid)
            masses = [f"{mass(states_, old, rows):.1e}" for states_ in hidden.values()]
            losses = [f"{loss(states_, torch.cat([old, rows]), ids):.2f}" for states_, ids in with_new]
            table.add_row(f"{mean:g} mean + {centroid:g} centroid", *masses, *losses)
    Console(width=160).print(table)
    mean_state = torch.cat([hidden[name].flatten(0, 1) for name in flags.original]).mean(0)
    cosine = torch.nn.functional.cosine_similarity(old.mean(0), mean_state, dim=0).item()
    print(f"cosine of the centroid and the mean hidden state of original languages: {cosine:.2f}")


def windows(flags: Flags, tokenizer: Tokenizer, language: str) -> torch.Tensor:
    """Return token ids [windows, length] of a language's first validation documents, joined."""
    ids: list[int] = []
    for text in texts([str(flags.corpus / "valid" / f"{language}.jsonl.zst")]):
        ids += [*tokenizer.encode_batch([text])[0], tokenizer.eod]
        if len(ids) >= flags.windows * flags.length:
            break
    count = min(flags.windows, len(ids) // flags.length)
    return torch.tensor(ids[: count * flags.length]).view(count, flags.length)


def states(model: PreTrainedModel, embedding: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states [windows, length, hidden] before the output layer, and the ids."""
    return model.model(inputs_embeds=embedding[ids]).last_hidden_state, ids


def mass(hidden: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> float:
    """Mean probability of all new tokens together."""
    return (hidden @ torch.cat([old, new]).T).softmax(-1)[..., len(old) :].sum(-1).mean().item()


def loss(hidden: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean loss of the next token in nats."""
    logits = (hidden @ rows.T)[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).item()


if __name__ == "__main__":
    run_command(main)
