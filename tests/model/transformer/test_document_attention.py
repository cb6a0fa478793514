"""Attention within documents against its definition in float64, and the largest tensor on the way."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_moe_lpr.model.transformer import document_attention
from megatron_moe_lpr.model.transformer.document_attention import attend_within_documents, split_at_documents

HEADS, DIM, SCALE = 2, 8, 0.4


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that an operation returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return result


def inputs(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(tokens, HEADS, DIM, generator=generator, requires_grad=True) for _ in range(3)]


def by_definition(tensors, lengths, window: int | None) -> torch.Tensor:
    query, key, value = (tensor.detach().double().requires_grad_() for tensor in tensors)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(len(query))[:, None] - torch.arange(len(query))
    seen = (document[:, None] == document) & (distance >= 0)
    if window is not None:
        seen &= distance <= window
    scores = torch.einsum("shd,thd->hst", query, key) * SCALE
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    output = torch.einsum("hst,thd->shd", weights, value)
    output.square().sum().backward()
    return torch.stack([output.detach(), query.grad, key.grad, value.grad])


@pytest.mark.parametrize("window", [None, 0, 3, 100])
@pytest.mark.parametrize("lengths", [(1,), (9,), (5, 1, 9, 5, 1, 17), (40, 3)])
def test_output_and_gradients(lengths, window, monkeypatch):
    """Windows in blocks of 4 rows."""
    monkeypatch.setattr(document_attention, "WINDOW_ROWS", 4)
    tensors = inputs(sum(lengths))
    output = attend_within_documents(*tensors, lengths, window, SCALE)
    output.square().sum().backward()
    found = torch.stack([output.detach(), *(tensor.grad for tensor in tensors)])
    torch.testing.assert_close(found.double(), by_definition(tensors, lengths, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1000])
def test_no_scores_of_all_pairs_are_in_memory(window):
    """Of 4,096 tokens, in documents of 3,000, 1,000 and 96; with a window a block's mask is the largest."""
    tensors = inputs(4096)
    with Largest() as largest:
        attend_within_documents(*tensors, (3000, 1000, 96), window, SCALE).sum().backward()
    assert 4096 * HEADS * DIM <= largest.numbers <= (4096 * HEADS * DIM if window is None else 512 * 1512)
    with Largest() as planted:
        torch.ones(4096, 4096, dtype=torch.bool).tril()
    assert planted.numbers == 4096**2


def test_spans_are_cut_where_documents_begin():
    """Document, tokens, and tokens of the document up to the last of them."""
    lengths = (3, 5, 4)  # they begin at 0, 3 and 8
    pieces = [tuple(piece) for piece in split_at_documents([(2, 8), (8, 9), (11, 12), (4, 4)], lengths)]
    assert pieces == [(0, 1, 3), (1, 5, 5), (2, 1, 1), (2, 1, 4)]
