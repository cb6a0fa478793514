"""Upcycling (paper, section 3.1): the tensors of a MoE model made from those of a dense one.

`megatron_moe_lpr.upcycle` (api.py) is the whole import, with its flags and files; `upcycle` below is the step in it
that gives the method its name.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megatron_moe_lpr.checkpoint.format.writer import CheckpointWriter
from megatron_moe_lpr.conversion.tensor_sources import TensorSources
from megatron_moe_lpr.conversion.tensors.blocks import ZEROED
from megatron_moe_lpr.conversion.tensors.fingerprint import OriginalFingerprint
from megatron_moe_lpr.conversion.tensors.new_rows import initial_output_rows, initial_rows
from megatron_moe_lpr.conversion.tensors.qkv import interleave_qkv
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.model.finite import is_finite
from megatron_moe_lpr.model.tensors import OUTPUT_NAME, Row
from megatron_moe_lpr.progress import ProgressReport


def upcycle(sources: TensorSources, writer: CheckpointWriter, progress: ProgressReport) -> str:
    """Read every tensor of the source once and write what the MoE model makes of it; one is in memory at a time.

    Attention, norms, embedding and the original expert of each layer are the dense model's own weights, and so at
    first are all new experts, copies of the layer's FFN. Routers are drawn. Of a mixture base all experts and the
    router's rows are the base model's own, and new ones are copies of some of them. Where the source has trained
    experts (an adapter or a stock MoE), these and their routers are read from it instead, each from its own name.

    Returns:
        The fingerprint of the dense model's weights.

    Raises:
        UserError: a weight that is NaN or infinite, or a model of which a tensor was not written.
    """
    fingerprint = OriginalFingerprint()
    # Hashing beside writing costs no time where a second core is free.
    with ThreadPoolExecutor(1) as pool:

        def start_hashing(name: str, tensor: torch.Tensor) -> Future[None]:
            return pool.submit(fingerprint.add, name, tensor)

        # Neighbouring rows that read the same names: the FFN matrix of the original expert and all its copies.
        for _, same_source in itertools.groupby(sources.rows, key=lambda row: row.names or row.key):
            rows = list(same_source)
            row = rows[0]
            if row.kind is ParameterKind.EMBEDDING or (row.kind.is_router and row.rows):
                _write_rows(sources, rows, writer, progress, start_hashing)
                continue
            parts = [read_finite(sources, name).to(sources.stored_dtype(row)) for name in row.names]
            hashing = [start_hashing(*pair) for pair in zip(row.dense_names, parts, strict=False)]
            if row.kind is ParameterKind.ROUTER and not parts:
                tensor = _new_router_rows(sources, row)
            elif len(parts) > 1:
                tensor = interleave_qkv(parts, sources.model.architecture)
            elif sources.inserts and row.kind is ParameterKind.INSERTED_BLOCKS and row.key.endswith(ZEROED):
                # Block expansion (LLaMA-Pro), with which the model stays dense.
                tensor = torch.zeros_like(parts[0])
            else:
                tensor = parts[0]
            for row in rows:
                writer.write(row.key, tensor)
                progress.advance(tensor.nbytes, {"MB": tensor.nbytes / 1e6})
            for future in hashing:
                future.result()
    _check_complete(sources, writer)
    return fingerprint.hexdigest()


def _write_rows(
    sources: TensorSources,
    rows: Sequence[Row],
    writer: CheckpointWriter,
    progress: ProgressReport,
    start_hashing: Callable[[str, torch.Tensor], Future[None]],
) -> None:
    """Write a matrix whose rows are several tensors: over the vocabulary the base model's and those of each extension,
    in the router of a mixture base those of its experts and of new ones.

    Args:
        rows: the tensors that are made of one matrix of the source.
    """
    (name,) = rows[0].names
    matrix = read_finite(sources, name)
    for row in rows:
        if sources.extension and sources.makes(row):
            make = initial_output_rows if name == OUTPUT_NAME else initial_rows
            tensor = make(matrix, sources.extension.pieces)
        else:
            tensor = _old_rows(sources, row, matrix)
        hashing = [start_hashing(dense_name, tensor) for dense_name in row.dense_names]
        writer.write(row.key, tensor)
        progress.advance(tensor.nbytes, {"MB": tensor.nbytes / 1e6})
        for future in hashing:
            future.result()


def _old_rows(sources: TensorSources, row: Row, matrix: torch.Tensor) -> torch.Tensor:
    if row.rows is None:
        return matrix
    values = matrix[slice(*row.rows)]
    tensor = values.to(sources.stored_dtype(row))
    if not torch.equal(tensor.to(values.dtype), values):
        raise UserError(
            f"{sources.files.file(row.names[0])}: {row.names[0]} has rows of the dense model that {tensor.dtype}, the "
            "dtype of its other weights, does not hold exactly; save the model in one dtype"
        )
    # A part of a matrix would be saved with the storage of the whole.
    return tensor if len(tensor) == len(matrix) else tensor.clone()


def _new_router_rows(sources: TensorSources, row: Row) -> torch.Tensor:
    """Rows that the source has not: the whole router of a dense model, or of a mixture base those of new experts, which
    are copies of the copied experts' rows."""
    layer = row.layer or 0
    if sources.added is None:
        num_experts, hidden_size = row.shape
        return initial_router(num_experts, hidden_size, sources.seed, layer)
    router = sources.model.layout.router or ""
    return read_finite(sources, router.format(layer=layer)).float()[sources.added.copied[layer]]


def initial_router(num_experts: int, hidden_size: int, seed: int, layer: int) -> torch.Tensor:
    """Draw a router's initial weight, Xavier-normal, [experts, hidden] float32.

    It depends on the seed and the layer alone, so it is the same whatever the parallel layout or the other layers are.
    """
    digest = hashlib.sha256(f"moe-lpr router, seed {seed}, layer {layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    weight = torch.empty(num_experts, hidden_size, dtype=torch.float32)
    return torch.nn.init.xavier_normal_(weight, generator=generator)


def read_finite(sources: TensorSources, name: str) -> torch.Tensor:
    """Read a tensor by its Hugging Face name. Raises UserError where it holds NaN or infinite values."""
    tensor = sources.files.read(name)
    if not is_finite(tensor):
        raise UserError(
            f"{sources.files.file(name)}: {name} holds NaN or infinite values; copy the file again, "
            "or use a model without them"
        )
    return tensor


def _check_complete(sources: TensorSources, writer: CheckpointWriter) -> None:
    """The checkpoint has exactly the model's tensors: none is missing, none is left over."""
    different = {row.key for row in sources.rows} ^ set(writer.tensors)
    if different:
        raise UserError(f"{writer.directory}: not written as planned: {', '.join(sorted(different)[:3])}")
