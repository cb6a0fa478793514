"""Where a training step makes the host wait for the device, counted on the emulated device, per micro-batch and layer.

`make test-te TESTS="tests/gpu/test_synchronisations.py -s"` prints every place.
"""

import contextlib
from collections import Counter
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from megatron_moe_lpr.training.loop import Trainer
from tests.gpu import device
from tests.gpu.ranks import run
from tests.gpu.synchronisations import counted
from tests.gpu.test_layouts import EP2, TP2
from tests.gpu.test_numerics import BF16, RECIPES, SHARDED
from tests.training.runs import train

COUNTED_STEP = 3  # what only the first steps do is over
LAYERS = 4
GLOBAL_BATCH = 8
pytestmark = pytest.mark.skipif(not device.EMULATED, reason="counts on the emulated device alone")
CASES = {
    "one rank": (1, {}),
    "one rank, fp32": (1, {"fp32": True, "bf16": False}),
    "stage 2": (1, {"stage": "2"}),
    "fp8 tensorwise": (1, RECIPES["tensorwise"]),
    "EP2": (2, EP2 | SHARDED),
    "TP2+SP": (2, TP2),
}


def waits_of_a_step(checkpoint: Path, save: Path, data: dict, **changes) -> Counter:
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

        with patch.object(Trainer, "step", watched):
            train(checkpoint, save, data, platform="cuda", log_interval=100, **changes)
    return found


def count(inputs, save: Path, name: str) -> Counter:
    """Rank 0's waits of a step with two micro-batches."""
    world, changes = CASES[name]
    fields = {"fp32": False, **BF16, "seq_length": 64, "micro_batch_size": 4 // (2 if name == "EP2" else 1)}
    fields |= {"global_batch_size": GLOBAL_BATCH, "train_iters": COUNTED_STEP + 1} | changes
    return run(world, partial(waits_of_a_step, **fields), inputs[0], save, inputs[1])[0]


OF_THE_STEP = {
    ("item", "clip_grads.py:get_grad_norm_fp32"): 1,  # Megatron's
    ("copy to the host", "agreement.py:agree"): 1,  # the losses, whether all is finite, whether to stop
}
OF_A_LAYER = ("synchronize", "token_dispatcher.py:_maybe_dtoh_and_synchronize")
MICRO_BATCHES = 2


@pytest.mark.parametrize("name", CASES)
def test_one_wait_a_layer_and_two_a_step(name, inputs, tmp_path):
    found = count(inputs, tmp_path / "run", name)
    print(f"\n{name}")
    for (operation, site), times in sorted(found.items()):
        print(f"  {times:4} {operation:18} {site}")
    assert found == OF_THE_STEP | {OF_A_LAYER: LAYERS * MICRO_BATCHES}


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
