"""The probability that a model gives to texts: bits per byte, and which of two sentences is likelier.

Every text is scored by itself and whole. Before it stand the BOS token, if the model's tokenizer puts one before a
text, and a line break, which are context and cost nothing; every token of the text counts, so every byte of it does, in
any tokenizer. `moe-lpr evaluate` divides by the same bytes; it reads a dataset as one text, whose documents see those
before them, and counts the EOD tokens between them as well. Those are left out here: an instruct model has its EOD
token behind answers and not between documents, and would pay for that alone.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 512
"""Tokens that a model reads at once. Of a longer text the last token of a window is the first one of the next."""
BATCH_TOKENS = 1024
"""Tokens of a batch, padding included, where more than one row fits: logits take 4 bytes x vocabulary for each."""


@dataclass(frozen=True)
class Window:
    """A part of a text."""

    text: int
    """Number of the text."""
    ids: list[int]
    context: int
    """Tokens at the beginning that do not count."""


def text_bits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], window: int = WINDOW
) -> list[float]:
    """Return for each text -log2 of its probability, summed in float64."""
    start = tokenizer("\n").input_ids
    encoded = tokenizer(list(texts), add_special_tokens=False).input_ids
    windows = [one for number, ids in enumerate(encoded) for one in cut(number, start, ids, window)]
    totals = [0.0] * len(texts)
    for some in batches(windows):
        for one, cost in zip(some, nats(model, some), strict=True):
            totals[one.text] += cost / math.log(2)
    return totals


def bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """Return the bits of all texts divided by their UTF-8 bytes."""
    return sum(text_bits(model, tokenizer, texts)) / sum(len(text.encode()) for text in texts)


def pair_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[bool]:
    """Return for each pair whether the first sentence is likelier: the sum over its tokens of log p."""
    bits = text_bits(model, tokenizer, [sentence for pair in pairs for sentence in pair])
    return [good < bad for good, bad in zip(bits[::2], bits[1::2], strict=True)]


def cut(number: int, start: Sequence[int], ids: Sequence[int], window: int) -> Iterator[Window]:
    """Yield windows of a text, in which each of its tokens counts once."""
    before = list(start)
    for first in range(0, len(ids), window):
        part = list(ids[first : first + window])
        yield Window(number, before + part, len(before))
        before = part[-1:]


def batches(windows: Sequence[Window]) -> Iterator[list[Window]]:
    """Yield the windows by length, so that little is padding."""
    batch: list[Window] = []
    for one in sorted(windows, key=lambda one: len(one.ids)):
        if batch and (len(batch) + 1) * len(one.ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


@torch.no_grad()
def nats(model: PreTrainedModel, batch: Sequence[Window]) -> list[float]:
    """Return -ln p of the tokens that count, summed for each window. Padding stands behind, where nothing sees it."""
    longest = max(len(one.ids) for one in batch)
    ids, attended = (torch.zeros(len(batch), longest, dtype=torch.int64) for _ in range(2))
    labels = torch.full((len(batch), longest), -100)
    for row, one in enumerate(batch):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
        attended[row, : len(one.ids)] = 1
        labels[row, one.context : len(one.ids)] = torch.tensor(one.ids[one.context :])
    logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    return losses.double().sum(dim=1).tolist()
