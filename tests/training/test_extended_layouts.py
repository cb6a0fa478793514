"""An extended vocabulary in every parallel layout: the same step as in one process, and frozen rows to the bit."""

import functools

import pytest
import torch

from megatron_moe_lpr.model.configuration.parameter_kinds import kind_of
from megatron_moe_lpr.training.configuration.stages import STAGES
from tests.conversion.helpers import checkpoint_tensors
from tests.distributed import rank_pool
from tests.training.new_rows import extend_checkpoint
from tests.training.one_step import StepCase, run_step
from tests.training.runs import make_checkpoint, make_data, metrics, train
from tests.training.test_layouts import DISTRIBUTED, EP2, FULL, OVERLAPPED, PP2, TP2, VPP, differences

TOLERANCE = 1e-4
NEW_TOKENS = (13, 21)
"""Neither a multiple of what they are padded to; the first extension's rows are frozen."""
MODELS = {"tied": "qwen2-tied", "untied": "llama"}

CASES = {
    "TP2+SP": (2, StepCase(TP2)),
    "TP2+SP, recompute full, distributed optimizer": (2, StepCase(TP2, recompute=FULL, optimizer=DISTRIBUTED)),
    "PP2": (2, StepCase(PP2)),
    "PP2 interleaved, distributed optimizer": (2, StepCase(VPP, optimizer=DISTRIBUTED)),
    "EP2": (2, StepCase(EP2)),
    "DP2, overlapped reduction": (2, StepCase(optimizer=OVERLAPPED)),
    "TP2xEP2": (2, StepCase(TP2 | EP2)),
    "TP2xPP2": (4, StepCase(TP2 | PP2)),
    "EP2xPP2, recompute full, distributed optimizer": (4, StepCase(EP2 | PP2, recompute=FULL, optimizer=DISTRIBUTED)),
    "stage 2 with new rows, TP2xPP2": (4, StepCase(TP2 | PP2, stage="2", train_new_rows=True)),
    "stage 2, TP2": (2, StepCase(TP2, stage="2")),
    "full training, TP2xPP2": (4, StepCase(TP2 | PP2, stage="full")),
}
