"""Example scripts with bad settings end in one error line before anything is launched."""

import pytest

from tests.launching.builders import fake_python, prepare_inputs, run_script

LAUNCH = "-m megatron_moe_lpr.launch"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A converted tiny model and datasets."""
    return prepare_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        ("convert_qwen.sh", {"HF": ""}, "HF is not set; give the directory of the dense model"),
        ("convert_qwen.sh", {"HF": "none"}, "HF: none/config.json does not exist"),
        ("preprocess.sh", {"HF": "none"}, "HF: none does not exist"),
        ("preprocess.sh", {"DATA": "new", "INPUT": "none/LANGUAGE.gz"}, "no such file: none/el.gz"),
        ("preprocess.sh", {"PARTITION": "1-4"}, "PARTITION=1-4: i/n or merge/n"),
        ("stage1_qwen.sh", {"LOAD": "none"}, "LOAD: none does not exist; a convert_*.sh writes it"),
        ("stage2_qwen.sh", {"LOAD": "none"}, "LOAD: none does not exist; it is SAVE of stage1_*.sh"),
        ("stage1_qwen.sh", {"DATA": "none"}, "DATA: none/valid-el.idx does not exist; preprocess.sh writes it"),
        ("stage1_qwen.sh", {"EXPANDED": "el tr"}, "valid-tr.idx does not exist"),
        ("stage1_qwen.sh", {"ORIGINAL": " "}, "name languages"),
        ("stage1_qwen.sh", {"PLATFORM": "cuda", "PATH": "/usr/bin:/bin"}, "no GPU: nvidia-smi does not answer"),
        ("stage1_qwen.sh", {"PLATFORM": "tpu"}, "PLATFORM=tpu: cuda or cpu"),
        ("stage1_qwen.sh", {"RECOMPUTE": "some"}, "RECOMPUTE=some: none, moe or full"),
        ("stage1_qwen.sh", {"NUM_NODES": "two"}, "NUM_NODES=two: a whole number of 1 or more is expected"),
        ("stage1_qwen.sh", {"TRAIN_ITERS": "0"}, "--train-iters 0: must be at least 1"),
        ("train.sh", {}, "give a recipe: a file, or one of llama3-8b-stage1, "),
        ("stage1_qwen.sh", {"GPUS_PER_NODE": 3, "TP": 2}, "3 ranks cannot hold TP 2 x PP 1 = 2 ranks per model copy"),
        ("stage1_qwen.sh", {"GPU_MEMORY": 1}, "1 x 1 GiB: no layout fits"),
        ("export.sh", {"LOAD": "none"}, "LOAD: none does not exist; it is SAVE of stage2_*.sh"),
    ],
)
def test_stops_before_launching(inputs, script, settings, message):
    result = run_script(script, inputs, **{"LOAD": inputs / "moe", "SAVE": inputs / "run", **settings})
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode != 0 and len(errors) == 1 and message in errors[0], result.stderr
    assert LAUNCH not in result.stdout and not (inputs / "run").exists()


@pytest.mark.parametrize(("scaling", "number_format"), [("delayed", "hybrid"), ("blockwise", "e4m3")])
def test_dry_run_shows_the_plan_and_the_command_and_starts_nothing(inputs, scaling, number_format, tmp_path):
    settings = {"LOAD": inputs / "moe", "SAVE": inputs / "run", "DRY_RUN": 1, "PYTHON": fake_python(tmp_path)}
    result = run_script("stage1_qwen.sh", inputs, **settings, TRAIN_ITERS=7, FP8=1, FP8_RECIPE=scaling)
    assert result.returncode == 0, result.stderr
    plan, command = result.stdout.splitlines()
    assert "tools/plan.py" in plan and "--precision fp8" in plan
    assert LAUNCH in command and "--train-iters 7" in command and not (inputs / "run").exists()
    assert f"--fp8-format {number_format} --fp8-recipe {scaling}" in command
