"""Rearranging weights: query-key-value interleaving, and the routers' initial values."""

import hashlib

import torch

from megatron_moe_lpr.model.configuration.architecture import Architecture


def interleave_qkv(parts: list[torch.Tensor], architecture: Architecture) -> torch.Tensor:
    """Query, key and value projections as Megatron lays them out: per query group its queries, then key, then value.

    Args:
        parts: [heads * head_dim, ...], [groups * head_dim, ...] twice.

    Returns:
        [(heads + 2 * groups) * head_dim, ...], the same dtype.
    """
    groups = architecture.num_query_groups
    grouped = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, *parts[0].shape[1:])


def split_qkv(weight: torch.Tensor, architecture: Architecture) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of `interleave_qkv`: views of query, key and value, [groups, rows of one group, ...]."""
    groups, head_dim = architecture.num_query_groups, architecture.head_dim
    queries = architecture.num_attention_heads // groups * head_dim
    grouped = weight.reshape(groups, queries + 2 * head_dim, *weight.shape[1:])
    return grouped.split([queries, head_dim, head_dim], dim=1)


def initial_router(num_experts: int, hidden_size: int, seed: int, layer: int) -> torch.Tensor:
    """A router's initial weight, Xavier-normal, [experts, hidden] float32.

    It depends on the seed and the layer alone, so it is the same whatever the parallel layout or the other layers are.
    """
    digest = hashlib.sha256(f"moe-lpr router, seed {seed}, layer {layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    weight = torch.empty(num_experts, hidden_size, dtype=torch.float32)
    return torch.nn.init.xavier_normal_(weight, generator=generator)
