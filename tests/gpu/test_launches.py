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
    ("one rank", "1"): (63, 24),
    ("one rank", "2"): (51, 23),
    ("EP 2", "1"): (59, 32),
    ("EP 2", "2"): (51, 31),
    ("TP 2", "1"): (66, 27),
    ("TP 2", "2"): (54, 26),
    ("recompute moe", "1"): (87, 35),
    ("recompute moe", "2"): (75, 34),
    ("FP8 tensorwise", "1"): (77, 38),
    ("FP8 tensorwise", "2"): (65, 37),
    ("a step that logs", "1"): (91, 50),
    ("a step that logs", "2"): (81, 50),
}
MEGATRONS = {
    ("one rank", "1"): (82, 42),
    ("one rank", "2"): (55, 27),
    ("EP 2", "2"): (53, 33),
    ("TP 2", "2"): (55, 27),
    ("FP8 tensorwise", "2"): (65, 37),
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


@pytest.mark.parametrize(("case", "stage"), MEGATRONS)
def test_ours_launches_no_more(case, stage):
    ours, megatrons = OURS[case, stage], MEGATRONS[case, stage]
    assert ours[0] <= megatrons[0] and ours[1] <= megatrons[1]


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
