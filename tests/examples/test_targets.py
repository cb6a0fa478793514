"""The demo's targets from evaluations."""

import sys
from pathlib import Path

import pytest

from megatron_moe_lpr.evaluation.report.inputs import NamedEvaluation
from megatron_moe_lpr.evaluation.report.record import EvaluationRecord

sys.path.append(str(Path(__file__).parents[2] / "examples" / "demo"))
from targets import targets


def evaluation(original: float, expanded: float, share: float | None = None) -> NamedEvaluation:
    averages = {
        "original": {"bits_per_byte": original, "expert0_top_k_share": share},
        "expanded": {"bits_per_byte": expanded},
    }
    record = {"sequence_length": 1, "top_k": 2, "experts_per_layer": [3], "averages": averages, "datasets": []}
    return NamedEvaluation("", (EvaluationRecord.model_validate(record),))


@pytest.mark.parametrize(
    ("stage2", "dense_full", "reached"),
    [
        ((2.019, 1.49, 0.96), 2.2, (True, True, True, True, True)),
        ((2.03, 1.51, 0.94), 2.1, (False, False, False, False, False)),
        ((1.99, 1.48, 0.95), 2.0, (True, True, True, True, True)),
    ],
)
def test_each_target(stage2, dense_full, reached) -> None:
    """Base 2.0 and 2.0, stage 1 1.48 on expanded languages: the limits are 1.5 (25%), 2.02 (1%) and 1.4948 (1%)."""
    found = targets(evaluation(2.0, 2.0), evaluation(2.9, 1.48), evaluation(*stage2), evaluation(dense_full, 1.4))
    assert tuple(is_reached for _, _, is_reached in found) == reached
