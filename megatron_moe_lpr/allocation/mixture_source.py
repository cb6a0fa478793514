"""The tensors of a base model that is a mixture, layer by layer, from a Hugging Face directory or from a checkpoint."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_moe_lpr.allocation.dense_source import DenseSource
from megatron_moe_lpr.checkpoint.format.chain import open_reader, resolve_and_hold
from megatron_moe_lpr.checkpoint.format.directory import CONFIG_FILE
from megatron_moe_lpr.checkpoint.loading.verification import open_checkpoint
from megatron_moe_lpr.conversion.hugging_face.hf_directory import check_tensors, open_hf_directory
from megatron_moe_lpr.conversion.hugging_face.installed_transformers import check_mixtures
from megatron_moe_lpr.conversion.reading import check_model_tensors, read_row
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import read_json
from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.configuration.mixtures import Mixture
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.model.tensors import MOE_LAYOUTS, Row, model_rows

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
        locks: contextlib.ExitStack | None = None,
    ) -> None:
        super().__init__(config, architecture, rows, read, locks)
        self.mixture = mixture
        self.ffn_module, router = FFN_AND_ROUTER.get(architecture.family.name, OTHERS)
        self.router = f"{self.ffn_module}.{router}"

    def layer(self, layer: int) -> dict[str, torch.Tensor]:
        """Tensors of a layer, fp32; its experts' matrices one behind the other, as transformers 5 has them."""
        prefix, found, experts = f"model.layers.{layer}.", {}, list[torch.Tensor]()
        for row in self._rows:
            if row.layer != layer or not row.kind.is_original:
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
        UserError: no mixture, weights that do not fit its configuration, or a transformers before version 5.
    """
    model = open_hf_directory(path)
    mixture, source = model.architecture.mixture, model.source()
    if mixture is None:
        raise UserError(f"--sample: is for a base model that is a mixture, and {path} is dense")
    check_mixtures("--sample")
    rows = model_rows(model.architecture, model.experts_per_layer, model.layout)
    source = check_tensors(rows, [], source, path, model.stored_form)

    def read(row: Row) -> list[torch.Tensor]:
        return [source.read(name) for name in row.names]

    return MixtureSource(model.config, model.architecture, mixture, rows, read)


def open_mixture_in_checkpoint(path: Path, base: Path | None = None, verified: bool = True) -> MixtureSource:
    """Open the base model inside a checkpoint, without the experts that were added to it; rows of new tokens included.

    Args:
        path: checkpoint directory, or one iteration in it; it is locked for the lifetime of the result.
        base: directory of the checkpoint with the weights that --save-trainable-only left out, if it has moved.
        verified: compare the checkpoint's small files with their checksums.

    Raises:
        UserError: no such checkpoint, its base model is dense, or a transformers before version 5.
    """
    with contextlib.ExitStack() as locks:
        checkpoint = open_checkpoint(locks.enter_context(resolve_and_hold(path, base)), verified, base)
        card, architecture = checkpoint.card(), checkpoint.architecture()
        if architecture.mixture is None:
            raise UserError(f"--sample: is for a base model that is a mixture, and that of {path} is dense")
        check_mixtures("--sample")
        layout = MOE_LAYOUTS[architecture.family.moe_model_type]
        rows = model_rows(architecture, card.experts_per_layer, layout, card.expansions, card.new_tokens)
        reader = open_reader(checkpoint)
        check_model_tensors(rows, reader)
        config = read_json(checkpoint.side_directory / CONFIG_FILE)

        def read(row: Row) -> list[torch.Tensor]:
            return read_row(row, reader, architecture)

        return MixtureSource(config, architecture, architecture.mixture, rows, read, locks.pop_all())
