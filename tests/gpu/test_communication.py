"""Bytes planned against those that a step sends on the CUDA platform's layers: equal, for every kind and every rank."""

import pytest

from tests.gpu import device
from tests.gpu.ranks import run
from tests.gpu.test_numerics import RECIPES
from tests.planning.counted_step import Case, sent_and_planned
from tests.planning.test_communication import CP2, EP2, EXPERT_TP2, INSERTED, INTERLEAVED, PP2, TIED, TP2

WINDOW = {"model_type": "mistral", "sliding_window": 8}

CASES = {
    "DP2": Case(bf16=True),
    "TP2+SP": Case(TP2, bf16=True),
    "TP2+SP, fp32": Case(TP2),
    "TP2+SP, expert TP2": Case(TP2 | EXPERT_TP2, bf16=True),
    "EP2": Case(EP2, bf16=True),
    "CP2": Case(CP2, bf16=True),
    "full, CP2xTP2, sliding window": Case(CP2 | TP2, stage="full", ranks=4, bf16=True, model=WINDOW),
    "PP2": Case(PP2, bf16=True),
    "PP2 interleaved": Case(INTERLEAVED, experts=(5,) * 4, bf16=True),
    "TP2xEP2, a dense layer first": Case(TP2 | EP2, experts=(1, 5, 5), bf16=True),
    "TP2xEP2, recompute full": Case(TP2 | EP2, bf16=True, recompute="full"),
    "TP2xEP2, recompute moe": Case(TP2 | EP2, bf16=True, recompute="moe"),
    "stage 2, DP2": Case(stage="2", bf16=True),
    "stage 2, TP2xEP2": Case(TP2 | EP2, stage="2", bf16=True),
    "stage 2, PP2": Case(PP2, stage="2", bf16=True),
    "full, TP2xEP2": Case(TP2 | EP2, stage="full", bf16=True),
    "full, PP2, tied": Case(PP2, stage="full", model=TIED, bf16=True),
    "inserted blocks, TP2+SP": Case(TP2, **INSERTED, bf16=True),
    "TP2xEP2xDP2": Case(TP2 | EP2, ranks=4, bf16=True),
    "EP2xPP2": Case(EP2 | PP2, ranks=4, bf16=True),
}
SIZES = {"hidden_size": 128, "intermediate_size": 512}
# Sequences of which the original expert's tokens need no padding.
FP8_CASES = {
    "delayed, TP2+SP": Case(TP2, bf16=True, fp8=RECIPES["delayed"], model=SIZES, sequence=256),
    "tensorwise, TP2xEP2": Case(TP2 | EP2, bf16=True, fp8=RECIPES["tensorwise"], model=SIZES, sequence=256),
    "tensorwise, full, TP2+SP": Case(
        TP2, stage="full", bf16=True, fp8=RECIPES["tensorwise"], model=SIZES, sequence=256
    ),
    "blockwise, TP2+SP": Case(TP2, bf16=True, fp8=RECIPES["blockwise"], model=SIZES, sequence=1024),
    "blockwise, full, TP2+SP": Case(TP2, stage="full", bf16=True, fp8=RECIPES["blockwise"], model=SIZES, sequence=1024),
}


@pytest.mark.parametrize("name", CASES)
def test_ranks_send_what_is_planned(name):
    case = CASES[name]
    if device.count() < case.ranks:
        pytest.skip(f"needs {case.ranks} GPUs")
    for rank, (sent, planned) in enumerate(run(case.ranks, sent_and_planned, case, "cuda")):
        assert sent == pytest.approx(planned, rel=1e-12), f"rank {rank}"


@pytest.mark.parametrize("name", FP8_CASES)
def test_ranks_send_what_is_planned_in_fp8(name):
    """But for scalars, among which are the largest values that ranks agree on for scaling."""
    case = FP8_CASES[name]
    if device.count() < case.ranks:
        pytest.skip(f"needs {case.ranks} GPUs")
    for rank, (sent, planned) in enumerate(run(case.ranks, sent_and_planned, case, "cuda")):
        del sent["control"], planned["control"]
        assert sent == pytest.approx(planned, rel=1e-12), f"rank {rank}"


@pytest.mark.skipif(device.count() < 2, reason="needs 2 GPUs")
def test_weights_in_fp8_are_gathered_as_such():
    """Beside them the ranks agree on the largest value of each of a layer's two matrices of four experts, in fp32."""
    case = Case(bf16=True, fp8=RECIPES["tensorwise"] | {"fp8_param_gather": True}, model=SIZES)
    for rank, (sent, planned) in enumerate(run(2, sent_and_planned, case, "cuda")):
        assert sent["data"] == planned["data"]
        assert sent["expert_data"] == planned["expert_data"] + 2 * 2 * 4 * 4, f"rank {rank}"
