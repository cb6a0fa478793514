"""BOS in lm_eval: what it puts before prompts on the base model and on the export, said and recorded."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.lm_eval.beginning import describe_beginning, prompt_beginning
from tests.data.builders import make_hf_tokenizer
from tests.data.test_beginning_of_text import with_bos
from tests.launching.builders import save_dense_model

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval: make test-eval")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A model whose tokenizer adds a BOS, as Llama's, and the same without."""
    root = tmp_path_factory.mktemp("models")
    save_dense_model(root / "qwen")
    with_bos(make_hf_tokenizer(root / "tokenizer"), root / "begins")
    shutil.copytree(root / "qwen", root / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(root / "begins" / name, root / "llama" / name)
    return {"qwen": root / "qwen", "llama": root / "llama"}


def test_what_is_said(models):
    llama = prompt_beginning(models["llama"], models["llama"], "dtype=auto")
    assert llama == ["<|begin|>"] and "begin with <|begin|>" in describe_beginning(llama)
    assert prompt_beginning(models["qwen"], models["qwen"], "dtype=auto") == []
    assert "no special token" in describe_beginning([])
    for argument in ("add_bos_token=False", "dtype=auto,add_bos_token=False", "add_bos_token=false,dtype=auto"):
        assert prompt_beginning(models["llama"], models["qwen"], argument) == []


def test_models_that_begin_differently_are_not_compared(models, tmp_path):
    with pytest.raises(UserError, match=r"begins prompts with <\|begin\|>.*with no special token.*add_bos_token=False"):
        prompt_beginning(models["llama"], models["qwen"], "dtype=auto")
    with pytest.raises(UserError, match="could not load its tokenizer"):
        prompt_beginning(tmp_path, models["qwen"], "")


@needs_harness
@pytest.mark.parametrize(("name", "argument", "begins"), [("llama", None, 1), ("llama", False, 0), ("qwen", None, 0)])
def test_lm_eval_does_so(name, argument, begins, models):
    """Prompts as HFLM encodes them, and the prefix of a text without a context, as in perplexity tasks."""
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(str(models[name]), device="cpu", add_bos_token=argument)
    tokenizer = harness.tokenizer
    plain = tokenizer.encode("some text", add_special_tokens=False)
    expected = [tokenizer.bos_token_id] if begins else []
    assert harness.tok_encode("some text") == expected + plain
    assert harness.tok_batch_encode(["some text"])[0][0].tolist() == expected + plain
    context, answer = harness._encode_pair("some", " text")
    assert context + answer == expected + plain
    model_args = "dtype=auto" + ("" if argument is None else f",add_bos_token={argument}")
    assert prompt_beginning(models[name], models[name], model_args) == tokenizer.convert_ids_to_tokens(expected)
    assert harness.prefix_token_id == (tokenizer.bos_token_id if name == "llama" else tokenizer.eos_token_id)
