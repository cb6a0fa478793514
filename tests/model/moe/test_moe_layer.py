"""`--original-expert-overlap` changes the order of launches and no bit of what is computed."""

import pytest
import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.experts import TEGroupedMLP

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.config import check_options
from megatron_moe_lpr.model.moe.moe_layer import MoELPRLayer
from megatron_moe_lpr.parallel.layout import ParallelLayout
from tests.distributed import rank_pool
from tests.model.sizes import small_shape
from tests.training.one_step import StepCase, StepResult, run_step
from tests.training.runs import make_checkpoint

EP2 = {"expert_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "moe", "layernorm")}
CASES = {
    "EP1": {"layout": {}},
    "EP2": {"layout": EP2},
    "EP2, stage 2": {"layout": EP2, "stage": "2"},
    "EP2, full training": {"layout": EP2, "stage": "full"},
    "EP2, recompute selective": {"layout": EP2, "recompute": SELECTIVE},
    "EP2, all-gather dispatcher": {"layout": EP2, "dispatcher": "allgather"},
    "TP2+SP, EP2, distributed optimizer": {"layout": TP2 | EP2, "optimizer": {"use_distributed_optimizer": True}},
    "TP2+SP, EP2, recompute full, full training": {"layout": TP2 | EP2, "recompute": FULL, "stage": "full"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("moe-layer"))


def both(path, case: dict) -> tuple[StepResult, StepResult]:
    return run_step(path, StepCase(**case)), run_step(path, StepCase(**case, overlap=True))


@pytest.mark.parametrize("name", CASES)
def test_beside_or_behind_gives_the_same_bits(name, checkpoint):
    behind, beside = rank_pool(2).run(both, checkpoint, CASES[name])[0]
    for field in ("loss", "lpr", "load_balancing", "grad_norm"):
        assert getattr(beside, field) == getattr(behind, field)
    assert beside.gradients.keys() == behind.gradients.keys()
    for key, gradient in behind.gradients.items():
        assert torch.equal(beside.gradients[key], gradient), key
        assert gradient.abs().max() > 0


def launches(path, case: dict, overlap: bool) -> str:
    """On every rank: the first five launches, a letter each: S all-to-all (tokens, weights, and last the results), O
    original expert, N new experts."""
    seen: list[str] = []
    send, original, new = token_dispatcher.all_to_all, MoELPRLayer._original_expert_output, TEGroupedMLP.forward

    def noting(letter, function):
        def noted(*arguments, **named):
            seen.append(letter)
            return function(*arguments, **named)

        return noted

    token_dispatcher.all_to_all = noting("S", send)
    MoELPRLayer._original_expert_output = noting("O", original)
    TEGroupedMLP.forward = noting("N", new)
    try:
        run_step(path, StepCase(**case, overlap=overlap))
    finally:
        token_dispatcher.all_to_all = send
        MoELPRLayer._original_expert_output, TEGroupedMLP.forward = original, new
    return "".join(seen[:5])


@pytest.mark.parametrize(
    ("layout", "overlap", "order"),
    [(EP2, False, "SSNSO"), (EP2, True, "SSONS"), (TP2 | EP2, True, "SSONS"), ({}, True, "NONON")],
)
def test_the_original_expert_is_launched_behind_the_sending(layout, overlap, order, checkpoint):
    """Of tokens and their weights; without expert parallelism nothing travels, and the flag changes nothing."""
    for found in rank_pool(2).run(launches, checkpoint, {"layout": layout}, overlap):
        assert found == order


def test_a_dense_checkpoint_has_nothing_to_overlap():
    options = ComputeOptions(original_expert_overlap=True)
    check_options(small_shape(experts=5), ParallelLayout(), options)
    with pytest.raises(UserError, match="--original-expert-overlap: the checkpoint is dense"):
        check_options(small_shape(experts=1), ParallelLayout(), options)
