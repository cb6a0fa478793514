"""Tokens of which none goes to the new experts of a rank, whatever Transformer Engine makes of it."""

import inspect

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import permute as megatron_permute

from megatron_moe_lpr.platform.no_rows import _guarded_permute, _guarded_unpermute

TOKENS, EXPERTS, HIDDEN = 5, 3, 4


def older(tokens, routing_map, probs=None, num_out_tokens=None, **options):
    """As 2.11 does: rows of another memory, without a way back to the tokens."""
    return tokens.new_empty(0, HIDDEN), None if probs is None else probs.new_empty(0), torch.empty(TOKENS, 7)


def newer(tokens, routing_map, probs=None, num_out_tokens=None, **options):
    """As 2.17 and 2.20 do."""
    assert num_out_tokens is None or num_out_tokens > 0, "requires num_out_tokens > 0"
    return older(tokens, routing_map, probs)


def returns_nothing(tokens, indices, restore_shape, **options):
    return tokens.clone()


@pytest.mark.parametrize("count", [0, torch.tensor(0)], ids=["number", "tensor"])
@pytest.mark.parametrize("original", [older, newer])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_go_through_to_every_token(weighted, original, count):
    """Zeros of the whole shape: the other ranks' collectives wait for them."""
    tokens = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    probs = torch.rand(TOKENS, EXPERTS, requires_grad=True) if weighted else None
    nobody = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    permute = _guarded_permute(original)
    rows, row_probs, places, *_ = permute(tokens, nobody, probs=probs, num_out_tokens=count, fused=True)
    assert rows.shape == (0, HIDDEN) and (row_probs is None) == (not weighted)
    output = _guarded_unpermute(returns_nothing)(rows, places, torch.Size((TOKENS, HIDDEN)), fused=True)
    assert torch.equal(output, torch.zeros(TOKENS, HIDDEN))
    (output.sum() + (row_probs.sum() if weighted else 0.0)).backward()
    assert torch.equal(tokens.grad, torch.zeros(TOKENS, HIDDEN))
    assert not weighted or torch.equal(probs.grad, torch.zeros(TOKENS, EXPERTS))


def test_a_number_of_rows_that_is_not_known_is_left_to_the_kernel():
    tokens = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    rows, _, _ = _guarded_permute(newer)(tokens, torch.zeros(TOKENS, EXPERTS), num_out_tokens=None)
    rows.sum().backward()
    assert torch.equal(tokens.grad, torch.zeros(TOKENS, HIDDEN))


def test_as_many_results_as_megatron_s_own_permute_has():
    """From megatron-core 0.17 on also padding's offsets and counts (moe_utils.py `permute`)."""
    tokens, counts = torch.ones(TOKENS, HIDDEN), torch.zeros(EXPERTS)
    arguments = {"num_out_tokens": 0, "tokens_per_expert": counts}
    nobody = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    known = inspect.signature(megatron_permute).parameters
    theirs = megatron_permute(tokens, nobody, **{name: value for name, value in arguments.items() if name in known})
    ours = _guarded_permute(newer)(tokens, nobody, **arguments)
    assert len(ours) == len(theirs) and [one is counts for one in ours] == [one is counts for one in theirs]


@pytest.mark.parametrize("options", [{"num_out_tokens": 2}, {}, {"num_out_tokens": 0, "drop_and_pad": True}])
def test_rows_pass_as_they_are(options):
    given = (torch.ones(2, HIDDEN), torch.ones(2), torch.ones(TOKENS, 7))
    found = _guarded_permute(lambda *_, **__: given)(torch.ones(TOKENS, HIDDEN), None, **options)
    assert all(part is other for part, other in zip(found, given, strict=True))
