"""Reading a model's tensors out of a checkpoint, in Hugging Face's form."""

import torch

from megatron_moe_lpr.checkpoint.format.chain import TensorReader
from megatron_moe_lpr.checkpoint.format.reader import is_model_key
from megatron_moe_lpr.conversion.hugging_face.hf_directory import TRAINING_DTYPES
from megatron_moe_lpr.conversion.tensors.qkv import split_qkv
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.finite import is_finite
from megatron_moe_lpr.model.tensors import Row, is_vocabulary_key


def check_model_tensors(rows: list[Row], reader: TensorReader) -> None:
    """Check that the checkpoint holds the model's tensors in their shapes and no other model tensor.

    Optimizer state and other tensors that training saves are ignored.

    Raises:
        UserError: naming the tensors that are missing, unexpected or of the wrong shape or dtype.
    """
    expected = {row.key: row.shape for row in rows}
    present = {key for key in reader.tensors if is_model_key(key)}
    for keys, problem in ((expected.keys() - present, "lacks"), (present - expected.keys(), "has no place for")):
        if keys:
            names = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise UserError(f"{reader.directory}: the checkpoint {problem} {names}")
    for key, shape in expected.items():
        found = reader.tensors[key].shape
        if reader.tensors[key].dtype not in TRAINING_DTYPES:
            raise UserError(f"{reader.directory}: {key} has dtype {reader.tensors[key].dtype}, which no model here has")
        padded = is_vocabulary_key(key) and found[0] >= shape[0] and found[1:] == shape[1:]
        if found != shape and not padded:
            raise UserError(f"{reader.directory}: {key} has shape {list(found)}, the model wants {list(shape)}")


def read_row(row: Row, reader: TensorReader, architecture: Architecture) -> list[torch.Tensor]:
    """Read the Hugging Face tensors of one row: query, key and value apart, without the rows that pad a vocabulary.

    Returns:
        A tensor for each of `row.names`, in the dtype of the checkpoint, routers in float32.

    Raises:
        UserError: NaN or infinite values.
    """
    tensor = reader.read(row.key)
    if not is_finite(tensor):
        raise UserError(
            f"{reader.directory}: {row.key} holds NaN or infinite values; use a checkpoint from before they appeared"
        )
    parts = split_qkv(tensor, architecture) if len(row.shapes) > 1 else (tensor[: row.shapes[0][0]],)
    shaped = [part.reshape(shape) for part, shape in zip(parts, row.shapes, strict=True)]
    return [part.float() for part in shaped] if row.kind.is_router else shaped
