"""Query, key and value projections: three tensors in Hugging Face's form, one in Megatron's."""

import torch

from megatron_moe_lpr.model.configuration.architecture import Architecture


def interleave_qkv(parts: list[torch.Tensor], architecture: Architecture) -> torch.Tensor:
    """Join query, key and value as Megatron lays them out: for each query group its queries, then its key and value.

    Args:
        parts: query [heads * head_dim, ...], then key and value, each [groups * head_dim, ...].

    Returns:
        [(heads + 2 * groups) * head_dim, ...], the same dtype.
    """
    groups = architecture.num_query_groups
    grouped = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, *parts[0].shape[1:])


def split_qkv(weight: torch.Tensor, architecture: Architecture) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of `interleave_qkv`: views of query, key and value, each [groups, rows of one group, ...]."""
    groups, head_dim = architecture.num_query_groups, architecture.head_dim
    queries = architecture.num_attention_heads // groups * head_dim
    grouped = weight.reshape(groups, queries + 2 * head_dim, *weight.shape[1:])
    return grouped.split([queries, head_dim, head_dim], dim=1)
