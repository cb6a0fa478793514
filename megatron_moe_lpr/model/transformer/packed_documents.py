"""The documents of a micro-batch, in the form that each kind of attention takes."""

import dataclasses

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_moe_lpr.megatron.overriding import overrides_megatron


@overrides_megatron
@dataclasses.dataclass
class DocumentLengths(PackedSeqParams):
    """Documents for `LocalAttention`: lengths on the host, in the format of samples (sbhd), so that Megatron takes the
    rotary angles that it is given for each token."""

    lengths: tuple[int, ...] = ()
    """Tokens of each document, in the order in which they lie in the micro-batch."""

    @property
    def samples(self) -> int:
        """Sequences of the micro-batch."""
        return sum(self.lengths) // self.max_seqlen_q


def packed_documents(cu_seqlens: torch.Tensor, sequence_length: int, transformer_engine: bool) -> PackedSeqParams:
    """Return what attention needs to keep the documents of a flattened micro-batch, [1, batch x sequence], apart.

    Transformer Engine gets its packed form (thd): in any other, its causal attention ignores a mask without a word.

    Args:
        cu_seqlens: int32 [documents + 1], where each document begins in the flattened micro-batch, then its tokens.
        sequence_length: tokens of a sample, which no document exceeds. The longest document itself would make the host
            wait for a GPU.
        transformer_engine: the layers are Transformer Engine's. For the local ones the lengths are copied to the host.
    """
    if transformer_engine:
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=sequence_length,
            max_seqlen_kv=sequence_length,
        )
    lengths = tuple(cu_seqlens.diff().tolist())
    return DocumentLengths("sbhd", max_seqlen_q=sequence_length, max_seqlen_kv=sequence_length, lengths=lengths)
