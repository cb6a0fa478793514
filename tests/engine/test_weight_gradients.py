"""Which layers may add their weight gradients to the buffer themselves: those whose matrices all train."""

import pytest
import torch

from megatron_moe_lpr.engine.weight_gradients import SWITCH, fuse_weight_gradients, may_fuse
from megatron_moe_lpr.model.configuration.config import MoELPRConfig


class Grouped(torch.nn.Module):
    """With Transformer Engine's switch, several matrices and the norm that some of its layers begin with."""

    def __init__(self, frozen: tuple[str, ...]) -> None:
        super().__init__()
        self.fuse_wgrad_accumulation = True
        self.weight0, self.weight1 = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(3))
        for name in frozen:
            getattr(self, name).requires_grad_(False)


@pytest.mark.parametrize(
    ("frozen", "enabled", "adds"),
    [
        ((), True, True),
        (("layer_norm_weight",), True, True),
        (("weight0",), True, False),
        (("weight1",), True, False),
        (("weight0", "weight1"), True, False),
        ((), False, False),
    ],
)
def test_a_layer_adds_only_if_all_its_matrices_train(frozen, enabled, adds):
    chunk = torch.nn.ModuleDict({"grouped": Grouped(frozen), "other": torch.nn.Linear(2, 2)})
    assert fuse_weight_gradients([chunk], enabled) == adds
    assert getattr(chunk["grouped"], SWITCH) is adds
    assert not hasattr(chunk["other"], SWITCH)


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("offloads", [True, False])
def test_offloaded_activations_exclude_it(asked, offloads):
    config = MoELPRConfig(num_layers=1, hidden_size=16, num_attention_heads=1, fuse_wgrad_accumulation=asked)
    config.fine_grained_activation_offloading = offloads
    assert may_fuse(config) == (asked and not offloads)
