"""Routing at its extremes: experts that no token chooses, and steps in which the original one is idle."""

import dataclasses

import pytest
import torch

from tests.conversion.helpers import rewrite_checkpoint
from tests.distributed import rank_pool
from tests.training.one_step import StepCase, run_step
from tests.training.runs import make_checkpoint
from tests.training.test_layouts import EP2, PP2, TOLERANCE, TP2, differences

LAYOUTS = {"TP2xEP2": (2, TP2 | EP2), "EP2": (2, EP2), "PP2": (2, PP2), "DP2": (2, {}), "EP2xPP2": (4, EP2 | PP2)}


def all_to_the_same_two(router: torch.Tensor) -> torch.Tensor:
    """Equal logits: every token takes the same two experts, and the other three none."""
    return torch.zeros_like(router)


def never_the_original(router: torch.Tensor) -> torch.Tensor:
    """Experts 1 and 3 on one side of a plane, 2 and 4 on the other."""
    direction = torch.randn(router.shape[1], generator=torch.Generator().manual_seed(0))
    return torch.stack([factor * direction for factor in (0.0, 1.0, -1.0, 0.5, -0.5)])


@pytest.fixture(scope="module", params=[all_to_the_same_two, never_the_original])
def routed(request, tmp_path_factory):
    """Checkpoint, expected share of expert 0, and one process's step."""

    def change(tensors):
        for key in tensors:
            if key.endswith("router.weight"):
                tensors[key] = request.param(tensors[key])

    path = make_checkpoint(tmp_path_factory.mktemp(request.param.__name__))
    rewrite_checkpoint(path, change)
    case = StepCase(stage="full", load_balancing_coeff=0.0, lpr_loss_coeff=0.0)
    return request.param, path, case, rank_pool(1).run(run_step, path, case)[0]


def test_the_idle_ones_are_idle(routed):
    """Equal logits send every token to the same two experts; the other router leaves out the original one alone."""
    change, _, _, reference = routed
    names = ["original_expert.", *(f"experts.experts.{index}." for index in range(4))]
    busy = {name for name in names if any(f"layers.0.mlp.{name}" in key for key in reference.gradients)}
    if change is all_to_the_same_two:
        assert len(busy) == 2
    else:
        assert busy == set(names[1:])


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains(name, routed):
    """Forward, backward and reduction go through, each trainable parameter gets a gradient (zeros, where idle), and
    what comes out is what one process computes."""
    _, path, case, reference = routed
    world, layout = LAYOUTS[name]
    for result in rank_pool(world).run(run_step, path, dataclasses.replace(case, layout=layout)):
        assert max(differences(result, reference).values()) < TOLERANCE
