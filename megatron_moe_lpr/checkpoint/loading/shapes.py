"""Checks tensor shapes in the index against config.json and card.json before allocating the model."""

from megatron_moe_lpr.checkpoint.format.chain import open_reader
from megatron_moe_lpr.checkpoint.format.directory import CheckpointDirectory
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.tensors import DENSE_LAYOUT, is_vocabulary_key, model_rows


def check_sizes(directory: CheckpointDirectory, shape: ModelShape) -> None:
    """Compare the shape of every tensor. Reads the index alone.

    Raises:
        UserError: naming the tensor, its shape, and the shape it should have.
    """
    stored = open_reader(directory).tensors
    for row in model_rows(
        shape.architecture, shape.experts_per_layer, DENSE_LAYOUT, shape.expansions, shape.new_tokens
    ):
        key, expected = row.key, row.shape
        if key not in stored:
            raise UserError(
                f"{directory.path}: lacks the tensor {key} of a model as its config.json and card say it is"
            )
        found = tuple(stored[key].shape)
        # The vocabulary may be padded, for tensor parallelism.
        fits = found[1:] == expected[1:] and found[0] >= expected[0] if is_vocabulary_key(key) else found == expected
        if not fits:
            raise UserError(
                f"{directory.path}: {key} is {list(found)}, and by its config.json and card it would be "
                f"{list(expected)}; these files belong to another model"
            )
