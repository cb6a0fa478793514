"""Context parallelism: which tokens of a sequence each CP rank computes, and the whole sequence from the ranks' parts.

A sequence is cut into 2 x CP chunks, and rank r gets the chunks r and 2 x CP - 1 - r (megatron/core/utils.py
`get_batch_on_this_cp_rank`): under a causal mask the later a chunk, the more keys it sees, and each pair sees as many.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


def own_chunks(group: dist.ProcessGroup) -> tuple[int, int]:
    """Numbers of the two chunks of every sequence that this rank of a CP group computes, in their order."""
    return group.rank(), 2 * group.size() - 1 - group.rank()


def own_spans(length: int, group: dist.ProcessGroup, samples: int = 1) -> list[tuple[int, int]]:
    """Begin and end of each chunk that this rank of a CP group computes, in the order of `own_tokens`.

    Args:
        length: tokens of a sequence.
        samples: sequences, counted through as if the tokens of one followed those of the other.
    """
    size = length // (2 * group.size())
    begins = [sample * length + number * size for sample in range(samples) for number in own_chunks(group)]
    return [(begin, begin + size) for begin in begins]


def own_tokens(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This CP rank's tokens of a tensor that has all of them along `dim`: 1 / CP of its size there."""
    if group.size() == 1:
        return tensor
    chunks = tensor.chunk(2 * group.size(), dim)
    return torch.cat([chunks[number] for number in own_chunks(group)], dim)


def all_tokens(tensor: torch.Tensor, group: dist.ProcessGroup, samples: int = 1) -> torch.Tensor:
    """The tokens of all CP ranks in the order of the sequence; backward adds up what the ranks' gradients are.

    Args:
        tensor: [samples x tokens of a rank, ...], the tokens of one sample after those of the other.

    Returns:
        [samples x CP x tokens of a rank, ...].
    """
    gathered = gather_from_sequence_parallel_region(tensor, tensor_parallel_output_grad=True, group=group)
    # By rank, sample and which of the rank's two chunks, to sample and number of the chunk.
    parts = gathered.unflatten(0, (group.size(), samples, 2, -1))
    order = torch.cat((parts[:, :, 0], parts[:, :, 1].flip(0)))
    return order.transpose(0, 1).flatten(0, 2)
