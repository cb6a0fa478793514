"""Which experts of a mixture a sample of text uses most, layer by layer: new experts may begin as copies of these."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_moe_lpr.allocation.dense_source import DenseSource
from megatron_moe_lpr.allocation.ffn_inputs import ffn_inputs
from megatron_moe_lpr.conversion.added_experts import most_used
from megatron_moe_lpr.conversion.hugging_face.hf_directory import check_tensors, open_hf_directory
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.configuration.mixtures import Mixture
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.model.tensors import Row, model_rows

FFN_AND_ROUTER = {"granitemoe": ("block_sparse_moe", "router.weight")}
"""Names of the FFN in a layer of transformers' class and of the router's weight in it, where they are no others'."""
OTHERS = ("mlp", "gate.weight")


class MixtureSource(DenseSource):
    """A mixture on disk, one layer in memory at a time, under the names of transformers' classes in memory."""

    def __init__(
        self,
        config: dict[str, Any],
        architecture: Architecture,
        mixture: Mixture,
        rows: list[Row],
        read: Callable[[Row], list[torch.Tensor]],
    ) -> None:
        super().__init__(config, architecture, rows, read)
        self.mixture = mixture
        self.ffn_module, router = FFN_AND_ROUTER.get(architecture.family.name, OTHERS)
        self.router = f"{self.ffn_module}.{router}"

    def layer(self, layer: int) -> dict[str, torch.Tensor]:
        """Tensors of a layer, fp32; its experts' matrices one behind the other, as transformers 5 has them."""
        prefix, found, experts = f"model.layers.{layer}.", {}, list[torch.Tensor]()
        for row in self._rows:
            if row.layer != layer:
                continue
            tensors = [tensor.float() for tensor in self._read(row)]
            if row.kind is ParameterKind.BASE_EXPERTS:
                experts += tensors
            elif row.kind is ParameterKind.BASE_ROUTER:
                found[self.router] = tensors[0]
            else:
                found |= {name.removeprefix(prefix): one for name, one in zip(row.names, tensors, strict=True)}
        if experts:
            gate, up, down = _by_projection(experts)
            place = f"{self.ffn_module}.experts"
            found |= {f"{place}.gate_up_proj": torch.cat((gate, up), dim=1), f"{place}.down_proj": down}
        return found


def _by_projection(matrices: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stack the matrices of all gate, all up and all down projections; `matrices` has them in this order."""
    count = len(matrices) // 3
    parts = [torch.stack(list(matrices[place * count : (place + 1) * count])) for place in range(3)]
    return parts[0], parts[1], parts[2]


def open_mixture_source(path: Path) -> MixtureSource:
    """Open a mixture in a Hugging Face directory.

    Raises:
        UserError: no mixture, or weights that do not fit its configuration.
    """
    model = open_hf_directory(path)
    mixture, source = model.architecture.mixture, model.source()
    if mixture is None:
        raise UserError(f"--sample: is for a base model that is a mixture, and {path} is dense")
    rows = model_rows(model.architecture, model.experts_per_layer, model.layout)
    source = check_tensors(rows, [], source, path, model.stored_form)

    def read(row: Row) -> list[torch.Tensor]:
        return [source.read(name) for name in row.names]

    return MixtureSource(model.config, model.architecture, mixture, rows, read)


def expert_usage(
    source: MixtureSource, windows: Mapping[str, torch.Tensor], device: torch.device
) -> Iterator[torch.Tensor]:
    """Yield for layer 0, 1, ... how many of the sample's tokens choose each expert, [experts]; empty for a dense layer.

    Args:
        windows: token ids [windows, length] of each language, the same length for all.
    """
    for layer, inputs in enumerate(ffn_inputs(source, windows, device)):
        experts = source.mixture.experts[layer]
        if experts == 1:
            yield torch.empty(0)
            continue
        router = source.layer(layer)[source.router]
        chosen = [(one @ router.T).topk(source.mixture.top_k, dim=-1).indices for one in inputs.values()]
        yield torch.bincount(torch.cat([one.flatten() for one in chosen]), minlength=experts)


def most_used_experts(
    source: MixtureSource, counts: Sequence[int], windows: Mapping[str, torch.Tensor], device: torch.device
) -> list[list[int]]:
    """By layer the experts that the sample uses most, one for each new expert of `counts`."""
    usage = expert_usage(source, windows, device)
    return [most_used(one, count) if count else [] for one, count in zip(usage, counts, strict=True)]
