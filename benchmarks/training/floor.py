"""The matrix products that a step cannot do without, by shape, and how long they take alone.

A product is (batch, rows, inner, columns). Attention's are counted over the half of the scores that is not masked; no
product is counted twice, as it is where backward computes the scores again.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator

import torch

from benchmarks.training.inputs import Sizes
from megatron_moe_lpr.model.configuration.architecture import Architecture, read_architecture
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.model.configuration.parameters import Parameter, describe_model

Products = Counter[tuple[int, int, int, int]]
TRAINED: dict[str, frozenset[ParameterKind]] = {
    "1": frozenset({ParameterKind.NEW_EXPERTS, ParameterKind.ROUTER}),
    "2": frozenset({ParameterKind.ROUTER}),
    "full": frozenset(ParameterKind),
}


def products(sizes: Sizes, stage: str) -> Products:
    """Products of one step: forward, input gradients down to the lowest layer that needs them, and weight gradients of
    trained weights only. Every expert is counted with the same share of the tokens."""
    trains = TRAINED[stage]
    found: Products = Counter()
    for parameter in describe_model(_architecture(sizes), [sizes.num_experts] * sizes.num_layers):
        # Below the first router nothing trains, unless everything does: no gradient goes there.
        lowest = parameter.layer == 0 and ParameterKind.ATTENTION not in trains
        # The router's own product is too small to count.
        if parameter.is_product and parameter.kind is not ParameterKind.ROUTER:
            found += _linear(parameter, sizes, grad_input=not lowest, grad_weight=parameter.kind in trains)
        if parameter.name == "self_attention.linear_qkv.weight":
            found += attention(sizes, backward=not lowest)
    return found


def _architecture(sizes: Sizes) -> Architecture:
    named = {"num_hidden_layers": sizes.num_layers, "max_position_embeddings": sizes.seq_length}
    return read_architecture(dataclasses.asdict(sizes) | named | {"model_type": "qwen2"})


def _linear(parameter: Parameter, sizes: Sizes, grad_input: bool, grad_weight: bool) -> Products:
    """Products with a parameter, of each of its copies.

    The down projection's input needs a gradient where the gate and up projections train; the routing weights' gradient
    is had from the output, without a product.
    """
    columns, inner = parameter.shape
    rows = sizes.tokens
    if parameter.kind.is_expert:
        rows = 2 * sizes.tokens // sizes.num_experts
        grad_input |= grad_weight and parameter.name.endswith("linear_fc2.weight")
    found = product(rows, inner, columns, grad_input, grad_weight)
    return Counter({shape: count * parameter.copies for shape, count in found.items()})


def attention(sizes: Sizes, backward: bool) -> Products:
    """Scores and their sums over the values, with causal masking; the gradients of queries, keys and values."""
    length, head = sizes.seq_length, sizes.hidden_size // sizes.num_attention_heads
    batch, half = sizes.batch_size * sizes.num_attention_heads, length // 2
    scores, sums, transposed = (batch, half, head, length), (batch, half, length, head), (batch, length, half, head)
    if not backward:
        return Counter({scores: 1, sums: 1})
    return Counter({scores: 2, sums: 2, transposed: 2})


def product(rows: int, inner: int, columns: int, grad_input: bool, grad_weight: bool) -> Products:
    """A linear layer of `rows` tokens: forward, the gradient of its input and that of its weight."""
    found: Products = Counter({(1, rows, inner, columns): 1})
    if grad_input:
        found[1, rows, columns, inner] += 1
    if grad_weight:
        found[1, columns, rows, inner] += 1
    return found


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
