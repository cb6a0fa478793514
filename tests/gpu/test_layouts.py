"""One-node layouts over NCCL against one GPU, bf16. Nobody has run this yet."""

import pytest
import torch

from tests.gpu.inputs import compute, gradient_error, relative_error

TP2, PP2, EP2 = (f"--{name}-model-parallel-size 2".split() for name in ("tensor", "pipeline", "expert"))
INTERLEAVED = ["--num-virtual-stages-per-pipeline-rank", "2"]
LAYOUTS = {
    "DP2": (2, []),
    "TP2+SP": (2, TP2),
    "EP2": (2, EP2),
    "EP2, flex": (2, [*EP2, "--moe-token-dispatcher-type", "flex"]),
    "PP2": (2, PP2),
    "PP2 interleaved": (2, [*PP2, *INTERLEAVED]),
    "TP2xEP2": (2, [*TP2, *EP2]),
    "EP4": (4, ["--expert-model-parallel-size", "4"]),
    "TP2xEP2xPP2": (4, [*TP2, *EP2, *PP2]),
    "TP2xEP2xPP2xDP2": (8, [*TP2, *EP2, *PP2]),
}
LOGITS, GRADIENTS = 0.03, 0.15


@pytest.fixture(scope="module")
def one_gpu(inputs, tmp_path_factory):
    return compute(inputs[0], tmp_path_factory.mktemp("one") / "one.pt", "--bf16")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_gpu(name, one_gpu, inputs, tmp_path):
    ranks, flags = LAYOUTS[name]
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    if "flex" in flags:
        pytest.importorskip("deep_ep", reason="needs DeepEP")
    found = compute(inputs[0], tmp_path / "layout.pt", "--bf16", *flags, ranks=ranks)
    assert relative_error(found["logits"], one_gpu["logits"]) < LOGITS
    assert gradient_error(found["gradients"], one_gpu["gradients"]) < GRADIENTS
