"""The scripts of the 7B to 8B models: settings of their own are names alone, and everything else stands once."""

import pytest

from tests.launching.builders import ROOT, run_script

MODELS = {"llama3_8b": "llama3-8b", "mistral_7b": "mistral-7b", "qwen2.5_7b": "qwen2.5-7b"}
STEPS = ("convert", "stage1", "stage2")
LANGUAGES = ("el", "hu", "tr", "en", "es", "zh")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Names of what the steps before would have written; a dry run asks for no more."""
    directory = tmp_path_factory.mktemp("work")
    (directory / "dense").mkdir()
    (directory / "dense/config.json").touch()
    for name in MODELS.values():
        (directory / f"checkpoints/{name}-5experts").mkdir(parents=True)
        (directory / f"runs/{name}-5experts-stage1").mkdir(parents=True)
        (directory / f"datasets/{name}").mkdir(parents=True)
        for part in ("train", "review", "valid"):
            for language in LANGUAGES:
                (directory / f"datasets/{name}/{part}-{language}.idx").touch()
    return directory


@pytest.mark.parametrize("script", MODELS)
def test_a_model_s_steps_read_what_the_step_before_has_written(work, script):
    name = MODELS[script]
    # Empty settings are those that the script gives.
    settings = dict.fromkeys(("DATA", "EXPANDED", "ORIGINAL", "SEQ_LENGTH", "MICRO_BATCH", "GLOBAL_BATCH", "LR"), "")
    shown = {}
    for step in STEPS:
        iterations = {} if step == "stage1" else {"TRAIN_ITERS": 7}
        result = run_script(
            f"{step}_{script}.sh", work, "--seed", "3", DRY_RUN=1, PYTHON="echo", **settings, **iterations
        )
        assert result.returncode == 0, result.stderr
        shown[step] = result.stdout.splitlines()[-1]
        assert "--seed 3" in shown[step]
    moe, first, second = f"checkpoints/{name}-5experts", f"runs/{name}-5experts-stage1", f"runs/{name}-5experts-stage2"
    assert f"--hf {work}/dense --save {moe} --num-experts 5 --top-k 2" in shown["convert"]
    assert f"--load {moe} --save {first} --save-interval 1000 " in shown["stage1"]
    assert f"--load {first} --save {second} --save-interval 200 " in shown["stage2"]
    assert f"--data-path 1 datasets/{name}/train-el 1 datasets/{name}/train-hu 1 " in shown["stage1"]
    assert f"--data-path datasets/{name}/review-en datasets/{name}/review-es " in shown["stage2"]
    assert (
        "--train-iters 45776 --lr 5e-5 --seq-length 1024 --micro-batch-size 1 --global-batch-size 512"
        in shown["stage1"]
    )
    assert "--train-iters 7 --lr 5e-5 --seq-length 512 --micro-batch-size 1 --global-batch-size 512" in shown["stage2"]
    layout = "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 2 --expert-model-parallel-size 4"
    assert layout in shown["stage1"] and layout in shown["stage2"]


@pytest.mark.parametrize("step", STEPS)
def test_scripts_differ_in_the_model_s_name_alone(step):
    texts = set()
    for script, name in MODELS.items():
        _, title, *rest = (ROOT / f"examples/{step}_{script}.sh").read_text().split("\n")
        assert title.startswith("# ")
        texts.add("\n".join(rest).replace(f" {name} ", " NAME "))
    assert len(texts) == 1, texts


def test_a_missing_setting_is_told_with_the_script_that_was_run(work):
    result = run_script("convert_llama3_8b.sh", work, HF="")
    assert result.returncode == 1 and result.stderr.endswith(f"HF=... bash {ROOT}/examples/convert_llama3_8b.sh\n")
