"""The shipped batch files on a real two-node cluster, with CPU settings."""

import json
from pathlib import Path

import pytest

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


def times_run(save: Path, step: int) -> int:
    """Return how often a step was logged: once, and once more for each start that ran it again."""
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return sum(row["kind"] == "train" and row["iteration"] == step for row in rows)


def wait_for_text(cluster, job: str, log: Path, text: str) -> None:
    """Wait until a job's log holds a text; fail at once if the job ends before."""

    def reached() -> bool:
        state = cluster.job(job)["JobState"]
        there = text in log.read_text()
        assert there or state not in ENDS, f"job {job}: {state} before {text!r}: {log.read_text()[-2000:]}"
        return there

    wait_until(reached, f"{log}: never {text!r}", SECONDS)


def stop_and_requeue(cluster, job: str, save: Path, restarts: int) -> int:
    """Ask a job to save and start again, as `--signal` of train.sbatch does; return the step at which it stopped."""
    # Without waiting for the next time that SLURM looks at limits.
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_restart(cluster, job, restarts)
    stopped_at = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert stopped_at < ITERATIONS
    return stopped_at


def wait_for_restart(cluster, job: str, restarts: int) -> None:
    """Wait until a job has been requeued `restarts` times."""
    wait_until(lambda: int(cluster.job(job)["Restarts"]) >= restarts, lambda: f"{cluster.job(job)}", SECONDS)


def test_a_job_goes_on_with_the_nodes_that_are_left_and_takes_the_others_back(cluster, submit, inputs, tmp_path):
    save, log = tmp_path / "run", tmp_path / "job.log"
    settings = {"SAVE": save, "TRAIN_ITERS": ITERATIONS, "SAVE_INTERVAL": 1000}
    elastic = ("sbatch", "--parsable", "--nodes=1-2", f"--output={log}", *TRAIN)
    job = submit(*elastic, **settings, MIN_NODES=1)

    wait_for_step(cluster, job, save, 3)
    first = stop_and_requeue(cluster, job, save, 1)
    assert "stopped by request" in log.read_text() and "ended with code 75" in log.read_text()

    wait_for_step(cluster, job, save, first + 5)
    cluster.kill_node("n2")
    undisturbed = losses(save)
    wait_for_restart(cluster, job, 2)
    wait_for_text(cluster, job, log, "resumes with 1 rank on 1 node instead of 2 ranks on 2 nodes: DP 1 instead of 2")
    cluster.start_node("n2")
    wait_until(lambda: times_run(save, first + 1) == 2, "the job on one node makes no step", SECONDS)
    second = stop_and_requeue(cluster, job, save, 3)
    cluster.wait_for(job, "COMPLETED", SECONDS)

    text = log.read_text()
    assert text.count(f"resuming from step {first} ") == 2 and text.count(f"resuming from step {second} ") == 1
    assert "gradient accumulation 2x (4 micro-batches a step instead of 2); the global batch stays 8" in text
    assert "resumes with 2 ranks on 2 nodes instead of 1 rank on 1 node: DP 2 instead of 1" in text
    assert (save / "logs" / f"job{job}-start0" / "node1").is_dir()
    assert not (save / "logs" / f"job{job}-start2" / "node1").exists()
    assert (save / "logs" / f"job{job}-start3" / "node1").is_dir()
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
    expected, found = losses(reference), losses(save)
    # To the bit on as many ranks; from the first step on fewer on, other orders of sums.
    assert undisturbed == {step: expected[step] for step in undisturbed} and max(undisturbed) > first
    assert {step: found[step] for step in range(1, first + 1)} == {step: expected[step] for step in range(1, first + 1)}
    assert found == pytest.approx(expected, rel=1e-6)


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
        EP=2,
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
