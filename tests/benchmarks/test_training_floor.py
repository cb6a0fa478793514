"""The operations of the floor against sums over the parameters."""

import math

from benchmarks.training.floor import Products, product, products
from benchmarks.training.inputs import Sizes

SIZES = Sizes(
    hidden_size=8,
    num_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=16,
    vocab_size=32,
    num_experts=4,
    seq_length=4,
    batch_size=2,
)
ATTENTION = 8 * (4 + 2 + 2) * 2 + 8 * 8
EXPERT = 3 * 8 * 16
HEAD = 8 * 32
SCORES = 2 * (2 * 4) * (4 * 4 / 2) * 2
"""Operations of the scores, as of their sums over the values: batch x heads, half of sequence x sequence, dimension."""
FORWARD = 2 * SIZES.tokens * (3 * (ATTENTION + 2 * EXPERT) + HEAD) + 3 * 2 * SCORES
"""Two operations for each weight and token; a token has two experts."""


def operations(found: Products) -> float:
    """Floating-point operations, a multiply-add counted as two."""
    return sum(2.0 * math.prod(shape) * count for shape, count in found.items())


def test_a_linear_layer():
    assert product(5, 3, 2, grad_input=True, grad_weight=True) == {(1, 5, 3, 2): 1, (1, 5, 2, 3): 1, (1, 2, 5, 3): 1}
    assert operations(product(5, 3, 2, grad_input=False, grad_weight=False)) == 2 * 5 * 3 * 2


def test_everything_trains():
    assert operations(products(SIZES, "full")) == 3 * FORWARD


def test_routers_train():
    """Gradients go down to the second layer's input: the first layer's router needs none of its own input."""
    backward = 2 * SIZES.tokens * (2 * (ATTENTION + 2 * EXPERT) + HEAD) + 2 * 4 * SCORES
    assert operations(products(SIZES, "2")) == FORWARD + backward


def test_new_experts_train():
    """Three of four experts, on three quarters of the choices; in the first layer their down projections' input too."""
    new = 2 * SIZES.tokens * 2 * EXPERT * 3 / 4
    weight_gradients, first_layer_down = 3 * new, new / 3
    assert operations(products(SIZES, "1")) == operations(products(SIZES, "2")) + weight_gradients + first_layer_down
