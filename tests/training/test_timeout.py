"""--distributed-timeout-minutes: what no run can keep is refused before anything is built."""

import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.parallel.layout import check_timeout
from megatron_moe_lpr.training.config import TrainingConfig
from tests.evaluation.tools import load_tool
from tests.training.runs import training_config


@pytest.mark.parametrize("minutes", [0, -1, 10**12])
def test_impossible_times_are_refused(minutes, tmp_path):
    given = training_config(tmp_path, tmp_path, {"el": "el", "hu": "hu"})
    with pytest.raises(UserError, match=f"--distributed-timeout-minutes {minutes}: from 1 to"):
        TrainingConfig(**vars(given) | {"distributed_timeout_minutes": minutes})
    command = ["--load", "x", "--valid-data-path", "y", "--distributed-timeout-minutes", str(minutes)]
    evaluate = load_tool("evaluate")
    with pytest.raises(evaluate.UserError, match=f"--distributed-timeout-minutes {minutes}: from 1 to"):
        evaluate.main(command)


def test_a_generous_time_is_taken():
    check_timeout(7 * 24 * 60)
