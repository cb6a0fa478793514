"""The matrix products that a step cannot do without, by shape, and how long they take alone.

A product is (rows, inner, columns). Attention scores are left out: they are less than 3% of the operations here, and
torch's kernel for them is no matrix product of this kind.
"""

from collections import Counter
from collections.abc import Collection

import torch

from benchmarks.training.inputs import Sizes
from megatron_moe_lpr.model.parameter_kinds import ParameterKind

Products = Counter[tuple[int, int, int]]
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
        found += product(rows, head * sizes.num_attention_heads, sizes.hidden_size, not lowest, "attention" in trains)
        found += experts(sizes, trains, of_input=not lowest)
    return found + product(rows, sizes.hidden_size, sizes.vocab_size, True, "embedding" in trains)


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
    found: Products = Counter({(rows, inner, columns): 1})
    if of_input:
        found[rows, columns, inner] += 1
    if of_weight:
        found[columns, rows, inner] += 1
    return found


def operations(found: Products) -> float:
    """Floating-point operations, a multiply-add counted as two."""
    return sum(2.0 * rows * inner * columns * count for (rows, inner, columns), count in found.items())


class Floor:
    """Does the products of a step, each shape alone with operands that are ready."""

    def __init__(self, found: Products, precision: str) -> None:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.pairs = [
            # Weights lie [output, input], as a linear layer keeps them.
            (torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype).t(), count)
            for (rows, inner, columns), count in found.items()
        ]

    def step(self) -> float:
        """One step's products."""
        for left, right, count in self.pairs:
            for _ in range(count):
                torch.mm(left, right)
        return 0.0
