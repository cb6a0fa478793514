"""Sorting tokens by expert against a loop over experts and tokens, and padding for FP8."""

import importlib

import pytest
import torch

from tests.emulation.kernels import KernelRefuses
from tests.emulation.permutation import NOWHERE, TRITON_MODULE
from tests.emulation.table import TABLE

TOKENS, EXPERTS, HIDDEN = 7, 3, 4
# pad_offsets, which 2.11 lacks
PADDING = (None,) if TABLE.at_least("2.17") else ()


@pytest.fixture
def triton():
    """The module that Transformer Engine's permutation.py calls."""
    return importlib.import_module(TRITON_MODULE)


@pytest.fixture
def routing():
    """Choices with a token that has none and an expert that has none; weights; tokens."""
    choices = torch.rand(TOKENS, EXPERTS) < 0.6
    choices[2], choices[:, 1] = False, False
    choices[0, 0] = choices[0, 2] = True
    return choices, torch.rand(TOKENS, EXPERTS) * choices, torch.randn(TOKENS, HIDDEN)


def by_loop(choices: torch.Tensor) -> list[tuple[int, int]]:
    """Expert and token of every row."""
    return [(expert, token) for expert in range(EXPERTS) for token in range(TOKENS) if choices[token, expert]]


def permute(triton, routing, extra_rows: int = 0):
    choices, probs, tokens = routing
    places = triton.make_row_id_map(choices, TOKENS, EXPERTS)
    sizes = (TOKENS, EXPERTS, int(choices.sum()) + extra_rows, HIDDEN, None)
    return places, triton.permute_with_mask_map(tokens, places, probs, None, *PADDING, *sizes)


def test_a_row_for_every_choice_sorted_by_expert(triton, routing):
    choices, probs, tokens = routing
    _, (rows, scales, weights) = permute(triton, routing)
    pairs = by_loop(choices)
    assert torch.equal(rows, torch.stack([tokens[token] for _, token in pairs]))
    assert torch.equal(weights, torch.stack([probs[token, expert] for expert, token in pairs]))
    assert scales is None


def test_the_map_names_rows_experts_and_their_number(triton, routing):
    choices, _, _ = routing
    places = triton.make_row_id_map(choices, TOKENS, EXPERTS)
    pairs = by_loop(choices)
    for token in range(TOKENS):
        own = [(pairs.index((expert, token)), expert) for expert in range(EXPERTS) if choices[token, expert]]
        row = places[token].tolist()
        assert row[-1] == len(own)
        assert list(zip(row[:EXPERTS], row[EXPERTS:-1], strict=True))[: len(own)] == own
        assert row[len(own) : EXPERTS] == [NOWHERE] * (EXPERTS - len(own))


def test_rows_nobody_writes_hold_no_number(triton, routing):
    _, (rows, _, weights) = permute(triton, routing, extra_rows=2)
    assert rows[-2:].isnan().all() and weights[-2:].isnan().all()
    assert rows[:-2].isfinite().all()


def test_scales_and_single_weights_travel_along(triton, routing):
    choices, _, tokens = routing
    places = triton.make_row_id_map(choices, TOKENS, EXPERTS)
    scale, probs, rows = torch.randn(TOKENS, 2), torch.rand(TOKENS), int(choices.sum())
    sizes = (TOKENS, EXPERTS, rows, HIDDEN, 2)
    _, scales, weights = triton.permute_with_mask_map(tokens, places, probs, scale, *PADDING, *sizes)
    chosen = [token for _, token in by_loop(choices)]
    assert torch.equal(scales, scale[chosen]) and torch.equal(weights, probs[chosen])


@pytest.mark.parametrize("weighted", [False, True])
def test_back_to_tokens(weighted, triton, routing):
    """Sums over a token's experts; zeros for the token without one."""
    choices, probs, tokens = routing
    places, (rows, _, weights) = permute(triton, routing)
    merging = probs if weighted else None
    found, again = triton.unpermute_with_mask_map(rows, places, merging, weights, *PADDING, TOKENS, EXPERTS, HIDDEN)
    factor = probs.double().sum(1) if weighted else choices.double().sum(1)
    torch.testing.assert_close(found.double(), tokens.double() * factor[:, None], rtol=1e-6, atol=1e-6)
    assert torch.equal(again, probs)
    assert not found[2].any()
    assert triton.unpermute_with_mask_map(rows, places, None, None, *PADDING, TOKENS, EXPERTS, HIDDEN)[1] is None


def test_gradients_of_merging(triton, routing):
    choices, probs, _ = routing
    places, (rows, _, _) = permute(triton, routing)
    gradient = torch.randn(TOKENS, HIDDEN)
    grad_rows, grad_probs = triton.unpermute_with_mask_map_bwd_with_merging_probs(
        gradient, places, rows, probs, *PADDING, TOKENS, EXPERTS, rows.shape[0], HIDDEN
    )
    for index, (expert, token) in enumerate(by_loop(choices)):
        torch.testing.assert_close(grad_rows[index], gradient[token] * probs[token, expert])
        torch.testing.assert_close(grad_probs[token, expert], (gradient[token] * rows[index]).sum())
    assert not grad_probs[~choices].any()


def test_chunks_change_places_and_back(triton):
    rows, probs, sizes, order = torch.randn(6, HIDDEN), torch.rand(6), torch.tensor([2, 0, 3, 1]), [2, 0, 3, 1]
    places = triton.make_chunk_sort_map(sizes, torch.tensor(order), 6, 4)
    moved, weights = triton.sort_chunks_by_map(rows, places, probs, 6, HIDDEN, True)
    chunks = rows.split(sizes.tolist())
    assert torch.equal(moved, torch.cat([chunks[index] for index in order]))
    back, again = triton.sort_chunks_by_map(moved, places, weights, 6, HIDDEN, False)
    assert torch.equal(back, rows) and torch.equal(again, probs)
    assert triton.sort_chunks_by_map(rows, places, None, 6, HIDDEN, True)[1] is None


def test_rows_padded_and_back(tex):
    rows, padded = [3, 0, 2], [16, 0, 16]
    source, target = torch.randn(5, HIDDEN), torch.full((32, HIDDEN), torch.nan)
    tex.fused_multi_row_padding(source, target, rows, padded)
    assert torch.equal(target[:3], source[:3]) and torch.equal(target[16:18], source[3:])
    assert not target[3:16].any() and not target[18:].any()
    again = torch.empty_like(source)
    tex.fused_multi_row_unpadding(target, again, padded, rows)
    assert torch.equal(again, source)


@pytest.mark.skipif(not PADDING, reason="2.11 pads in a pass of its own")
def test_padding_in_the_same_pass_is_refused(triton, routing):
    choices, probs, tokens = routing
    places, offsets = triton.make_row_id_map(choices, TOKENS, EXPERTS), torch.zeros(EXPERTS)
    sizes = (TOKENS, EXPERTS, 9, HIDDEN)
    for name, arguments in (
        ("permute_with_mask_map", (tokens, places, probs, None, offsets, *sizes, None)),
        ("unpermute_with_mask_map", (tokens, places, None, None, offsets, TOKENS, EXPERTS, HIDDEN)),
        ("unpermute_with_mask_map_bwd_with_merging_probs", (tokens, places, tokens, probs, offsets, *sizes)),
    ):
        with pytest.raises(KernelRefuses, match=rf"{name}: rows of experts padded while they are sorted"):
            getattr(triton, name)(*arguments)


def test_refusals(triton, routing, tex):
    choices, probs, tokens = routing
    with pytest.raises(KernelRefuses, match="not contiguous"):
        triton.make_row_id_map(torch.zeros(EXPERTS, TOKENS).t(), TOKENS, EXPERTS)
    with pytest.raises(KernelRefuses, match=r"\[tokens, experts\]"):
        triton.make_row_id_map(choices, TOKENS + 1, EXPERTS)
    with pytest.raises(KernelRefuses, match="writes past its 1 rows"):
        places = triton.make_row_id_map(choices, TOKENS, EXPERTS)
        triton.permute_with_mask_map(tokens, places, probs, None, *PADDING, TOKENS, EXPERTS, 1, HIDDEN, None)
    with pytest.raises(KernelRefuses, match="chunks and rows differ"):
        triton.make_chunk_sort_map(torch.tensor([2, 2]), torch.tensor([1, 0]), 5, 2)
    for kernel in (tex.fused_multi_row_padding, tex.fused_multi_row_unpadding):
        for arguments, message in (
            ((torch.ones(4, 2), torch.ones(8, 2), [4], [16]), "past its tensors"),
            ((torch.ones(2, 4).t(), torch.ones(16, 2), [4], [16]), "not contiguous"),
            ((torch.ones(4, 2, 1), torch.ones(16, 2, 1), [4], [16]), "two dimensions"),
            ((torch.ones(4, 2), torch.ones(16, 2), [4], [16, 0]), "1 and 2 counts"),
            ((torch.ones(4, 2), torch.ones(16, 2).bfloat16(), [4], [16]), "into"),
        ):
            with pytest.raises(KernelRefuses, match=message):
                kernel(*arguments)
