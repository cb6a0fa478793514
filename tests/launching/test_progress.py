"""examples/slurm/progress.sh: a job that gets nowhere stops after two runs."""

import subprocess

import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.training.run_directory.start_marker import refuse_lost_directory
from tests.launching.builders import ROOT


@pytest.fixture
def runs(tmp_path):
    """Start a job so often; each run ends at the iteration given (None: it dies without a word)."""

    def play(iterations: list[int | None]) -> list[str]:
        outcomes = []
        for restart, end in enumerate(iterations):
            latest = tmp_path / "latest_checkpointed_iteration.txt"
            script = f'source "{ROOT}/examples/slurm/progress.sh"; count_stalled_runs "{tmp_path}" {restart}\n'
            if end is not None:
                script += f'echo {end} >"{latest}"; stop_if_stalled "{tmp_path}"\n'
            environment = {"SLURM_JOB_ID": "7", "PATH": "/usr/bin:/bin"}
            result = subprocess.run(["bash", "-euc", script], env=environment, capture_output=True, text=True)
            outcomes.append("goes on" if result.returncode == 0 else result.stderr.strip())
        return outcomes

    return play


STOPPED = "error: two runs in a row made no progress beyond iteration {}; not requeued"


def test_progress_goes_on(runs):
    assert runs([10, 20, 20, 30, 30, 40]) == ["goes on"] * 6


def test_two_runs_without_progress_stop(runs):
    assert runs([10, 10, 10]) == ["goes on", "goes on", STOPPED.format(10)]


def test_runs_that_die_before_they_end_count_at_the_next_start(runs):
    assert runs([10, None, None, None]) == ["goes on", "goes on", "goes on", STOPPED.format(10)]


def test_a_job_that_is_stopped_before_its_run_began_may_begin_when_requeued(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="is its file system mounted"):
        refuse_lost_directory(tmp_path, tmp_path / "load")
    assert runs([None]) == ["goes on"]
    refuse_lost_directory(tmp_path, tmp_path / "load")
