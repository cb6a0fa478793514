"""The planner's activations and logits of layers of PyTorch alone against what a step really holds.

On a GPU the allocator is asked (never run). `-s` prints the table, MEMORY=all measures more cases.
"""

import os

import pytest

from tests.gpu.figures import Figures
from tests.gpu.memory import Case
from tests.gpu.test_memory import CP, EP, PP, TP, check

QUICK = [
    Case(),
    Case(number="fp32", stage="full"),
    Case(recompute="moe"),
    Case("many heads", recompute="core_attn"),
    Case("sliding window", stage="2"),
    Case("some dense", stage="full", layout=TP),
    Case(layout=EP),
    Case("some dense", stage="full", layout=CP),
]
MORE = [
    Case(stage="2"),
    Case("many heads", stage="full"),
    Case("wide FFN", recompute="moe_act"),
    Case("some dense"),
    Case("some dense", recompute="full"),
    Case("large vocabulary", stage="full"),
    Case("inserted blocks", stage="blocks"),
    Case("many heads", layout=PP),
    Case("many heads", stage="full", layout=CP),
    Case("sliding window", layout=CP),
    Case("some dense", recompute="full", layout=(*CP, *TP)),
]
CASES = QUICK + MORE if os.environ.get("MEMORY") == "all" else QUICK


@pytest.fixture(scope="module")
def figures():
    rows = Figures("kB planned / measured", "rank", "kept", "logits", "peak", "weights", "placeholders")
    yield rows
    rows.print()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_planned_and_measured(case, figures):
    assert not check(case, figures, platform="local")
