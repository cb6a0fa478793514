"""--distributed-timeout-minutes: what no run can keep is refused before anything is built."""

import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.parallel.layout import LONGEST_TIMEOUT_MINUTES, check_timeout
from megatron_moe_lpr.training.configuration.config import TrainingConfig
from tests.evaluation.tools import load_tool
from tests.training.runs import training_config


@pytest.mark.parametrize("minutes", [0, -1, 10**12])
def test_impossible_times_are_refused(minutes, tmp_path, capsys):
    given = training_config(tmp_path, tmp_path, {"el": "el", "hu": "hu"})
    with pytest.raises(UserError, match=f"--distributed-timeout-minutes {minutes}: must be at least 1"):
        TrainingConfig(**vars(given) | {"distributed_timeout_minutes": minutes})
    command = ["--load", "x", "--valid-data-path", "y", "--distributed-timeout-minutes", str(minutes)]
    with pytest.raises(SystemExit) as stop:
        load_tool("evaluate").main(command)
    assert stop.value.code == 2 and f"--distributed-timeout-minutes {minutes}: must be" in capsys.readouterr().err


@pytest.mark.parametrize("minutes", [10**6, LONGEST_TIMEOUT_MINUTES + 1])
def test_more_than_a_week_is_refused(minutes):
    with pytest.raises(UserError, match=f"--distributed-timeout-minutes {minutes}: from 1 to"):
        check_timeout(minutes)


def test_a_generous_time_is_taken():
    check_timeout(7 * 24 * 60)
