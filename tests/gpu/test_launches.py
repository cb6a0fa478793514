"""Launches of one MoE layer, forward and backward, on the emulated device: a launch more than here fails.

`python -m benchmarks.launches` in the environment of `make test-te` prints the whole table, with --places each launch.
"""

import pytest
import torch

from benchmarks.launches import CASES
from tests.emulation.table import TABLE
from tests.gpu import device
from tests.gpu.launches import Launches
from tests.gpu.one_layer import Counts, Layer, count
from tests.gpu.ranks import run

pytestmark = pytest.mark.skipif(not device.EMULATED, reason="counts on the emulated device alone")
OURS = {
    # case, stage: launches, and those of them that are neither products nor additions to main gradients
    ("one rank", "1"): (68, 29),
    ("one rank", "2"): (55, 27),
    ("EP 2", "1"): (68, 41),
    ("EP 2", "2"): (59, 39),
    ("TP 2", "1"): (85, 46),
    ("TP 2", "2"): (72, 44),
    ("recompute moe", "1"): (92, 40),
    ("recompute moe", "2"): (79, 38),
    ("FP8 tensorwise", "1"): (88, 49),
    ("FP8 tensorwise", "2"): (75, 47),
    ("a step that logs", "1"): (96, 55),
    ("a step that logs", "2"): (85, 54),
}
MEGATRONS = {
    ("one rank", "1"): (82, 42),
    ("one rank", "2"): (55, 27),
}


def counts(case: str, stage: str, owner: str = "ours") -> Counts:
    """Of the rank with the most launches."""
    layer = Layer(owner=owner, stage=stage, **CASES[case])
    return max(run(layer.ranks, count, layer), key=lambda rank: rank.launches)


@pytest.mark.parametrize(("case", "stage"), OURS)
def test_launches_of_a_layer(case, stage):
    found = counts(case, stage)
    places = "\n".join(f"{number:4} {name:34} {place}" for number, place, name in found.places)
    if TABLE.version == "2.11.0":
        assert (found.launches, found.others) == OURS[case, stage], places


@pytest.mark.parametrize(("case", "stage"), MEGATRONS)
def test_megatrons_layer_launches_as_many_as_when_this_was_written(case, stage):
    """The reference that ours is compared with, of megatron-core 0.16.1."""
    found = counts(case, stage, "Megatron's")
    assert (found.launches, found.others) == MEGATRONS[case, stage]


def planted() -> list[tuple[str, int, int, str]]:
    """Operations whose launches and bytes are known, in a rank."""
    tensor, log = torch.ones(8, 4), Launches()
    with log.active():
        tensor.view(4, 8)[0]  # nothing
        torch.empty(9)  # nothing
        tensor + 1  # reads and writes 32 numbers
        tensor.mm(tensor.t())
        tensor.index_select(0, torch.tensor([1, 2]))
        torch.nn.functional.pad(tensor, (0, 0, 0, 1))
    return [(operation.name, operation.launches, operation.bytes, operation.kind) for operation in log.operations]


def test_planted_launches_are_found():
    assert run(1, planted)[0] == [
        ("add", 1, 2 * 8 * 4 * 4, "other"),
        ("mm", 1, (2 * 8 * 4 + 8 * 8) * 4, "product"),
        ("index_select", 1, 2 * 2 * 4 * 4 + 2 * 8, "other"),
        ("constant_pad_nd", 2, (9 * 4 + 2 * 8 * 4) * 4, "other"),
    ]
