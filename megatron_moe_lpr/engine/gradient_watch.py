"""Check that every trainable parameter gets a gradient."""

from collections.abc import Callable, Sequence

import torch

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.build import unwrap
from megatron_moe_lpr.parallel.every_rank import first_on_any_rank

NAMES_SHOWN = 5


class GradientWatch:
    """Records which trainable parameters get a gradient during one backward pass.

    Full activation recompute without an input that requires a gradient, or a grouped layer whose first weight is
    frozen, leaves parameters without a gradient and reports nothing. An expert that no token chose still gets zeros.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self.waiting: dict[str, torch.nn.Parameter] = {}
        self.hooks = []
        for index, chunk in enumerate(chunks):
            for name, parameter in unwrap(chunk).named_parameters():
                if parameter.requires_grad:
                    full_name = f"chunk {index}: {name}" if len(chunks) > 1 else name
                    self.waiting[full_name] = parameter
                    self.hooks.append(parameter.register_hook(self._hook(full_name)))

    def _hook(self, name: str) -> Callable[[torch.Tensor | None], None]:
        def record(gradient: torch.Tensor | None) -> None:
            # torch calls hooks with None too, where an autograd function returned no gradient for this input.
            if gradient is not None:
                self.waiting.pop(name, None)

        return record

    def check(self) -> None:
        """Remove the hooks and check that no parameter was left out. Every rank must call it.

        Raises:
            UserError: on all ranks, with names of parameters that got no gradient on some rank.
        """
        for hook in self.hooks:
            hook.remove()
        shown = ", ".join(sorted(self.waiting)[:NAMES_SHOWN])
        if first := first_on_any_rank((len(self.waiting), shown) if self.waiting else None):
            rank, (count, names) = first
            raise UserError(
                f"rank {rank}: {count} trainable parameters got no gradient in the first step, "
                f"for example {names}; nothing was saved"
            )
