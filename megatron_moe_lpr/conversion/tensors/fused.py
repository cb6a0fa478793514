"""Tensors that a checkpoint stores otherwise than the table of names (`model/tensors.py`) has them.

Several as one, or the rows of queries and keys in the order in which their rotary embedding turns neighbours.

Everything but the two ends, reading and writing safetensors, sees the table's names: `SplitSource` gives a file's
tensors under them, and `StoredTensor.join` makes one of them again.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch

from megatron_moe_lpr.model.configuration.parameters import Shape

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Fusion:
    """A tensor of each layer that holds several of the table's matrices one below the other."""

    stored: str
    """Its name, with `{layer}`."""
    parts: tuple[str, ...]
    """The table's names from top to bottom, with `{layer}` and, of experts, `{expert}`. Where they have an expert, the
    tensor has three dimensions and the matrices of one expert after the other."""


def _in_layer(stored: str, *parts: str) -> Fusion:
    stored_name, *names = (f"model.layers.{{layer}}.{name}.weight" for name in (stored, *parts))
    return Fusion(stored_name, tuple(names))


FUSIONS: Mapping[str, tuple[Fusion, ...]] = {
    "phi3": (
        _in_layer("self_attn.qkv_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        _in_layer("mlp.gate_up_proj", "mlp.gate_proj", "mlp.up_proj"),
    ),
    "granitemoe": (
        _in_layer(
            "block_sparse_moe.input_linear",
            "block_sparse_moe.experts.{expert}.gate_proj",
            "block_sparse_moe.experts.{expert}.up_proj",
        ),
        _in_layer("block_sparse_moe.output_linear", "block_sparse_moe.experts.{expert}.down_proj"),
    ),
}
"""By `model_type` of `config.json`, dense or MoE."""


NEIGHBOURS = frozenset({"helium", "ernie4_5"})
"""Values of `model_type` whose rotary embedding turns dimensions 2 i and 2 i + 1 of a head, in a family whose stock
mixture turns i and i + half a head: rows of queries and keys change places, and the products stay the same."""
_TURNED = re.compile(r"model\.layers\.\d+\.self_attn\.[qk]_proj\.(weight|bias)")


@dataclasses.dataclass(frozen=True)
class StoredForm:
    """How a checkpoint stores its tensors."""

    model_type: str
    """Of its `config.json`, dense or MoE."""
    head_dim: int


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint and the names of its parts."""

    name: str
    matrices: tuple[tuple[str, ...], ...]
    """The parts of each expert, from top to bottom; of what is no expert's one tuple."""
    stacked: bool = False
    """The first dimension counts experts."""
    turned_head: int | None = None
    """Dimension of a head whose rows lie in pairs of neighbours; None: as in the table."""

    @property
    def parts(self) -> list[str]:
        """Names of all parts."""
        return [part for parts in self.matrices for part in parts]

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Shape of the tensor, from the shapes of its parts."""
        rows = sum(shapes[part][0] for part in self.matrices[0])
        matrix = (rows, *shapes[self.matrices[0][0]][1:])
        return (len(self.matrices), *matrix) if self.stacked else matrix

    def join(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The tensor, of its parts in the widest of their dtypes."""
        matrices = [torch.cat([read(part) for part in parts]) for parts in self.matrices]
        if self.turned_head:
            return _swap(matrices[0], self.turned_head, 2, self.turned_head // 2)
        return torch.stack(matrices) if self.stacked else matrices[0]

    def split(self, tensor: torch.Tensor, part: str, shapes: Mapping[str, Shape]) -> torch.Tensor:
        """A copy of one part of the tensor."""
        if self.turned_head:
            return _swap(tensor, self.turned_head, self.turned_head // 2, 2)
        expert = next(index for index, parts in enumerate(self.matrices) if part in parts)
        parts = self.matrices[expert]
        first = sum(shapes[above][0] for above in parts[: parts.index(part)])
        matrix = tensor[expert] if self.stacked else tensor
        # A view would be saved with the storage of the whole.
        return matrix[first : first + shapes[part][0]].clone()


def _swap(tensor: torch.Tensor, head_dim: int, rows: int, columns: int) -> torch.Tensor:
    """Exchange the two numbers by which the rows of each head are counted: [heads, rows, columns] are transposed."""
    heads = len(tensor) // head_dim
    return tensor.reshape(heads, rows, columns, -1).transpose(1, 2).reshape(tensor.shape).contiguous()


def stored_tensors(names: Iterable[str], form: StoredForm) -> list[StoredTensor]:
    """Return the tensors of a checkpoint that hold several of `names`, or one with its rows in another order."""
    if form.model_type in NEIGHBOURS:
        turned = [name for name in names if _TURNED.fullmatch(name)]
        return [StoredTensor(name, ((name,),), turned_head=form.head_dim) for name in turned]
    found: dict[tuple[str, bool], dict[int, dict[int, str]]] = {}
    patterns = [
        (fusion, place, _pattern(part))
        for fusion in FUSIONS.get(form.model_type, ())
        for place, part in enumerate(fusion.parts)
    ]
    for name in names:
        for fusion, place, pattern in patterns:
            if match := pattern.fullmatch(name):
                given = match.groupdict()
                key = fusion.stored.format(layer=given["layer"]), "expert" in given
                found.setdefault(key, {}).setdefault(int(given.get("expert", 0)), {})[place] = name
    return [
        StoredTensor(name, tuple(_in_order(parts) for parts in _in_order(experts)), stacked)
        for (name, stacked), experts in found.items()
    ]


def _in_order(numbered: Mapping[int, Item]) -> tuple[Item, ...]:
    return tuple(numbered[number] for number in sorted(numbered))


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    for field in ("layer", "expert"):
        escaped = escaped.replace(re.escape(f"{{{field}}}"), rf"(?P<{field}>\d+)")
    return re.compile(escaped)
