"""Documents of a sample that are kept apart: as each alone, in logits and all gradients, at every layout."""

import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.training import setup
from tests.distributed import rank_pool
from tests.gpu.inputs import perturb_a_little
from tests.model.configuration.test_kernels import gpu
from tests.training.documents import DocumentCase, documents_checkpoint, errors, run_documents
from tests.training.runs import make_checkpoint, make_data, training_config
from tests.training.test_layouts import CP2, EP2, FULL, PP2, SELECTIVE, TP2, VPP

TOLERANCE = 2e-6
CASES = {
    "one rank": (1, {}, {}),
    "recompute selective": (1, {}, SELECTIVE),
    "TP2+SP": (2, TP2, {}),
    "PP2": (2, PP2, {}),
    "PP2 interleaved, recompute full": (2, VPP, FULL),
    "EP2": (2, EP2, {}),
    "DP2": (2, {}, {}),
    "CP2xTP2+SP": (4, CP2 | TP2, {}),
    "CP2xPP2": (4, CP2 | PP2, FULL),
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


def test_on_cp_ranks_they_need_local_layers(tmp_path, monkeypatch):
    """Also where packing alone keeps them apart."""
    monkeypatch.setattr(setup, "select_platform", lambda *_: gpu())
    paths = make_checkpoint(tmp_path), tmp_path / "run", make_data(tmp_path)
    for flags in ({"reset_attention_mask": True}, {"pack": "best-fit"}):
        config = training_config(*paths, fp32=False, bf16=True, **CP2, **flags)
        with pytest.raises(UserError, match="--context-parallel-size 2: Transformer Engine splits documents"):
            setup.prepare(config)
