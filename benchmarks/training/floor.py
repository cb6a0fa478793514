"""The matrix products that a step cannot do without, by shape, and how long they take alone.

A product is (batch, rows, inner, columns). Attention's are counted over the half of the scores that is not masked; no
product is counted twice, as it is where backward computes the scores again.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator

import torch

from benchmarks.training.inputs import Sizes
from megatron_moe_lpr.model.parameter_kinds import ParameterKind

Products = Counter[tuple[int, int, int, int]]
TRAINED: dict[str, tuple[ParameterKind, ...]] = {
    "1": ("new experts", "router"),
    "2": ("router",),
    "full": ("embedding", "attention", "norm", "dense FFN", "original expert", "new experts", "router"),
}


def products(sizes: Sizes, stage: str) -> Products:
    """Products of one step: forward, input gradients down to the lowest layer that needs them, and weight gradients of
    trained weights only. Every expert is counted with the same share of the tokens."""
    trains, rows = TRAINED[stage], sizes.tokens
    found: Products = Counter()
    head = sizes.hidden_size // sizes.num_attention_heads
    projection = head * (sizes.num_attention_heads + 2 * sizes.num_key_value_heads)
    for layer in range(sizes.num_layers):
        # Below the first router nothing trains, unless everything does: no gradient goes there.
        lowest = layer == 0 and "attention" not in trains
        found += product(rows, sizes.hidden_size, projection, not lowest, "attention" in trains)
        found += attention(sizes, backward=not lowest)
        found += product(rows, head * sizes.num_attention_heads, sizes.hidden_size, not lowest, "attention" in trains)
        found += experts(sizes, trains, of_input=not lowest)
    return found + product(rows, sizes.hidden_size, sizes.vocab_size, True, "embedding" in trains)


def attention(sizes: Sizes, backward: bool) -> Products:
    """Scores and their sums over the values, with causal masking; the gradients of queries, keys and values."""
    length, head = sizes.seq_length, sizes.hidden_size // sizes.num_attention_heads
    batch, half = sizes.batch_size * sizes.num_attention_heads, length // 2
    scores, sums, transposed = (batch, half, head, length), (batch, half, length, head), (batch, length, half, head)
    if not backward:
        return Counter({scores: 1, sums: 1})
    return Counter({scores: 2, sums: 2, transposed: 2})


def experts(sizes: Sizes, trains: Collection[ParameterKind], of_input: bool) -> Products:
    """The FFNs of a layer, two choices a token. The router's own product is too small to count.

    `of_input`: whether the layer's input needs a gradient. The down projection's input needs one then, and where the
    gate and up projections train; the routing weights' gradient is had from the output, without a product.
    """
    found: Products = Counter()
    rows = 2 * sizes.tokens // sizes.num_experts
    for expert in range(sizes.num_experts):
        weights = ("new experts" if expert else "original expert") in trains
        found += product(rows, sizes.hidden_size, 2 * sizes.intermediate_size, of_input, weights)
        found += product(rows, sizes.intermediate_size, sizes.hidden_size, of_input or weights, weights)
    return found


def product(rows: int, inner: int, columns: int, of_input: bool, of_weight: bool) -> Products:
    """A linear layer of `rows` tokens: forward, the gradient of its input and that of its weight."""
    found: Products = Counter({(1, rows, inner, columns): 1})
    if of_input:
        found[1, rows, columns, inner] += 1
    if of_weight:
        found[1, columns, rows, inner] += 1
    return found


def operations(found: Products) -> float:
    """Floating-point operations, a multiply-add counted as two."""
    return sum(2.0 * math.prod(shape) * count for shape, count in found.items())


def separate(found: Products) -> Iterator[tuple[tuple[list[int], int, int, int], int]]:
    """Shapes with their batch as a list, empty for a single product."""
    for (batch, *sizes), count in found.items():
        yield ([batch] if batch > 1 else [], *sizes), count


class Floor:
    """Does the products of a step, each shape alone with operands that are ready."""

    def __init__(self, found: Products, precision: str) -> None:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.pairs = [
            # Weights lie [output, input], as a linear layer keeps them.
            (torch.randn(*batch, rows, inner, dtype=dtype), torch.randn(*batch, columns, inner, dtype=dtype).mT, count)
            for (batch, rows, inner, columns), count in separate(found)
        ]

    def step(self) -> float:
        """One step's products."""
        for left, right, count in self.pairs:
            for _ in range(count):
                torch.matmul(left, right)
        return 0.0
