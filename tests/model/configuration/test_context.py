"""What context parallelism is refused with, and how keys and values travel on each platform."""

import pytest
import torch

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.config import transformer_config
from megatron_moe_lpr.model.configuration.context import check_context_parallel, check_documents_apart, context_fields
from megatron_moe_lpr.parallel.layout import ParallelLayout
from tests.model.configuration.test_kernels import CPU, gpu
from tests.model.sizes import small_shape

CP2 = ParallelLayout(context_parallel_size=2)


@pytest.mark.parametrize(
    ("layout", "platform", "window", "fields"),
    [
        (CP2, gpu(), None, {"context_parallel_size": 2, "cp_comm_type": "p2p"}),
        (CP2, gpu(), 8, {"context_parallel_size": 2, "cp_comm_type": "all_gather"}),
        (CP2, CPU, 8, {"context_parallel_size": 2}),
        (ParallelLayout(), gpu(), 8, {"context_parallel_size": 1}),
    ],
)
def test_how_keys_and_values_travel(layout, platform, window, fields):
    changes = {"model_type": "mistral", "sliding_window": window} if window else {}
    assert context_fields(layout, small_shape(**changes).architecture, platform) == fields


def test_transformer_engine_in_fp32_is_refused():
    words = r"--context-parallel-size 2: .* compute in bf16 \(--bf16\), .*--transformer-impl local"
    with pytest.raises(UserError, match=words):
        transformer_config(small_shape(), CP2, gpu(), ComputeOptions())
    for layout, platform, dtype in (
        (CP2, gpu(), torch.bfloat16),
        (CP2, CPU, torch.float32),
        (ParallelLayout(), gpu(), torch.float32),
    ):
        check_context_parallel(layout, platform, dtype)


def test_documents_apart_need_local_layers():
    words = r"--context-parallel-size 2: .*\(--reset-attention-mask, .* multiple of 4; .*--transformer-impl local"
    with pytest.raises(UserError, match=words):
        check_documents_apart(CP2, gpu(), apart=True)
    for layout, platform, apart in ((CP2, gpu(), False), (CP2, CPU, True), (ParallelLayout(), gpu(), True)):
        check_documents_apart(layout, platform, apart)
