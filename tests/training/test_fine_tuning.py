"""Stage sft: the loss on answers alone, whatever the layout; LPR on all of a conversation; what is frozen."""

import functools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state
from transformers import AutoModelForCausalLM

from megatron_moe_lpr.checkpoint.loading.model import load_model
from megatron_moe_lpr.engine.gradient_watch import GradientWatch
from megatron_moe_lpr.engine.micro_batches import LossSums, run_schedule
from megatron_moe_lpr.engine.optimizer import build_optimizer, wrap_data_parallel
from megatron_moe_lpr.engine.options import OptimizerOptions
from megatron_moe_lpr.model.configuration.parameter_kinds import kind_of
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from megatron_moe_lpr.training.configuration.stages import STAGES, StageOptions, freeze, stage_note
from megatron_moe_lpr.training.logs.metrics import IntervalMetrics
from tests.conversion.helpers import checkpoint_tensors, run
from tests.data.builders import write_dataset
from tests.distributed import rank_pool
from tests.training.new_rows import extend_checkpoint
from tests.training.one_step import LANGUAGE_GROUP, SAMPLES, SEQUENCE, gather_gradients, samples
from tests.training.runs import LANGUAGES, make_checkpoint, metrics, train

SIZE = 2
"""Samples of a micro-batch."""
PROMPT = 20
LPR_COEFF = STAGES["sft"].lpr_loss_coeff


def conversations() -> dict[str, torch.Tensor]:
    """A global batch: prompts, then answers. The second micro-batch, and half of a layout's ranks in the first round,
    hold prompts alone."""
    whole = samples()
    answers = (torch.arange(SEQUENCE) >= PROMPT).float().expand(SAMPLES, -1).clone()
    answers[SIZE : 2 * SIZE] = 0
    return {**whole, "loss_mask": answers * (whole["language"] >= 0)}


def step(path: Path, layout: dict, counted: bool = True) -> tuple[float, dict[str, torch.Tensor]]:
    """On every rank of a pool: loss and gradients of one step of stage sft.

    Args:
        counted: False: no token of the whole batch counts in the loss.
    """
    platform, parallel = select_platform("cpu"), ParallelLayout(**layout)
    initialize_parallel(platform, parallel)
    stage = StageOptions("sft").resolve()
    model = load_model(path, parallel, platform, **stage.coefficients, calculate_per_token_loss=True)
    freeze(model.chunks, stage)
    chunks = wrap_data_parallel(model.chunks, model.config, OptimizerOptions())
    build_optimizer(chunks, model.config, OptimizerOptions(), platform)  # its set-up divides gradients by tokens
    watch = GradientWatch(chunks)
    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    whole = conversations()
    whole["loss_mask"] *= counted
    parts = [{key: value[first : first + SIZE] for key, value in whole.items()} for first in range(0, SAMPLES, SIZE)]
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    sums = run_schedule(chunks, model.config, parts[rank::ranks], LANGUAGE_GROUP)
    watch.check()
    return sums.mean, gather_gradients(chunks)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def reference(checkpoint, tmp_path_factory) -> tuple[float, list[torch.Tensor]]:
    """Loss of transformers' model with labels of -100 on prompts, and its routers' gradients with LPR added."""
    hf = tmp_path_factory.mktemp("reference") / "hf"
    run("export", "--load", checkpoint, "--hf", hf)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    logits: list[torch.Tensor] = []
    gates = [layer.mlp.gate for layer in model.model.layers]
    for gate in gates:
        gate.register_forward_hook(lambda gate, inputs, _: logits.append(inputs[0].flatten(0, -2) @ gate.weight.T))
    whole = conversations()
    ids = torch.cat([whole["tokens"], whole["labels"][:, -1:]], dim=1)
    labels = torch.cat([ids[:, :1], whole["labels"]], dim=1)
    labels[:, 1:][whole["loss_mask"] == 0] = -100
    labels[:, 0] = -100
    loss = model(input_ids=ids, labels=labels).loss
    # Every token of original languages, prompts too; the last one of a row is predicted and not read.
    original = torch.zeros_like(ids, dtype=torch.bool)
    original[:, :-1] = whole["language"] == 0
    lpr = torch.stack([-torch.log_softmax(one, -1)[original.flatten(), 0].mean() for one in logits]).mean()
    (loss + LPR_COEFF * lpr).backward()
    return loss.item(), [gate.weight.grad for gate in gates]


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, {}),
        (2, {}),
        (2, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}),
        (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    ],
    ids=["one process", "DP2", "TP2xEP2", "PP2xEP2"],
)
def test_the_loss_is_that_of_the_answers(world, layout, checkpoint, reference):
    """As transformers computes it with -100 on prompts; the routers' gradients are those of it and LPR."""
    expected, routers = reference
    for loss, gradients in rank_pool(world).run(step, checkpoint, layout):
        assert math.isclose(loss, expected, rel_tol=2e-6)
        for layer, router in enumerate(routers):
            found = gradients[f"decoder.layers.{layer}.mlp.router.weight"]
            assert (found - router).norm() < 1e-5 * router.norm(), layer


def test_a_batch_of_prompts_alone_changes_nothing(checkpoint):
    _, gradients = rank_pool(2).run(functools.partial(step, counted=False), checkpoint, {})[0]
    assert gradients == {}  # `gather_gradients` leaves zeros out, and NaN would not be one


def test_a_line_of_the_log_without_a_loss():
    nothing = LossSums(torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    found = IntervalMetrics(1, 8, 256, nothing.mean, nothing.by_language(["el", "en"]), 0.0, 2e-5, 1.0, 1.0, 0, 0, None)
    assert "| no token with a loss |" in found.line("sft", 2) and "lm_loss" not in found.scalars()


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> dict[str, str]:
    """Prompts of odd tokens, answers of even ones, which count (`write_dataset`); longer than two samples."""
    root = tmp_path_factory.mktemp("chats")
    return {
        language: write_dataset(
            root / language,
            language,
            [[*range(1 + first, 81, 2), *range(2 + index, 62 + index, 2)] for first in range(0, 40, 2)],
            chat=True,
        )
        for index, language in zip((0, 10, 30), LANGUAGES, strict=True)
    }


@pytest.mark.parametrize(
    ("world", "changes", "new_tokens"),
    [
        # Some micro-batches, and a whole step, hold prompts alone: a sample has 16 tokens, a prompt up to 40.
        (2, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "pack": "concatenate"}, ()),
        (4, {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True, "seq_length": 96}, (13,)),
    ],
    ids=["TP2xEP2", "PP2xDP2, new tokens, packed best-fit"],
)
def test_what_is_frozen_stays_to_the_bit_over_20_steps(world, changes, new_tokens, chats, tmp_path):
    load = make_checkpoint(tmp_path)
    if new_tokens:
        extend_checkpoint(load, new_tokens)
    changes = {"train_iters": 20, "seq_length": 16, "weight_decay": 0.1, **changes}
    rank_pool(world).run(functools.partial(train, load, tmp_path / "run", chats, "sft", **changes))
    before, after = checkpoint_tensors(load), checkpoint_tensors(tmp_path / "run")
    for key, tensor in before.items():
        same = torch.equal(tensor, after[key][: len(tensor)])
        assert same == (kind_of(key, extensions=len(new_tokens)) not in STAGES["sft"].trains), key
    steps = list(metrics(tmp_path / "run").values())
    losses = [record["lm_loss"] for record in steps if "lm_loss" in record]
    assert len(steps) == 20 and losses[-1] < losses[0]
    without = [record["grad_norm"] for record in steps if "lm_loss" not in record]
    assert without == ([] if new_tokens else [0.0])


def test_a_dense_model_is_fine_tuned_by_stage_full(chats, tmp_path):
    dense = make_checkpoint(tmp_path, experts=1)
    job = functools.partial(train, dense, tmp_path / "run", chats, "full", train_iters=10, seq_length=96)
    rank_pool(1).run(job)
    losses = [record["lm_loss"] for record in metrics(tmp_path / "run").values()]
    assert losses[-1] < losses[0]


def test_text_without_conversations_is_noted():
    def sources(*chat: bool) -> SimpleNamespace:
        return SimpleNamespace(train=[SimpleNamespace(manifest=SimpleNamespace(chat=one)) for one in chat])

    assert "no conversations for stage sft" in stage_note(STAGES["sft"], sources(False, False))
    assert stage_note(STAGES["sft"], sources(False, True)) is stage_note(STAGES["1"], sources(False)) is None
