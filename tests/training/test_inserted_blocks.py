"""Block expansion (LLaMA-Pro): step 0 is the dense model, only inserted blocks train, the export is a dense model."""

import functools
import json
import re

import pytest
import torch

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.checkpoint.format.reader import is_model_key
from megatron_moe_lpr.checkpoint.loading.model import model_shape
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.parameter_kinds import kind_of
from megatron_moe_lpr.model.flops import training_flops_per_token
from megatron_moe_lpr.model.parameter_counts import count_parameters
from tests.conversion.fingerprint import checkpoint_fingerprint
from tests.conversion.helpers import assert_same_tensors, checkpoint_tensors, hf_tensors, run
from tests.conversion.tiny_models import COMMON, MODELS, load_model, logits, save_model
from tests.distributed import RankFailure, rank_pool
from tests.evaluation.tools import load_tool
from tests.training.runs import make_data, metrics, train

INSERTED = [2, 5]
SOURCES = [0, 1, 1, 2, 3, 3]
"""Of each layer of the grown model the dense one's that it is or starts from: the paper's figure 2, for 4 blocks in 2
groups."""
ZERO = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
LAYOUTS = {
    "TP2, distributed optimizer": (2, {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True}),
    "PP2, recompute full": (2, {"pipeline_model_parallel_size": 2, "recompute_granularity": "full"}),
    "DP2": (2, {}),
}


def make_base(root, model="llama", layers=4):
    before, COMMON["num_hidden_layers"] = COMMON["num_hidden_layers"], layers
    save_model(model, root / "hf")
    COMMON["num_hidden_layers"] = before
    for file in (root / "hf").glob("tokenizer*"):
        file.unlink()
    return root / "hf"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("blocks")
    hf = make_base(root)
    run("import", "--hf", hf, "--save", root / "checkpoint", "--expand-blocks", 2)
    return root, make_data(root)


@pytest.fixture(scope="module")
def trained(inputs):
    """One process, without a break."""
    root, data = inputs
    rank_pool(1).run(functools.partial(train, root / "checkpoint", root / "run", data, "blocks", save_interval=3))
    return root / "run"


@pytest.mark.parametrize("model", MODELS)
def test_computes_what_the_dense_model_does(model, tmp_path):
    hf = make_base(tmp_path, model)
    run("import", "--hf", hf, "--save", tmp_path / "grown", "--expand-blocks", 2)
    run("import", "--hf", hf, "--save", tmp_path / "dense", "--num-experts", 1)
    grown, dense = (resolve_checkpoint(tmp_path / name).card() for name in ("grown", "dense"))
    assert grown.inserted_blocks == INSERTED and grown.experts_per_layer == [1] * 6
    assert grown.original_fingerprint == dense.original_fingerprint == checkpoint_fingerprint(tmp_path / "grown")
    run("verify", "--load", tmp_path / "grown", "--hf", hf)
    run("export", "--load", tmp_path / "grown", "--hf", tmp_path / "out")
    exported = load_model(tmp_path / "out")
    assert exported.config.num_hidden_layers == 6 and type(exported) is type(load_model(hf))
    assert torch.equal(logits(exported), logits(load_model(hf)))
    _assert_copies(hf_tensors(hf), hf_tensors(tmp_path / "out"))
    run("import", "--hf", tmp_path / "out", "--save", tmp_path / "again", "--num-experts", 1)
    card = resolve_checkpoint(tmp_path / "again").card()
    assert card.inserted_blocks == INSERTED and card.original_fingerprint == grown.original_fingerprint
    assert_same_tensors(checkpoint_tensors(tmp_path / "again"), checkpoint_tensors(tmp_path / "grown"))


def _assert_copies(dense, grown):
    """Tensor by tensor: each block is its source, what an inserted one would write to the residual stream is zero."""
    for name, tensor in grown.items():
        layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        source = dense[f"model.layers.{SOURCES[int(layer[1])]}.{layer[2]}" if layer else name]
        zero = layer and int(layer[1]) in INSERTED and layer[2] in ZERO
        assert torch.equal(tensor, torch.zeros_like(source) if zero else source), name
    assert len(grown) - len(dense) == 2 * sum(name.startswith("model.layers.0.") for name in dense)


def test_first_gradients(inputs, tmp_path):
    """Step 1 reaches the zeroed matrices and through them, while they are zero, nothing else. AdamW's first step moves
    whatever has a gradient, however small, and without weight decay nothing else."""
    root, data = inputs
    changes = {"train_iters": 1, "weight_decay": 0.0}
    rank_pool(1).run(functools.partial(train, root / "checkpoint", tmp_path, data, "blocks", **changes))
    before, after = checkpoint_tensors(root / "checkpoint"), checkpoint_tensors(tmp_path)
    moved = {key for key, tensor in before.items() if not torch.equal(tensor, after[key][: len(tensor)])}
    zeroed = (".self_attention.linear_proj.weight", ".mlp.linear_fc2.weight")
    assert moved == {f"decoder.layers.{layer}{name}" for layer in INSERTED for name in zeroed}
    for key in moved:
        assert torch.count_nonzero(after[key]) > 0.99 * after[key].numel(), key


def test_only_inserted_blocks_train_in_bf16(inputs, tmp_path):
    """Float16Module puts "module." before every name."""
    root, data = inputs
    changes = {"fp32": False, "bf16": True, "train_iters": 2}
    rank_pool(1).run(functools.partial(train, root / "checkpoint", tmp_path, data, "blocks", **changes))
    before, after = checkpoint_tensors(root / "checkpoint"), checkpoint_tensors(tmp_path)
    for key, tensor in before.items():
        inserted = kind_of(key, INSERTED) == "inserted blocks"
        # What is frozen keeps the dense model's float32.
        assert after[key].dtype == (torch.bfloat16 if inserted else torch.float32)
        if not inserted or not tensor.any():
            assert torch.equal(tensor.to(after[key].dtype), after[key][: len(tensor)]) != inserted, key


def test_only_inserted_blocks_train(inputs, trained):
    before, after = checkpoint_tensors(inputs[0] / "checkpoint"), checkpoint_tensors(trained)
    for key, tensor in before.items():
        same = torch.equal(tensor, after[key][: len(tensor)])
        assert same == (kind_of(key, INSERTED) != "inserted blocks"), key
    card = resolve_checkpoint(trained).card()
    assert card.inserted_blocks == INSERTED and card.history[-1]["stage"] == "blocks"
    assert checkpoint_fingerprint(trained) == card.original_fingerprint
    losses = [record["lm_loss"] for record in metrics(trained).values()]
    assert losses[-1] < losses[0]


def test_export_of_what_was_trained(inputs, trained, tmp_path):
    run("export", "--load", trained, "--hf", tmp_path / "out")
    run("verify", "--load", trained, "--hf", tmp_path / "out", "--tolerance", 1e-4)
    before, after = hf_tensors(inputs[0] / "hf"), hf_tensors(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 6
    for old, new in enumerate((0, 1, 3, 4)):
        for name in (name for name in before if name.startswith(f"model.layers.{old}.")):
            assert torch.equal(before[name], after[name.replace(f".{old}.", f".{new}.", 1)]), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_and_resume(name, inputs, trained, tmp_path):
    """Half of the run in one process, the rest at another layout: the losses of the run without a break."""
    (world, changes), (root, data) = LAYOUTS[name], inputs
    job = functools.partial(train, root / "checkpoint", tmp_path, data, "blocks", save_interval=3, **changes)
    rank_pool(world).run(job)
    whole, found = metrics(trained), metrics(tmp_path)
    assert len(found) == 6
    for step, record in found.items():
        assert record["lm_loss"] == pytest.approx(whole[step]["lm_loss"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(whole[step]["grad_norm"], rel=1e-4)


def test_resume_at_another_layout(inputs, trained, tmp_path):
    root, data = inputs
    first = functools.partial(train, root / "checkpoint", tmp_path, data, "blocks", exit_interval=3)
    rank_pool(1).run(first)
    rest = functools.partial(train, root / "checkpoint", tmp_path, data, "blocks", pipeline_model_parallel_size=2)
    rank_pool(2).run(rest)
    whole, found = metrics(trained), metrics(tmp_path)
    assert found.keys() == whole.keys()
    for step, record in found.items():
        assert record["lm_loss"] == pytest.approx(whole[step]["lm_loss"], rel=1e-5)


@pytest.fixture(scope="module")
def at_the_end(tmp_path_factory, inputs):
    """Three blocks and one inserted after them, trained by one process."""
    root = tmp_path_factory.mktemp("end")
    run("import", "--hf", make_base(root, layers=3), "--save", root / "checkpoint", "--expand-blocks", 1)
    job = functools.partial(train, root / "checkpoint", root / "one", inputs[1], "blocks", train_iters=2)
    rank_pool(1).run(job)
    return root


@pytest.mark.parametrize("virtual", [1, 2])
def test_a_pipeline_stage_without_inserted_blocks(virtual, at_the_end, inputs, tmp_path):
    """Nothing trains on the first of two stages or, of four chunks, in three."""
    layout = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": virtual}
    load = at_the_end / "checkpoint"
    rank_pool(2).run(functools.partial(train, load, tmp_path, inputs[1], "blocks", train_iters=2, **layout))
    whole, found = metrics(at_the_end / "one"), metrics(tmp_path)
    assert len(found) == 2
    for step, record in found.items():
        assert record["lm_loss"] == pytest.approx(whole[step]["lm_loss"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(whole[step]["grad_norm"], rel=1e-4)


def test_only_trained_weights_saved_and_resumed(inputs, tmp_path, trained):
    """Stopped half way and resumed: what the run without a break ends with."""
    root, data = inputs
    job = functools.partial(train, root / "checkpoint", tmp_path / "run", data, "blocks", save_trainable_only=True)
    rank_pool(1).run(functools.partial(job, exit_interval=3))
    rank_pool(1).run(job)
    inserted = {key for key in checkpoint_tensors(root / "checkpoint") if kind_of(key, INSERTED) == "inserted blocks"}
    saved = checkpoint_tensors(tmp_path / "run")
    assert {key for key in saved if is_model_key(key)} == inserted
    moments = {key.removeprefix("optimizer.state.exp_avg.") for key in saved if ".exp_avg." in key}
    assert moments == inserted
    run("export", "--load", tmp_path / "run", "--hf", tmp_path / "out")
    run("export", "--load", trained, "--hf", tmp_path / "whole")
    assert_same_tensors(hf_tensors(tmp_path / "out"), hf_tensors(tmp_path / "whole"))


def test_planned_parameters_are_the_checkpoints(inputs):
    shape = model_shape(resolve_checkpoint(inputs[0] / "checkpoint"))
    counted = dict.fromkeys(count_parameters(shape.parameters), 0)
    for key, tensor in checkpoint_tensors(inputs[0] / "checkpoint").items():
        counted[kind_of(key, INSERTED)] += tensor.numel()
    assert counted["inserted blocks"] and counted == {
        kind: count_parameters(shape.parameters)[kind] for kind in counted
    }


def test_the_plan_takes_a_grown_checkpoint(inputs, monkeypatch, capsys):
    tool, flags = load_tool("plan"), ["plan.py", "--stage", "blocks", "--gpus", "1", "--global-batch-size", "8"]
    flags += ["--seq-length", "256"]
    monkeypatch.setattr("sys.argv", [*flags, "--load", str(inputs[0] / "checkpoint")])
    tool.main()
    inserted = count_parameters(model_shape(resolve_checkpoint(inputs[0] / "checkpoint")).parameters)["inserted blocks"]
    assert f" {inserted:,} trained" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*flags, "--hf", str(inputs[0] / "hf")])
    with pytest.raises(UserError, match="--hf: --stage blocks trains inserted blocks and the checkpoint has none"):
        tool.main()


def test_operations_of_a_training_step(inputs):
    """Weight gradients, a multiply-add for each weight of a matrix, are computed in inserted blocks only."""
    shape = model_shape(resolve_checkpoint(inputs[0] / "checkpoint"))
    found, forward_and_inputs = (training_flops_per_token(shape, trains, 32) for trains in (("inserted blocks",), ()))
    matrices = sum(
        tensor.numel()
        for key, tensor in checkpoint_tensors(inputs[0] / "checkpoint").items()
        if kind_of(key, INSERTED) == "inserted blocks" and tensor.dim() == 2
    )
    assert found - forward_and_inputs == 2 * matrices > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--expand-blocks", 3), "must divide the model's 4 layers"),
        (("--expand-blocks", 0), "--expand-blocks 0: must be at least 1"),
        (("--expand-blocks", 2, "--num-experts", 3), "--num-experts: a model with inserted blocks stays dense"),
        (("--expand-blocks", 2, "--moe-layer-freq", 2), "--moe-layer-freq: a model with inserted blocks stays dense"),
        (("--expand-blocks", 2, "--experts-per-layer", "3,1,1,3"), "--experts-per-layer: a model with inserted blocks"),
        (("--expand-blocks", 2, "--top-k", 2), "--top-k: a model with inserted blocks stays dense"),
    ],
)
def test_refused_imports(flags, words, inputs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("import", "--hf", inputs[0] / "hf", "--save", tmp_path / "new", *flags)
    error = capsys.readouterr().err
    assert words in error and error.startswith("error:") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_grown_export_is_upcycled_only_as_any_dense_model(inputs, tmp_path, capsys):
    run("export", "--load", inputs[0] / "checkpoint", "--hf", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "of its 6 transformer blocks 2 were inserted as copies (2, 5, counted from 0)" in text
    capsys.readouterr()
    for flags in ((), ("--num-experts", 3)):
        with pytest.raises(SystemExit):
            run("import", "--hf", tmp_path / "out", "--save", tmp_path / "moe", *flags)
        error = capsys.readouterr().err
        assert "has inserted blocks" in error and "--num-experts 1" in error and error.count("\n") == 1
    assert not (tmp_path / "moe").exists()
    (tmp_path / "out" / "moe_lpr" / "card.json").unlink()
    run("import", "--hf", tmp_path / "out", "--save", tmp_path / "moe", "--num-experts", 3)
    card = resolve_checkpoint(tmp_path / "moe").card()
    assert card.experts_per_layer == [3] * 6 and not card.inserted_blocks


def test_a_stock_moe_takes_no_blocks(inputs, tmp_path, capsys):
    run("import", "--hf", inputs[0] / "hf", "--save", tmp_path / "moe", "--num-experts", 3)
    run("export", "--load", tmp_path / "moe", "--hf", tmp_path / "out")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("import", "--hf", tmp_path / "out", "--save", tmp_path / "grown", "--expand-blocks", 2)
    assert "out has experts; blocks are inserted into dense models" in capsys.readouterr().err
    assert not (tmp_path / "grown").exists()


def test_stages_refuse_the_others_checkpoints(inputs, tmp_path):
    root, data = inputs
    run("import", "--hf", root / "hf", "--save", tmp_path / "dense", "--num-experts", 1)
    with pytest.raises(RankFailure, match="--load: --stage blocks trains inserted blocks and the checkpoint has none"):
        rank_pool(1).run(functools.partial(train, tmp_path / "dense", tmp_path / "run", data, "blocks"))
    with pytest.raises(RankFailure, match="--load: --stage 1 needs experts"):
        rank_pool(1).run(functools.partial(train, root / "checkpoint", tmp_path / "run", data, "1"))
