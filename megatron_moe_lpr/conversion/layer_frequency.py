"""Which layers get experts: Megatron's `--moe-layer-freq`, an interval or a pattern."""

import ast

from megatron_moe_lpr.errors import UserError

MOST_LAYERS = 10_000


def layers_with_experts(text: str, num_layers: int) -> list[bool]:
    """Read the flag as Megatron does (training/arguments.py `moe_freq_type`), without evaluating it as Python.

    Args:
        text: N, experts in layers 0, N, 2N, ...; or a list of one 0 or 1 per layer, which `+` joins and `*` repeats,
            for example `[0]+[1]*31`.

    Raises:
        UserError: neither of these, or not a pattern for this many layers.
    """
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError):
        raise UserError(f"--moe-layer-freq {text}: neither a number nor a pattern such as [0]+[1]*31") from None
    if isinstance(value, int):
        if not 1 <= value <= num_layers:
            raise UserError(f"--moe-layer-freq {text}: must lie between 1 and the number of layers, {num_layers}")
        return [layer % value == 0 for layer in range(num_layers)]
    if len(value) != num_layers:
        raise UserError(f"--moe-layer-freq {text}: names {len(value)} layers, and the model has {num_layers}")
    if not set(value) <= {0, 1} or 1 not in value:
        raise UserError(f"--moe-layer-freq {text}: must hold a 1 for a layer with experts, a 0 for one without")
    return [flag == 1 for flag in value]


def _value(node: ast.expr) -> int | list[int]:
    """Raises ValueError for anything but numbers, lists of them, + of two lists and * of a list and a number."""
    if isinstance(node, ast.List):
        return [_number(element) for element in node.elts]
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult):
            return _repeated(*((right, left) if isinstance(left, int) else (left, right)))
    return _number(node)


def _number(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    raise ValueError(ast.dump(node))


def _repeated(values: int | list[int], times: int | list[int]) -> list[int]:
    if isinstance(values, int) or isinstance(times, list) or len(values) * times > MOST_LAYERS:
        raise ValueError(f"{values} * {times}")
    return values * times
