"""Documents of a sample that are kept apart: as each alone, in logits and all gradients, at every layout."""

import pytest

from tests.distributed import rank_pool
from tests.gpu.inputs import perturb_a_little
from tests.training.documents import DocumentCase, documents_checkpoint, errors, run_documents
from tests.training.test_layouts import EP2, FULL, PP2, SELECTIVE, TP2, VPP

TOLERANCE = 2e-6
CASES = {
    "one rank": (1, {}, {}),
    "recompute selective": (1, {}, SELECTIVE),
    "TP2+SP": (2, TP2, {}),
    "PP2": (2, PP2, {}),
    "PP2 interleaved, recompute full": (2, VPP, FULL),
    "EP2": (2, EP2, {}),
    "DP2": (2, {}, {}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Sliding window of 8 tokens and yarn."""
    return documents_checkpoint(tmp_path_factory.mktemp("documents"), perturb_a_little, initializer_range=0.1)


@pytest.fixture(scope="module")
def alone(checkpoint):
    return rank_pool(1).run(run_documents, checkpoint, DocumentCase(alone=True))[0]


def test_the_check_sees_a_leak_and_positions_reach_the_rotary_embedding(checkpoint, alone):
    """Planted: no mask, a boundary one token late, other distances.

    Where positions begin does not count, but for the rounding of the angles: rotary embeddings give distances alone.
    """
    for changes in ({"leak": "mask"}, {"leak": "boundary"}, {"positions": "halved"}):
        found = errors(rank_pool(1).run(run_documents, checkpoint, DocumentCase(**changes)), alone)
        assert found["logits"] > 1e-2 and found["gradients"] > 1e-2, (changes, found)
    found = errors(rank_pool(1).run(run_documents, checkpoint, DocumentCase(positions="sample")), alone)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("name", CASES)
def test_as_each_document_alone(name, checkpoint, alone):
    ranks, layout, compute = CASES[name]
    found = errors(rank_pool(ranks).run(run_documents, checkpoint, DocumentCase(layout, compute)), alone)
    assert max(found.values()) < TOLERANCE, found
