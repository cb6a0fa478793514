"""Megatron's `--moe-layer-freq`: which layers get experts, as an interval or a pattern."""

import ast
from typing import Any

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.architecture import MAX_LAYERS


def layers_with_experts(text: str, num_layers: int) -> list[bool]:
    """Read the flag as Megatron does (training/arguments.py `moe_freq_type`), without running it as Python.

    Args:
        text: N, experts in layers 0, N, 2N, ...; or a list of one 0 or 1 per layer, which `+` joins and `*` repeats,
            for example `[0]+[1]*31`.

    Raises:
        UserError: neither of these, or not a pattern for this many layers.
    """
    try:
        value = _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ValueError, RecursionError):
        raise UserError(f"--moe-layer-freq {text}: neither a number nor a pattern such as [0]+[1]*31") from None
    if isinstance(value, int):
        if not 1 <= value <= num_layers:
            raise UserError(f"--moe-layer-freq {text}: must lie between 1 and the number of layers, {num_layers}")
        return [layer % value == 0 for layer in range(num_layers)]
    if len(value) != num_layers:
        raise UserError(f"--moe-layer-freq {text}: names {len(value)} layers, and the model has {num_layers}")
    if not all(flag in (0, 1) for flag in value) or 1 not in value:
        raise UserError(f"--moe-layer-freq {text}: must hold a 1 for a layer with experts, a 0 for one without")
    return [flag == 1 for flag in value]


def _evaluate(node: ast.expr) -> Any:
    """A whole number or a list. Raises TypeError or ValueError for anything but these and their sums and products."""
    match node:
        case ast.Constant(value=value) if type(value) is int:
            return value
        case ast.List(elts=elements):
            return [_evaluate(element) for element in elements]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _evaluate(left) + _evaluate(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            factors = _evaluate(left), _evaluate(right)
            length, times = (factor if isinstance(factor, int) else len(factor) for factor in factors)
            if length * times > MAX_LAYERS:
                raise ValueError(f"more than {MAX_LAYERS} layers")
            return factors[0] * factors[1]
    raise ValueError(ast.dump(node))
