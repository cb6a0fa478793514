"""The example scripts, run in a user's order with environment variables alone."""

import json

from tests.data.builders import CORPUS
from tests.launching.builders import run_script, save_dense_model


def test_from_a_dense_model_to_an_exported_one(tmp_path):
    save_dense_model(tmp_path / "dense")
    text = str(CORPUS / "valid" / "LANGUAGE.jsonl.zst")

    def script(name: str, *arguments: str, **settings: object) -> str:
        result = run_script(name, tmp_path, *arguments, **settings)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    script("convert_qwen.sh", SAVE=tmp_path / "moe")
    script("preprocess.sh", INPUT=text, VALID_INPUT=text)
    evaluation = ("--eval-iters", "1", "--num-workers", "0")
    first = {"LOAD": tmp_path / "moe", "SAVE": tmp_path / "stage1", "TRAIN_ITERS": 2, "GPUS_PER_NODE": 2}
    out = script("stage1_qwen.sh", *evaluation, **first, EP=1)
    assert "113,312 in all" in out and "46,464 trained" in out and "step 2/2" in out
    out = script("stage2_qwen.sh", *evaluation, LOAD=tmp_path / "stage1", SAVE=tmp_path / "stage2", TRAIN_ITERS=1)
    assert "LPR" in out and "step 1/1" in out
    script("export.sh", LOAD=tmp_path / "stage2", HF_OUT=tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["num_experts"] == 6


def test_partitions_of_preprocessing_merge_to_the_same_dataset(tmp_path):
    save_dense_model(tmp_path / "dense")
    plain = tmp_path / "text" / "el.jsonl"
    plain.parent.mkdir()
    plain.write_text("".join(json.dumps({"text": f"κείμενο {number}"}) + "\n" for number in range(50)))
    (plain.parent / "en.jsonl").write_text(plain.read_text())
    text = {"INPUT": tmp_path / "text/LANGUAGE.jsonl", "VALID_INPUT": tmp_path / "text/LANGUAGE.jsonl"}
    for part in ("1/2", "2/2", "2/2", "merge/2"):
        result = run_script("preprocess.sh", tmp_path, **text, PARTITION=part)
        assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "data/train-el.json").read_text())["documents"] == 50
    assert (tmp_path / "data/review-en.idx").exists()
