"""Paths with blanks, quotes, globs, dollars and line ends reach every process as they are."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.launching.builders import ROOT, environment, fake_python

NAMES = ["my run", 'it\'s "so"', "*[a]?", "$HOME `x` \\", "a\nb\n", "  both ends  ", "äöü & ;|<>", "plain"]

FAKES = {
    "scontrol": 'echo "NodeName=n1 NodeAddr=127.0.0.1 Arch=x"',
    # The step and, on each node, what looks for the launcher.
    "srun": 'printf "%s\\0" "$SAVE" "$LOG_DIR" "${@: -1}" >"$RECORD"',
}


@pytest.fixture
def work(tmp_path):
    """Directory with programs that record their arguments."""
    (tmp_path / "bin").mkdir()
    for name, text in FAKES.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    fake_python(tmp_path / "bin", 'printf "%s\\0" "$@" >>"$RECORD.python"')
    return tmp_path


def datasets(directory: Path) -> None:
    directory.mkdir()
    for name in ("train-el", "valid-el", "valid-en"):
        (directory / f"{name}.idx").touch()


def variables(work: Path, name: str) -> dict[str, str]:
    for kind in ("load", "data"):
        (work / kind).mkdir(exist_ok=True)
    (work / "load" / name).mkdir()
    datasets(work / "data" / name)
    own = environment(
        work,
        PYTHON=work / "bin" / "python",
        LOAD=work / "load" / name,
        DATA=work / "data" / name,
        SAVE=work / "save" / name,
        RECORD=work / "record",
    )
    return {**own, "PATH": f"{work / 'bin'}:{os.environ['PATH']}"}


def words(path: Path) -> list[str]:
    return path.read_text().split("\0")[:-1]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_job_uses_the_directory_that_it_was_given(name, work):
    slurm = {"SLURM_SUBMIT_DIR": ROOT, "SLURM_JOB_ID": 7, "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": 1}
    result = subprocess.run(
        ["bash", str(ROOT / "examples/slurm/train.sbatch"), "examples/stage1_qwen.sh", "--eval-iters", "1"],
        cwd=ROOT,
        env=variables(work, name) | {key: str(value) for key, value in slurm.items()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    save = str(work / "save" / name)
    assert words(work / "record") == [save, f"{save}/logs/job7-start0", "1"]
    assert sorted(path.name for path in (work / "save").iterdir()) == [name]
    assert (work / "save" / name / ".slurm-progress").read_text().split() == ["7", "none", "0"]


@pytest.mark.parametrize(("flags", "expected"), [(["--save", "other run"], "other run"), (["--save=a b"], "a b")])
def test_a_save_among_the_flags_counts(flags, expected, work):
    settings = variables(work, "run") | {"DRY_RUN": "1", "SAVE_FILE": str(work / "told")}
    subprocess.run(["bash", str(ROOT / "examples/stage1_qwen.sh"), *flags], env=settings, check=True, timeout=60)
    assert words(work / "told") == [expected, "1"]


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_hands_paths_on_as_they_are(name, work):
    settings = variables(work, name) | {"EXPANDED": "el\n", "ORIGINAL": "\ten\n"}
    result = subprocess.run(
        ["bash", str(ROOT / "examples/stage1_qwen.sh")], env=settings, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    given = words(work / "record.python")
    data, save = str(work / "data" / name), str(work / "save" / name)

    def after(flag: str, count: int = 1) -> list[str]:
        return given[given.index(flag) + 1 :][:count]

    start = given.index("megatron_moe_lpr.pretrain")
    given = given[given.index("megatron_moe_lpr.launch") :]
    assert start and after("--load") == [str(work / "load" / name)] and after("--save") == [save]
    assert after("--data-path", 2) == ["1", f"{data}/train-el"]
    assert after("--valid-data-path", 2) == [f"{data}/valid-el", f"{data}/valid-en"]
    assert after("--log-dir") == [f"{save}/logs/node0"] and after("--original-languages") == ["en"]
    assert (work / "save" / name / "logs" / "node0" / "launcher.pid").exists()


@pytest.mark.parametrize("name", NAMES)
def test_partitions_are_merged_from_the_directory_that_was_given(name, work):
    settings = variables(work, name) | {"HF": str(work), "PARTITION": "merge/2", "ORIGINAL": "en"}
    for part in (1, 2):
        path = work / "data" / name / "parts" / f"train-el-0000{part}-of-00002.json"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for done in ("review-el", "review-en", "valid-el", "valid-en"):
        (work / "data" / name / f"{done}.json").touch()
    subprocess.run(["bash", str(ROOT / "examples/preprocess.sh")], env=settings, check=True, timeout=60)
    given = words(work / "record.python")
    from megatron_moe_lpr.data.preparation.merging import expand_prefixes

    parts = work / "data" / name / "parts"
    assert expand_prefixes([given[given.index("--input") + 1]]) == [
        str(parts / f"train-el-0000{part}-of-00002") for part in (1, 2)
    ]


@pytest.mark.parametrize(("variable", "value"), [("NUM_NODES", "0"), ("GPUS_PER_NODE", "x[$(touch seen)]")])
def test_a_variable_that_is_no_number_is_named(variable, value, work):
    result = subprocess.run(
        ["bash", str(ROOT / "examples/stage1_qwen.sh")],
        env=variables(work, "run") | {variable: value},
        cwd=work,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1 and not (work / "seen").exists()
    assert result.stderr == f"error: {variable}={value}: a whole number of 1 or more is expected\n"
