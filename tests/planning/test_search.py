"""Which recompute modes are tried, what they are said to save, and what unbalanced routing would need."""

import dataclasses
import json

import pytest

from megatron_moe_lpr.commands import plan
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.architecture import read_architecture
from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.memory import largest_rank, worst_total
from megatron_moe_lpr.planning.planned_run import PlannedRun
from megatron_moe_lpr.planning.search import Choice, Machine, find_layouts
from megatron_moe_lpr.planning.sizes import RunSizes
from megatron_moe_lpr.training.configuration.stages import STAGES

CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 24,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
}
MACHINE = Machine(8, 8, 80.0)
SIZES = RunSizes(STAGES["1"].trains, 8, micro_batch_size=8)
DELAYED = dataclasses.replace(SIZES, precision="fp8")


def shape(experts: int = 5) -> ModelShape:
    return ModelShape(read_architecture(CONFIG), (experts,) * 24)


def total(recompute: str, sizes: RunSizes = SIZES, layout: ParallelLayout | None = None) -> float:
    return largest_rank(PlannedRun(shape(), layout or ParallelLayout(), sizes, recompute)).total


def test_modes_save_in_this_order():
    """With fused attention `core_attn` saves nothing: the whole QKV product stays instead of the output."""
    order = ["core_attn", "none", "layernorm", "moe_act", "moe", "full"]
    assert sorted(order, key=total, reverse=True) == order


def test_moe_act_is_tried_before_the_whole_layer():
    """Where memory is scarce it costs no matrix product; with delayed scaling Megatron lacks it."""
    machine = Machine(8, 8, 54.0)
    only = Choice(tensor=(1,), pipeline=(1,), expert=(1,))
    assert total("none") > machine.usable_bytes > total("moe_act")
    assert find_layouts(shape(), SIZES, machine, only)[0].recompute == "moe_act"
    assert find_layouts(shape(), DELAYED, Machine(8, 8, 52.0), only)[0].recompute == "moe"


@pytest.mark.parametrize("recompute", ["moe_act", "layernorm"])
def test_delayed_scaling_refuses_what_megatron_refuses(recompute):
    with pytest.raises(UserError, match="choose tensorwise or blockwise"):
        find_layouts(shape(), DELAYED, MACHINE, Choice(recompute=(recompute,)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--original-share", "0.5"), "--original-share needs --routing"),
        (
            ("--transformer-impl", "local", "--precision", "fp8"),
            "--precision fp8 needs the layers of Transformer Engine",
        ),
        (("--context-parallel-size", "2", "--precision", "fp32"), "--context-parallel-size 2: .* in fp32 is not split"),
        (("--fp8-param-gather", "--precision", "bf16"), "--fp8-param-gather needs --precision fp8"),
        (("--fp8-param-gather", "--precision", "fp8"), "--fp8-param-gather is not supported with --fp8-recipe delayed"),
    ],
)
def test_flags_that_contradict_each_other(flags, message):
    with pytest.raises(UserError, match=message):
        plan.main(["--hf", "x", "--gpus", "8", *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-experts", "3", "--top-k", "4"), "--top-k 4: must lie between 1 and the number of experts, 3"),
        (("--experts-per-layer", "3,1", "--top-k", "4"), "--top-k 4: must lie between 1 and the number of experts, 3"),
        (("--moe-layer-freq", "[1]*3"), "names 3 layers, and the model has 2"),
    ],
)
def test_experts_are_checked_as_by_an_import(flags, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 2}))
    with pytest.raises(UserError, match=message):
        plan.main(["--hf", str(tmp_path), "--gpus", "8", *flags])


def test_context_parallelism_is_kept_as_given_and_shares_a_sequence():
    """Of activations nearly half is left, of weights all; the states are split over as many ranks as before."""
    only = {"tensor": (1,), "pipeline": (1,), "expert": (1,), "recompute": ("full",)}
    one, two = (find_layouts(shape(), SIZES, MACHINE, Choice(**only, context=size))[0] for size in (1, 2))
    assert two.layout == ParallelLayout(context_parallel_size=2)
    assert two.memory.activations == pytest.approx(one.memory.activations / 2, rel=0.05)
    assert (two.memory.weights, two.memory.optimizer) == (one.memory.weights, one.memory.optimizer)
    with pytest.raises(UserError, match="--context-parallel-size 3"):
        find_layouts(shape(), dataclasses.replace(SIZES, gpus=9), MACHINE, Choice(context=3))


def test_weights_in_fp8_save_their_bf16_copies():
    tensorwise = dataclasses.replace(DELAYED, fp8_recipe="tensorwise")
    gathered = dataclasses.replace(tensorwise, fp8_param_gather=True)
    new_experts = 24 * 4 * 3 * 2048 * 5504
    assert total("none", tensorwise) - total("none", gathered) == 2 * new_experts


def test_worst_routing_grows_with_the_expert_parallel_group():
    layouts = [ParallelLayout(expert_model_parallel_size=size) for size in (1, 2, 4)]
    more = [worst_total(PlannedRun(shape(), layout, SIZES)) - total("none", layout=layout) for layout in layouts]
    assert more[0] < more[1]
    # On two ranks a token finds two experts of the chosen rank, on four ranks only one: twice 2 and four times 1.
    assert more[1] == pytest.approx(more[2])
    row = 2 * (3 * 5504 + 2048)  # both halves, the activation and the tokens of one more expert, in bf16
    assert more[1] > 24 * 8 * 1024 * row * (4 - 2)
