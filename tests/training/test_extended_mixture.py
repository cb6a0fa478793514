"""A mixture base whose vocabulary is extended: step 0, stage 1 with new experts and new rows, its stock export."""

import functools

import torch

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.data.tokenizer import load_tokenizer
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind, kind_of
from tests.conversion.extended import make_tokenizers, save_with_tokenizer
from tests.conversion.helpers import checkpoint_tensors, run
from tests.conversion.tiny_models import load_model
from tests.data.builders import write_dataset
from tests.data.extended_tokenizers import ROWS
from tests.distributed import rank_pool
from tests.training.runs import metrics, train

TOTAL = ROWS + 7


def test_new_tokens_beside_a_mixtures_new_experts(tmp_path, cpu_platform):
    tokenizers = make_tokenizers(tmp_path / "tokenizers")
    base = save_with_tokenizer("qwen2_moe", tmp_path / "hf", tokenizers)
    flags = ("--add-experts", 2, "--tokenizer", tokenizers / "first")
    run("import", "--hf", base, "--save", tmp_path / "start", *flags)
    run("verify", "--load", tmp_path / "start", "--hf", base, "--tolerance", 2e-5)

    name = load_tokenizer(tokenizers / "first").fingerprint
    documents = [[1 + (first + place * 7) % (TOTAL - 1) for place in range(80)] for first in range(60)]
    data = {language: write_dataset(tmp_path / language, language, documents, name) for language in ("el", "hu")}
    settings = {"train_iters": 4, "open_experts_iters": 2, "expert_model_parallel_size": 2}
    rank_pool(2).run(functools.partial(train, tmp_path / "start", tmp_path / "run", data, **settings))
    before, after = (checkpoint_tensors(tmp_path / part) for part in ("start", "run"))
    moved = {key for key, tensor in before.items() if not torch.equal(after[key][: len(tensor)], tensor)}
    trained = {ParameterKind.NEW_EXPERTS, ParameterKind.ROUTER, ParameterKind.NEW_ROWS}
    assert moved == {key for key in before if kind_of(key) in trained}
    losses = metrics(tmp_path / "run")
    assert losses[4]["lm_loss"] < losses[1]["lm_loss"]

    card = resolve_checkpoint(tmp_path / "run").card()
    assert card.openness == 1.0 and card.new_tokens == [7]
    run("export", "--load", tmp_path / "run", "--hf", tmp_path / "out")
    run("verify", "--load", tmp_path / "run", "--hf", tmp_path / "out", "--tolerance", 2e-5)
    exported = load_model(tmp_path / "out")
    assert type(exported).__name__ == "Qwen2MoeForCausalLM" and exported.config.num_experts == 10
    embedding = exported.get_input_embeddings().weight
    assert embedding.shape[0] == exported.lm_head.out_features == TOTAL
    assert torch.equal(embedding[:ROWS], load_model(base).get_input_embeddings().weight)
    assert load_tokenizer(tmp_path / "out").fingerprint == name
