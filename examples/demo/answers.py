"""Measure how a model answers held-out conversations, in transformers: does it end, and what does the answer cost?

For each language: the share of greedy answers that end with the template's end, and the bits per byte of the answers
that the conversations have, their end included.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from generate import load
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import UserError, run_command
from megatron_moe_lpr.files.json_files import write_json


@dataclasses.dataclass
class Flags:
    """Measure how a model answers held-out conversations."""

    hf: Path
    """Hugging Face directory."""
    conversations: Path
    """Directory with LANGUAGE.jsonl, a question and its answer a line."""
    languages: list[str]
    """Languages to measure."""
    chat_template: Path
    """File of the chat template, for models that have none."""
    output: Path
    """JSON file to write: by language conversations, ended and bits_per_byte."""
    new_tokens: int = 128
    """Tokens within which an answer must end."""
    batch: int = 32
    """Conversations that are answered at once."""
    answered: int = 32
    """Conversations of each language that the model answers; bits per byte are of all."""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A question and its answer as token ids."""

    prompt: list[int]
    answer: list[int]
    """With the end that the template puts after it."""
    text_bytes: int
    """UTF-8 bytes of the answer's text."""


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    torch.set_num_threads(1)  # for a model as small as the demo's further threads only wait for each other
    # Not AutoTokenizer: for a model_type of qwen2, transformers 5 splits text by Qwen2's rules, not by the file's.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(flags.hf)
    tokenizer.chat_template = flags.chat_template.read_text(encoding="utf-8")
    model = load(flags.hf)
    found = {}
    for language in flags.languages:
        some = read_conversations(flags.conversations / f"{language}.jsonl", tokenizer)
        found[language] = {
            "conversations": len(some),
            "ended": share_ended(model, some[: flags.answered], flags),
            "bits_per_byte": bits_per_byte(model, some, flags.batch),
        }
        print(f"{language}: {found[language]}")
    write_json(found, flags.output)


def read_conversations(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Conversation]:
    """Read the questions and answers of a file of JSON lines. Raises UserError: the template rewrites a prompt."""
    return [_encode(json.loads(line)["messages"], tokenizer, path) for line in path.read_text("utf-8").splitlines()]


def _encode(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, path: Path) -> Conversation:
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    if whole[: len(prompt)] != prompt or whole[-1] != tokenizer.eos_token_id:
        raise UserError(f"{path}: the tokens of a question change with its answer, or the answer has no end")
    return Conversation(prompt, whole[len(prompt) :], len(messages[-1]["content"].encode()))


def share_ended(model: PreTrainedModel, conversations: Sequence[Conversation], flags: Flags) -> float:
    """Share of greedy answers that end within `new_tokens`."""
    ended, end = 0, model.generation_config.eos_token_id
    for some in _batches(conversations, flags.batch):
        prompts, attended = _padded([one.prompt for one in some], left=True)
        output = model.generate(
            input_ids=prompts,
            attention_mask=attended,
            max_new_tokens=flags.new_tokens,
            do_sample=False,
            pad_token_id=end,
        )
        ended += (output[:, prompts.shape[1] :] == end).any(dim=1).sum().item()
    return ended / len(conversations)


def bits_per_byte(model: PreTrainedModel, conversations: Sequence[Conversation], batch: int = 32) -> float:
    """Bits of all answers with their ends, given the questions, divided by the bytes of the answers' texts."""
    nats = 0.0
    for some in _batches(conversations, batch):
        ids, attended = _padded([one.prompt + one.answer for one in some])
        labels = ids.masked_fill(attended == 0, -100)
        for row, one in zip(labels, some, strict=True):
            row[: len(one.prompt)] = -100
        logits = model(input_ids=ids, attention_mask=attended).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        nats += losses.item()
    return nats / math.log(2) / sum(one.text_bytes for one in conversations)


def _padded(rows: Sequence[list[int]], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows, longest], padded with 0, and a mask with 1 for each that is no padding."""
    longest = max(map(len, rows))
    ids, attended = (torch.zeros(len(rows), longest, dtype=torch.int64) for _ in range(2))
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[number, place], attended[number, place] = torch.tensor(row), 1
    return ids, attended


def _batches(conversations: Sequence[Conversation], size: int) -> Iterator[Sequence[Conversation]]:
    """The conversations by length, so that little is padding."""
    ordered = sorted(conversations, key=lambda one: len(one.prompt) + len(one.answer))
    yield from (ordered[first : first + size] for first in range(0, len(ordered), size))


if __name__ == "__main__":
    run_command(main)
