"""Work on the side stream waits for its inputs, and the current stream waits for it."""

import contextlib
from collections import Counter
from unittest.mock import patch

import pytest
import torch

from megatron_moe_lpr.checkpoint.loading.model import load_model
from megatron_moe_lpr.engine.micro_batches import run_schedule
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from megatron_moe_lpr.platform.side_stream import SideStream
from tests.distributed import rank_pool
from tests.model.streams import watched
from tests.training.one_step import LANGUAGE_GROUP, micro_batches
from tests.training.runs import make_checkpoint

EP2 = {"expert_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
CASES = {
    "EP2": (EP2, "alltoall", True),
    "EP2, no gradients, as in the first pass of recompute": (EP2, "alltoall", False),
    "EP2, all-gather dispatcher": (EP2, "allgather", True),
    "TP2+SP, EP2": (TP2 | EP2, "alltoall", True),
}
FAULTS = {
    "not forked": (
        "fork",
        lambda self: None,
        "uses what another stream may not have written",
    ),
    "not waited for": ("join", lambda self, results: results, "uses what another stream may not have written"),
    "not recorded": (
        "join",
        lambda self, results: torch.cuda.current_stream().wait_stream(self.stream()) or results,
        "memory is given away that another stream may still use",
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("side-stream"))


def find_faults(path, name: str, *replaced) -> tuple[list[str], dict[str, int]]:
    """On every rank of a pool: races of a forward pass, and counts of operations on the side stream."""
    (sizes, dispatcher, gradients), platform = CASES[name], select_platform("cpu")
    layout = ParallelLayout(**sizes)
    initialize_parallel(platform, layout)
    options = ComputeOptions(moe_token_dispatcher_type=dispatcher, original_expert_overlap=True)
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(watched())
        stack.enter_context(torch.set_grad_enabled(gradients))
        if replaced:
            stack.enter_context(patch.object(SideStream, *replaced))
        model = load_model(path, layout, platform, options, lpr_loss_coeff=0.5, calculate_per_token_loss=True)
        for chunk in model.chunks:
            chunk.train()
        run_schedule(model.chunks, model.config, micro_batches(2), LANGUAGE_GROUP, forward_only=True)
    return watch.faults, dict(watch.beside)


def planted(path, name: str):
    return find_faults(path, "EP2", *FAULTS[name][:2])


@pytest.mark.parametrize("name", CASES)
def test_streams_wait_for_each_other(name, checkpoint):
    for faults, beside in rank_pool(2).run(find_faults, checkpoint, name):
        assert not Counter(faults)
        assert beside["aten::mm"]


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_left_out_is_found(name, checkpoint):
    for faults, _ in rank_pool(2).run(planted, checkpoint, name):
        assert any(FAULTS[name][2] in fault for fault in faults)
