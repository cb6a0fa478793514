"""What is said of memory that differs from the plan."""

from collections import Counter

from megatron_moe_lpr.planning.memory import GIB
from megatron_moe_lpr.rehearsal.comparison import Part, remarks
from megatron_moe_lpr.rehearsal.rank import Rehearsed
from megatron_moe_lpr.rehearsal.record import RankRecord
from tests.planning.test_activations import SHAPE

PLACES = Counter({"": 20 * GIB, "a.py:1 in f": 3 * GIB, "b.py:2 in g": 2 * GIB})


def test_a_part_that_differs_says_where_the_memory_is():
    rehearsed = Rehearsed(RankRecord(3), {"pp": 0}, PLACES, SHAPE, frozenset(), True, True, float("nan"))
    parts = [
        Part("parameters", 10 * GIB, 10 * GIB),
        Part("gradients", 10 * GIB, 10.4 * GIB),
        Part("optimizer", 8 * GIB, 10 * GIB),
        Part("activations", 11 * GIB, 10 * GIB),
        Part("together", 5 * GIB, None),
        Part("small", 1 << 20, 2 << 20),
    ]
    assert remarks(rehearsed, parts) == [
        "rank 3: optimizer 8.00 GiB, planned 10.00 (-20%)",
        "rank 3: activations 11.00 GiB, planned 10.00 (+10%); most at the peak: 3.00 GiB of a.py:1 in f, 2.00 GiB of "
        "b.py:2 in g",
    ]
