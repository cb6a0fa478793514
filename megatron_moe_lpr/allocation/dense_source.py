"""The dense model's tensors, layer by layer, from a Hugging Face directory or a checkpoint of any layout."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_moe_lpr.checkpoint.format.chain import open_reader, resolve_and_hold
from megatron_moe_lpr.checkpoint.format.directory import CONFIG_FILE, LATEST_FILE, is_iteration_directory
from megatron_moe_lpr.checkpoint.loading.verification import open_checkpoint
from megatron_moe_lpr.conversion.hugging_face.hf_directory import check_tensors, open_hf_directory
from megatron_moe_lpr.conversion.reading import check_model_tensors, read_row
from megatron_moe_lpr.conversion.tensors.fused import StoredForm, stored_tensors
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import read_json
from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.tensors import DENSE_LAYOUT, EMBEDDING_NAME, Row, model_rows


class DenseSource:
    """A dense model on disk; one tensor, or one layer, is in memory at a time."""

    ffn_module = "mlp"
    """Name of the FFN in a layer of transformers' class."""

    def __init__(
        self,
        config: dict[str, Any],
        architecture: Architecture,
        rows: list[Row],
        read: Callable[[Row], list],
        locks: contextlib.ExitStack | None = None,
    ) -> None:
        self.config, self.architecture = config, architecture
        self._rows, self._read = rows, read
        self._locks = locks
        """Read locks of the checkpoint, held for the lifetime of this object."""

    def layer(self, layer: int) -> dict[str, torch.Tensor]:
        """Tensors of a layer, fp32, under the names that transformers' class has inside the layer."""
        prefix = f"model.layers.{layer}."
        tensors = {
            name: tensor.float()
            for row in self._rows
            if row.layer == layer and row.kind.is_original
            for name, tensor in zip(row.dense_names, self._read(row), strict=True)
        }
        form = StoredForm(self.architecture.family.name, self.architecture.head_dim)
        for stored in stored_tensors(tuple(tensors), form):
            tensors[stored.name] = stored.join(tensors.pop)
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def embedding(self) -> torch.Tensor:
        """[vocabulary, hidden] in the stored dtype, with the rows of vocabulary extensions."""
        parts = [self._read(row)[0] for row in self._rows if row.names == (EMBEDDING_NAME,)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return sum(row.shape[0] for row in self._rows if row.names == (EMBEDDING_NAME,))


def open_dense_source(path: Path) -> DenseSource:
    """Open a dense Hugging Face directory or a checkpoint; of a checkpoint with experts, the dense model in it.

    Raises:
        UserError: neither of these, a stock MoE directory, or weights that do not fit the configuration.
    """
    path = Path(path)
    if (path / LATEST_FILE).is_file() or is_iteration_directory(path):
        return _checkpoint_source(path)
    model = open_hf_directory(path)
    if model.is_moe:
        raise UserError(f"{path}: has experts; give the dense model it was made from, or import it first")
    architecture, source = model.architecture, model.source()
    rows = model_rows(architecture, model.experts_per_layer, DENSE_LAYOUT, new_tokens=model.new_tokens)
    source = check_tensors(rows, [], source, path, model.stored_form)

    def read(row: Row) -> list[torch.Tensor]:
        tensors = [source.read(name) for name in row.names]
        return [tensor[slice(*row.rows)] for tensor in tensors] if row.rows else tensors

    return DenseSource(model.config, architecture, rows, read)


def _checkpoint_source(path: Path) -> DenseSource:
    with contextlib.ExitStack() as locks:
        checkpoint = open_checkpoint(locks.enter_context(resolve_and_hold(path)))
        card, architecture = checkpoint.card(), checkpoint.architecture()
        if architecture.mixture:
            raise UserError(
                f"{path}: its base model is a mixture; how many experts layers need is measured in dense ones"
            )
        rows = model_rows(architecture, card.experts_per_layer, DENSE_LAYOUT, card.expansions, card.new_tokens)
        reader = open_reader(checkpoint)
        check_model_tensors(rows, reader)
        config = read_json(checkpoint.side_directory / CONFIG_FILE)

        def read(row: Row) -> list[torch.Tensor]:
            return [tensor.float() for tensor in read_row(row, reader, architecture)]

        return DenseSource(config, architecture, rows, read, locks.pop_all())
