"""The router over the original expert and the new ones."""

from collections.abc import Callable

import torch
from megatron.core.transformer.moe.router import TopKRouter


class LPRRouter(TopKRouter):
    """Megatron's top-k router whose weights stay in fp32 whatever dtype the model is cast to.

    softmax over all experts, top-k and renormalisation over the k is Megatron's top-k-then-softmax
    (`moe_router_pre_softmax=False`) for k of 2 or more.
    """

    def reset_parameters(self) -> None:
        """Leave the fp32 weights as they are: they come from the checkpoint."""
        self.weight.sequence_parallel = self.config.sequence_parallel

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "LPRRouter":
        super()._apply(fn, recurse)
        self.weight.data = self.weight.data.float()
        return self
