"""What config.json and the card say of a model's sizes, against its tensors, before memory is taken for a model."""

from collections.abc import Iterator

from megatron_moe_lpr.checkpoint.format.directory import CheckpointDirectory
from megatron_moe_lpr.checkpoint.format.trainable_only import open_reader
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.config import ModelShape

EMBEDDING = "embedding.word_embeddings.weight"


def check_sizes(directory: CheckpointDirectory, shape: ModelShape) -> None:
    """Compare one matrix for each size of the model, in every layer. Reads the index alone.

    Raises:
        UserError: naming the tensor, its shape, and the shape it should have.
    """
    stored = open_reader(directory).tensors
    for key, expected in _matrices(shape):
        if key not in stored:
            raise UserError(
                f"{directory.path}: lacks the tensor {key} of a model as its config.json and card say it is"
            )
        found = tuple(stored[key].shape)
        # The vocabulary may be padded, for tensor parallelism.
        fits = found[1:] == expected[1:] and found[0] >= expected[0] if key == EMBEDDING else found == expected
        if not fits:
            raise UserError(
                f"{directory.path}: {key} is {list(found)}, and by its config.json and card it would be "
                f"{list(expected)}; these files belong to another model"
            )


def _matrices(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    architecture = shape.architecture
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    query = architecture.num_attention_heads * architecture.head_dim
    qkv = query + 2 * architecture.num_query_groups * architecture.head_dim
    yield EMBEDDING, (architecture.vocab_size, hidden)
    for layer, experts in enumerate(shape.experts_per_layer):
        place = f"decoder.layers.{layer}"
        yield f"{place}.self_attention.linear_qkv.weight", (qkv, hidden)
        yield f"{place}.self_attention.linear_proj.weight", (hidden, query)
        if experts > 1:
            yield f"{place}.mlp.router.weight", (experts, hidden)
        original = "mlp.original_expert" if experts > 1 else "mlp"
        yield f"{place}.{original}.linear_fc2.weight", (hidden, ffn)
