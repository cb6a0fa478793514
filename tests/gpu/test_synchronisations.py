"""Where a training step makes the host wait for the device, counted on the emulated device, per micro-batch and layer.

`make test-te TESTS="tests/gpu/test_synchronisations.py -s"` prints every place.
"""

import contextlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_moe_lpr import Callback
from megatron_moe_lpr.model.moe.router import RouterProduct
from megatron_moe_lpr.pretrain import pretrain
from megatron_moe_lpr.training.loop import Trainer
from tests.gpu import device
from tests.gpu.figures import Figures
from tests.gpu.ranks import run
from tests.gpu.synchronisations import counted
from tests.gpu.test_layouts import EP2, TP2
from tests.gpu.test_numerics import BF16, MOE, RECIPES, SHARDED
from tests.training.runs import training_config

COUNTED_STEP = 3  # what only the first steps do is over
LAYERS, MICRO_BATCHES, GLOBAL_BATCH = 4, 2, 8
COLUMNS = ("MoE layers", "each, a micro-batch", "exchanges between stages", "in all")
pytestmark = pytest.mark.skipif(not device.EMULATED, reason="counts on the emulated device alone")
OVERLAP = {"original_expert_overlap": True}
CASES = {
    "one rank": (1, {}),
    "one rank, fp32": (1, {"fp32": True, "bf16": False}),
    # Their boundaries are found on the host, by a loader process.
    "one rank, documents apart": (1, {"reset_attention_mask": True, "reset_position_ids": True, "num_workers": 1}),
    "one rank, stage 2": (1, {"stage": "2"}),
    "one rank, fp8 tensorwise": (1, RECIPES["tensorwise"]),
    "EP2": (2, EP2 | SHARDED),
    "EP2, beside": (2, EP2 | SHARDED | OVERLAP),
    "EP2, stage 2": (2, EP2 | SHARDED | {"stage": "2"}),
    "TP2+SP": (2, TP2),
    "TP2+SP, stage 2": (2, TP2 | {"stage": "2"}),
    "TP2+SP, EP2": (2, TP2 | EP2),
    "TP2+SP, EP2, stage 2, beside": (2, TP2 | EP2 | OVERLAP | {"stage": "2"}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "EP2, recompute moe": (2, EP2 | SHARDED | MOE),
}


class Reader(Callback):
    """Reads all that a callback is given of a step."""

    def on_step(self, step):
        assert step.loss > 0 and step.language_losses and step.grad_norm > 0 and step.lr >= 0


def waits_of_a_step(checkpoint: Path, save: Path, data: dict, fault: Any, **changes) -> Counter:
    """On every rank: the waits from the begin of one step to the begin of the next."""
    found: Counter = Counter()
    step = Trainer.step

    with contextlib.ExitStack() as stack:

        def watched(trainer, batches):
            if trainer.state.iteration + 1 == COUNTED_STEP:
                waits = stack.enter_context(counted())
                stack.callback(lambda: found.update(waits.counts))
            elif trainer.state.iteration == COUNTED_STEP:
                stack.close()
            return step(trainer, batches)

        with fault(), patch.object(Trainer, "step", watched):
            config = training_config(checkpoint, save, data, platform="cuda", log_interval=100, **changes)
            pretrain(config, [Reader()])
    return found


def count(inputs, save: Path, name: str, fault=contextlib.nullcontext) -> list[Counter]:
    """Each rank's waits of a step with two micro-batches."""
    world, changes = CASES[name]
    samples = (
        GLOBAL_BATCH
        // MICRO_BATCHES
        // (1 if {"tensor_model_parallel_size", "pipeline_model_parallel_size"} & changes.keys() else world)
    )
    fields = {"fp32": False, **BF16, "seq_length": 64, "micro_batch_size": samples, "global_batch_size": GLOBAL_BATCH}
    fields |= {"train_iters": COUNTED_STEP + 1} | changes
    return run(world, partial(waits_of_a_step, **fields), inputs[0], save, inputs[1], fault)


STEP_WAITS = {
    ("item", "clip_grads.py:get_grad_norm_fp32"): 1,  # Megatron's
    ("copy to the host", "agreement.py:agree"): 1,  # the losses, whether all is finite, whether to stop
}
LAYER_WAIT = ("synchronize", "moe_layer.py:_received")
EXCHANGE_WAIT = ("synchronize", "p2p_communication.py:_communicate")  # Megatron's, after each (`batch_p2p_sync`)


@pytest.fixture(scope="module")
def figures():
    rows = Figures(f"waits of a rank in a step of {MICRO_BATCHES} micro-batches", *COLUMNS)
    yield rows
    rows.print()


def expected_of(name: str) -> Counter:
    """One wait of each layer's forward pass, twice where it is computed again."""
    passes, stages = 2 if "recompute" in name else 1, 2 if "PP2" in name else 1
    # One stage sends forward and the other back; one of these is sent and received in a single exchange.
    exchanges = 2 * MICRO_BATCHES - 1 if stages > 1 else 0
    layer_waits = passes * LAYERS // stages * MICRO_BATCHES
    return Counter(STEP_WAITS) + Counter({LAYER_WAIT: layer_waits, EXCHANGE_WAIT: exchanges})


@pytest.mark.parametrize("name", CASES)
def test_one_wait_a_layer_and_two_a_step(name, inputs, tmp_path, figures):
    ranks = count(inputs, tmp_path / "run", name)
    found = ranks[0]
    print(f"\n{name}", *(f"{times:4} {what} in {site}" for (what, site), times in sorted(found.items())), sep="\n")
    layers = LAYERS // 2 if name == "PP2" else LAYERS
    counted_here = (found[LAYER_WAIT] // layers // MICRO_BATCHES, found[EXCHANGE_WAIT], found.total())
    figures.add(name, **dict(zip(COLUMNS, map(str, (layers, *counted_here)), strict=True)))
    for found in ranks:
        assert found == expected_of(name)


@contextlib.contextmanager
def looking_at_numbers():
    """A look at a number in the forward and in the backward pass of every router, as someone might add it."""
    forward, backward = RouterProduct.forward, RouterProduct.backward

    def look_forward(ctx, hidden_states, weight):
        hidden_states.sum().item()
        return forward(ctx, hidden_states, weight)

    def look_backward(ctx, gradient, *others):
        if gradient.abs().max() > 1e9:
            raise ValueError("never")
        return backward(ctx, gradient, *others)

    with (
        patch.object(RouterProduct, "forward", staticmethod(look_forward)),
        patch.object(RouterProduct, "backward", staticmethod(look_backward)),
    ):
        yield


def test_a_look_at_a_number_is_found_in_forward_and_backward(inputs, tmp_path):
    found = count(inputs, tmp_path / "run", "one rank", looking_at_numbers)[0]
    all_layers = LAYERS * MICRO_BATCHES
    assert found - expected_of("one rank") == {
        ("item", "test_synchronisations.py:look_forward"): all_layers,
        ("item", "test_synchronisations.py:look_backward"): all_layers,
    }


def planted() -> Counter:
    """Waits of every kind, on a rank."""
    tensor = torch.arange(4.0)
    with counted() as waits:
        tensor.sum().item()
        bool(tensor.any())
        tensor.nonzero()
        tensor[tensor > 1]
        tensor.tolist()
        tensor.cpu().sum().item()  # the copy waits, what is done with it does not
        torch.tensor(1.0).cuda()
        torch.tensor(1.0, device=torch.cuda.current_device())
        torch.as_tensor([1.0]).to(torch.cuda.current_device(), non_blocking=True)  # no wait
        torch.cuda.synchronize()
    return Counter(operation for operation, _ in waits.counts.elements())


def test_planted_waits_are_found():
    kinds = {
        "copy to the device": 2,
        "item": 2,
        "nonzero": 1,
        "boolean index": 1,
        "tolist": 1,
        "copy to the host": 1,
        "synchronize": 1,
    }
    assert run(1, planted)[0] == kinds
