"""Runs that are saved at one layout go on at another with the same losses."""

import functools
import gc

import pytest
import torch

from megatron_moe_lpr.training.checkpointing import _without_garbage_collection
from tests.conversion.helpers import checkpoint_tensors
from tests.distributed import rank_pool
from tests.training.runs import make_checkpoint, make_data, metrics, rewind, train

TP2 = {"tensor_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP = PP2 | {"num_virtual_stages_per_pipeline_rank": 2}
DISTRIBUTED = {"use_distributed_optimizer": True}

RESUMED = {
    "one process": (1, {}),
    "TP2": (2, TP2),
    "EP2": (2, EP2),
    "PP2": (2, PP2),
    "PP2 interleaved": (2, VPP),
    "DP2": (2, {}),
    "CP2": (2, CP2),
    "TP2xEP2xDP2": (4, TP2 | EP2),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return make_checkpoint(root), make_data(root)


def run_pool(world, load, save, data, **changes):
    return rank_pool(world).run(functools.partial(train, load, save, data, **changes))


@pytest.fixture(scope="module", params=["plain", "distributed"])
def original_run(request, inputs, tmp_path_factory):
    """Six steps at EP2 x DP2, saved after three; once with and once without the distributed optimizer."""
    save = tmp_path_factory.mktemp("original") / "run"
    options = DISTRIBUTED if request.param == "distributed" else {}
    run_pool(4, inputs[0], save, inputs[1], save_interval=3, **EP2, **options)
    return save, options


@pytest.mark.parametrize("name", RESUMED)
def test_resume_at_another_layout(name, original_run, inputs, tmp_path):
    world, layout = RESUMED[name]
    first, options = original_run
    save = rewind(first, tmp_path / "run", 3)
    run_pool(world, inputs[0], save, inputs[1], **layout, **options)
    expected, found = metrics(first), metrics(save)
    assert sorted(found) == [4, 5, 6]
    for step, record in found.items():
        for value in ("lm_loss", "grad_norm", "load_balancing_loss"):
            assert record[value] == pytest.approx(expected[step][value], rel=2e-5), (step, value)
        assert record["lr"] == expected[step]["lr"]


def test_saved_with_context_parallelism(original_run, inputs, tmp_path):
    """The ranks of a CP group hold the same weights and states: the same run, and one process goes on with it."""
    first, options = original_run
    run_pool(2, inputs[0], tmp_path / "first", inputs[1], save_interval=3, **CP2, **EP2, **options)
    again = rewind(tmp_path / "first", tmp_path / "again", 3)
    run_pool(1, inputs[0], again, inputs[1], **options)
    expected = metrics(first)
    for found in (metrics(tmp_path / "first"), metrics(again)):
        for step, record in found.items():
            for value in ("lm_loss", "grad_norm", "load_balancing_loss"):
                assert record[value] == pytest.approx(expected[step][value], rel=2e-5), (step, value)


def test_resume_at_the_same_layout_is_exact(original_run, inputs, tmp_path):
    first, options = original_run
    save = rewind(first, tmp_path / "run", 3)
    run_pool(4, inputs[0], save, inputs[1], **EP2, **options)
    before = {key: tensor for key, tensor in checkpoint_tensors(first).items() if key.startswith("decoder.")}
    after = checkpoint_tensors(save)
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


@pytest.mark.parametrize("trained", [{}, {"train_embeddings": True}, {"stage": "full"}])
def test_bf16_with_fp32_routers_is_saved_and_resumed(trained, inputs, tmp_path):
    """Also where routers train beside dense bf16 weights: Megatron's optimizer mixed their states up. What is frozen
    keeps the dense model's float32."""
    first, second = tmp_path / "first", tmp_path / "second"
    changes = {"fp32": False, "bf16": True} | trained
    run_pool(2, inputs[0], first, inputs[1], save_interval=3, **EP2, **changes)
    tensors = checkpoint_tensors(first)
    assert tensors["decoder.layers.0.mlp.router.weight"].dtype == torch.float32
    assert tensors["decoder.layers.0.mlp.experts.experts.0.linear_fc2.weight"].dtype == torch.bfloat16
    original = tensors["decoder.layers.0.mlp.original_expert.linear_fc2.weight"]
    assert original.dtype == (torch.bfloat16 if trained.get("stage") == "full" else torch.float32)
    run_pool(2, inputs[0], rewind(first, second, 3), inputs[1], **EP2, **changes)
    again = checkpoint_tensors(second)
    assert all(torch.equal(tensor, again[key]) for key, tensor in tensors.items() if key.startswith("decoder."))


def test_fp32_with_two_equal_groups_of_parameters_is_resumed(inputs, tmp_path):
    """Routers and embeddings have groups of their own with equal settings, by which Megatron's fp32 optimizer told
    them apart: it ended with an error."""
    first, second = tmp_path / "first", tmp_path / "second"
    run_pool(1, inputs[0], first, inputs[1], save_interval=3, train_embeddings=True, weight_decay=0.1)
    run_pool(1, inputs[0], rewind(first, second, 3), inputs[1], train_embeddings=True, weight_decay=0.1)
    tensors, again = checkpoint_tensors(first), checkpoint_tensors(second)
    assert tensors.keys() == again.keys() and all(torch.equal(tensor, again[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("options", [{}, {"async_save": False}])
def test_old_checkpoints_go_and_the_run_is_the_same(options, inputs, tmp_path):
    """With and without a writer beside training; the newest two stay."""
    run_pool(1, inputs[0], tmp_path / "run", inputs[1], save_interval=1, keep_last_checkpoints=2, **options)
    assert sorted(path.name for path in (tmp_path / "run").glob("iter_*")) == ["iter_0000005", "iter_0000006"]
    run_pool(1, inputs[0], tmp_path / "once", inputs[1])
    expected, found = checkpoint_tensors(tmp_path / "once"), checkpoint_tensors(tmp_path / "run")
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def test_megatron_collects_nothing_while_a_save_waits():
    """Over all objects of torch and Megatron it took half a second, twice a save."""
    gc.unfreeze()  # what tests/conftest.py froze
    before = len(gc.get_objects())
    with _without_garbage_collection():
        looked_at = len(gc.get_objects())
    assert looked_at < before // 100 and gc.get_freeze_count() == 0
    assert len(gc.get_objects()) > before // 2


def test_what_a_process_has_frozen_stays_frozen():
    gc.freeze()
    before = gc.get_freeze_count()
    with _without_garbage_collection():
        pass
    # Of half a million, some end by themselves meanwhile: all would be gone from the count.
    assert gc.get_freeze_count() > before // 2 > 0
