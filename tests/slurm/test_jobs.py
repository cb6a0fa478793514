"""The shipped batch files on a real two-node cluster, with CPU settings."""

import json
from pathlib import Path

from tests.launching.builders import run_script
from tests.slurm.cluster import ENDS, wait_until

SECONDS = 600
"""Time limit of each wait, for a shared machine; a quiet one needs a twentieth."""
ITERATIONS = 100
TRAIN = ("examples/slurm/train.sbatch", "examples/stage1_qwen.sh", "--eval-iters", "1", "--num-workers", "0")


def losses(save: Path) -> dict[int, float]:
    """Return the training loss of each step; the later one of a step that ran twice."""
    file = save / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {row["iteration"]: row["lm_loss"] for row in rows if row["kind"] == "train"}


def wait_for_step(cluster, job: str, save: Path, step: int) -> None:
    """Wait until a job's run has logged a step; fail at once if the job ends before."""

    def reached() -> bool:
        state = cluster.job(job)["JobState"]
        there = max(losses(save), default=0) >= step
        assert there or state not in ENDS, f"job {job}: {state} before step {step}"
        return there

    wait_until(reached, f"{save}: never came to step {step}", SECONDS)


def wait_for_restart(cluster, job: str, restarts: int) -> None:
    """Wait until a job has been requeued `restarts` times."""
    wait_until(lambda: int(cluster.job(job)["Restarts"]) >= restarts, lambda: f"{cluster.job(job)}", SECONDS)


def test_a_job_outlives_a_stop_signal_and_a_dead_node(cluster, submit, inputs, tmp_path):
    save, log = tmp_path / "run", tmp_path / "job.log"
    settings = {"SAVE": save, "TRAIN_ITERS": ITERATIONS, "SAVE_INTERVAL": 1000, "EP": 2}
    job = submit("sbatch", "--parsable", "--nodes=2", f"--output={log}", *TRAIN, **settings)

    wait_for_step(cluster, job, save, 3)
    # What `--signal` of train.sbatch makes SLURM do before the time limit, without waiting for its next look at limits.
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_restart(cluster, job, 1)
    assert "stopped by request" in log.read_text() and "ended with code 75" in log.read_text()
    stopped_at = max(losses(save))
    assert stopped_at < ITERATIONS and (save / "latest_checkpointed_iteration.txt").read_text() == str(stopped_at)

    wait_for_step(cluster, job, save, stopped_at + 5)
    cluster.kill_node("n2")
    wait_for_restart(cluster, job, 2)
    cluster.start_node("n2")
    cluster.wait_for(job, "COMPLETED", SECONDS)

    text = log.read_text()
    assert text.count(f"resuming from step {stopped_at} ") == 2
    assert (save / "logs" / f"job{job}-start0" / "node1").is_dir()
    reference = tmp_path / "reference"
    result = run_script(
        "stage1_qwen.sh",
        inputs,
        *TRAIN[2:],
        LOAD=inputs / "moe",
        GPUS_PER_NODE=2,
        **settings | {"SAVE": reference},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(save) == losses(reference)


def test_the_chain_runs_by_dependencies(cluster, submit, inputs, tmp_path):
    output = submit(
        "bash",
        "examples/slurm/submit_chain.sh",
        "qwen",
        "--nodes=2",
        f"--output={tmp_path}/%j.log",
        RUN=tmp_path / "run",
        HF_OUT=tmp_path / "hf",
        CHECKPOINT=inputs / "moe",
        STAGE1_ITERS=3,
        STAGE2_ITERS=2,
    )
    jobs = dict(part.split(": ") for part in output.split(", "))
    assert cluster.job(jobs["export"])["Dependency"].startswith(f"afterok:{jobs['stage 2']}")
    for job in jobs.values():
        cluster.wait_for(job, "COMPLETED", SECONDS)
    history = json.loads((tmp_path / "run/stage2/iter_0000002/moe_lpr/card.json").read_text())["history"]
    assert [entry["stage"] for entry in history] == ["1", "2"]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_experts"] == 5
